"""A store on S3 where things go wrong: servers that are out of reach or refuse, writers that meet, parts that fail.

What it has in common with every other store is in the battery of test_store.py.
"""

import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from prefect.states import Failed

from quee_core.backbones.shelf import read_shelf
from quee_core.entries import table_entry
from quee_core.errors import AbsentTableError, DamagedTableError, StoreError, StoreUnreachableError
from quee_core.s3_place import PART, S3Place
from quee_core.store import Store
from tasks.retries import is_transient
from tests.feature_tables import PATHS, numbered_cell, small_table
from tests.processes import free_ports
from tests.quee_command import only_error, refused, write_sweep
from tests.s3_gate import DROPPED, Answer, Request, S3Gate
from tests.s3_server import (
    ACCESS_KEY,
    READER_KEY,
    READER_SECRET,
    SECRET_KEY,
    S3Server,
    other_environment,
)
from tests.test_store import Place, child, child_environment, flip_a_bit

pytestmark = pytest.mark.xdist_group("s3")


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store of the test's own."""
    return f"s3://quee{tmp_path}"


@pytest.fixture(autouse=True)
def nothing_told_is_secret(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No test leaves a secret in a log or an output."""
    with caplog.at_level(logging.INFO):
        yield
    out, err = capfd.readouterr()
    for told in (caplog.text, out, err):
        assert SECRET_KEY not in told
        assert READER_SECRET not in told


# What may pass


@pytest.mark.parametrize(
    "answer",
    [
        Answer(503, "SlowDown"), Answer(500, "InternalError"), Answer(502, "Proxy"), Answer(400, "RequestTimeout"),
        Answer(409, "OperationAborted"), DROPPED,
    ],
)  # fmt: skip
def test_what_may_pass_is_tried_again(s3_gate: S3Gate, url: str, answer: Answer) -> None:
    store = Store.open(url)
    s3_gate.fail(answer, answer)
    store.put_artefact("heads", "abc", b"x")
    assert s3_gate.count("PUT") + s3_gate.count("GET") == 3 + 2  # looked for, data, manifest; and two tries in vain
    s3_gate.fail(answer, when=lambda request: request.method == "PUT")
    store.put_artefact("heads", "def", b"y")
    s3_gate.fail(answer)
    assert store.get_artefact("heads", "def") == b"y"
    assert store.set_aside == []


def test_one_of_many_reads_that_fails_is_tried_again(s3_gate: S3Gate, url: str) -> None:
    store, cells = Store.open(url), [numbered_cell(number) for number in range(4)]
    for number, cell in enumerate(cells):
        store.put_table(cell, small_table(number))
    s3_gate.fail(DROPPED, Answer(500, "InternalError"), when=lambda request: request.key.endswith(".parquet"))
    assert store.missing(cells) == []


def test_what_does_not_pass_in_time_is_told_apart(s3_gate: S3Gate, url: str) -> None:
    store = Store.open(url, patience=1)
    s3_gate.judge = lambda _: Answer(503, "SlowDown")
    began = time.monotonic()
    with pytest.raises(
        StoreUnreachableError, match=r"refuses it for the moment \(SlowDown, status 503\), for \d+ s now"
    ):
        store.get_artefact("heads", "abc")
    assert time.monotonic() - began >= 1
    assert 2 <= len(s3_gate.requests) <= 8  # with growing pauses


def test_a_server_that_is_not_there_is_named_with_what_to_do(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    [port] = free_ports(1)
    nobody = {"AWS_ENDPOINT_URL": f"http://someone:password@127.0.0.1:{port}"}
    for use in (lambda store: store.check_room(1), lambda store: store.missing([numbered_cell(0)])):
        with other_environment(s3_environment | nobody, monkeypatch), pytest.raises(StoreUnreachableError) as caught:
            use(Store.open(url, patience=0.1))
        told = str(caught.value)
        assert told.startswith(url)
        assert f"http://127.0.0.1:{port} does not answer" in told
        assert "see that the server runs and AWS_ENDPOINT_URL is its address, and run again" in told
        assert "password" not in told


@pytest.mark.usefixtures("s3_environment")
def test_work_goes_on_over_a_server_that_is_killed_and_started_again(
    s3_server: S3Server, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, cells, faults = Store.open(url, patience=60), [numbered_cell(number) for number in range(60)], []
    halfway = threading.Event()

    def publish() -> None:
        try:
            for number, cell in enumerate(cells):
                store.put_table(cell, small_table(number))
                if number == 20:
                    halfway.set()
        except Exception as error:
            faults.append(error)

    writer = threading.Thread(target=publish)
    writer.start()
    assert halfway.wait(60)
    s3_server.restart()
    writer.join(120)
    assert not writer.is_alive()
    assert faults == []
    assert "trying again for" in caplog.text
    assert Store.open(url, patience=60).missing(cells) == []
    for number, cell in enumerate(cells):
        assert store.get_table(cell).equals(small_table(number))
    assert store.set_aside == []


# What can't pass


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(403, "AccessDenied"), "access is denied; the credentials must be allowed to list the bucket, and to"),
        (Answer(403, "RequestTimeTooSkewed"), "clock and the server's differ too much; set the clock"),
        (Answer(400, "ExpiredToken"), "the session's credentials have run out; get new ones"),
        (Answer(400, "AuthorizationHeaderMalformed"), "another region; set AWS_DEFAULT_REGION"),
        (Answer(400, "NeverHeardOf"), "NeverHeardOf"),
    ],
)
def test_what_can_not_pass_is_told_at_once(s3_gate: S3Gate, url: str, answer: Answer, says: str) -> None:
    store = Store.open(url)
    s3_gate.judge = lambda _: answer
    for use in (lambda: store.get_artefact("heads", "abc"), lambda: store.check_room(1), store.sweep_orphans):
        s3_gate.requests.clear()
        with pytest.raises(StoreError) as caught:
            use()
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, StoreUnreachableError)
        assert len(s3_gate.requests) == 1


def message(url: str) -> str:
    """What every use of a store says, which must be the same."""
    store, told = Store.open(url), set()
    for use in (
        lambda: store.get_artefact("heads", "abc"),
        lambda: store.put_artefact("heads", "abc", b"x"),
        lambda: store.missing([numbered_cell(0)]),
        lambda: store.check_room(1),
        store.sweep_orphans,
    ):
        with pytest.raises(StoreError) as caught:
            use()
        assert not isinstance(caught.value, StoreUnreachableError)
        assert ACCESS_KEY not in str(caught.value)
        assert "\n" not in str(caught.value)
        told.add(str(caught.value).partition(": cannot be ")[2].partition(": ")[2])
    [only] = told
    return only


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"AWS_ACCESS_KEY_ID": "NOBODY"}, "does not know the access key; check AWS_ACCESS_KEY_ID, or the profile"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "the secret key is not the access key's; check AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials are found"),
    ],
)
def test_credentials_that_will_not_do_are_told(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, url: str, changes: Mapping[str, str], says: str
) -> None:
    with other_environment({k: v for k, v in (s3_environment | changes).items() if v}, monkeypatch):
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        assert says in message(url)


@pytest.mark.usefixtures("s3_environment")
def test_a_bucket_that_is_not_there_is_told(s3_server: S3Server) -> None:
    assert message("s3://no-such-bucket/store") == (
        f"there is no such bucket at {s3_server.endpoint}; make it, or name another"
    )
    assert "S3 has no bucket or object of such a name" in message("s3://No Such Bucket/store")


def test_credentials_that_may_only_read_serve_to_read_and_are_told_when_they_write(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    cell = numbered_cell(0)
    Store.open(url).put_table(cell, small_table(0))
    reader = {"AWS_ACCESS_KEY_ID": READER_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET}
    with other_environment(s3_environment | reader, monkeypatch):
        store = Store.open(url)
        assert store.get_table(cell).equals(small_table(0))
        assert store.missing([cell, numbered_cell(1)]) == [numbered_cell(1)]
        with pytest.raises(StoreError, match="cannot be written: access is denied"):
            store.put_artefact("heads", "abc", b"x")


@pytest.mark.usefixtures("s3_environment")
def test_a_profile_gives_endpoint_region_and_credentials(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str
) -> None:
    (tmp_path / "config").write_text(
        f"[profile lab]\nendpoint_url = {s3_server.endpoint}\nregion = us-east-1\naws_access_key_id = {ACCESS_KEY}\n"
        f"aws_secret_access_key = {SECRET_KEY}\n"
    )
    with other_environment({"AWS_PROFILE": "lab", "AWS_CONFIG_FILE": str(tmp_path / "config")}, monkeypatch):
        store = Store.open(url)
        store.put_artefact("heads", "abc", b"x")
        assert store.get_artefact("heads", "abc") == b"x"
    with (
        other_environment({"AWS_PROFILE": "nobody", "AWS_CONFIG_FILE": str(tmp_path / "config")}, monkeypatch),
        pytest.raises(StoreError, match=r"settings for S3 are wrong .*nobody.*; check .*AWS_PROFILE"),
    ):
        Store.open(url)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://{ACCESS_KEY}:{SECRET_KEY}@quee/store", f"s3a://{ACCESS_KEY}@quee/store", f"s3://{ACCESS_KEY}:ab{SECRET_KEY}@quee",
        f"https://someone:{SECRET_KEY}@quee/store",
    ],
)  # fmt: skip
def test_a_url_with_credentials_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(StoreError, match="credentials do not belong in a URL") as caught:
        Store.open(url)
    for piece in (*SECRET_KEY.replace("@", "/").split("/")[1:], ACCESS_KEY):
        assert piece not in str(caught.value)


def test_an_endpoint_that_is_no_url_is_told_without_its_login(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    with (
        other_environment({"AWS_ENDPOINT_URL": "someone:password@server"}, monkeypatch),
        pytest.raises(StoreError, match=r"settings for S3 are wrong .*check AWS_ENDPOINT_URL") as caught,
    ):
        Store.open(url)
    assert "password" not in str(caught.value)


@pytest.mark.usefixtures("s3_environment")
def test_a_bucket_can_be_a_store_itself() -> None:
    store, key = Store.open("s3://quee"), uuid.uuid4().hex
    assert store.url == "s3://quee"
    store.put_artefact("heads", key, b"x")
    assert store.get_artefact("heads", key) == b"x"
    assert store.sweep_orphans(older_than=0) == []
    assert store.get_artefact("heads", key) == b"x"


def test_a_url_without_a_bucket_is_refused() -> None:
    for url in ("s3://", "s3:///store"):
        with pytest.raises(StoreError, match="no bucket is named; want s3://bucket/prefix"):
            Store.open(url)


def test_a_store_on_a_disk_does_without_the_packages_of_s3(tmp_path: Path) -> None:
    told = child(
        "-c",
        "import sys; from quee_core.store import Store\n"
        f"Store.open({str(tmp_path)!r}).put_artefact('heads', 'abc', b'x')\n"
        "print([name for name in sys.modules if name.startswith(('boto', 's3fs', 'aio'))])",
    )
    assert told.stdout == "[]\n"


def test_a_task_is_tried_again_for_a_store_out_of_reach_and_for_no_other_fault_of_ours() -> None:
    for error in (StoreUnreachableError("later"), ConnectionResetError(), TimeoutError()):
        assert is_transient(None, None, Failed(data=error))
    for error in (StoreError("never"), FileNotFoundError(), ValueError("a bug")):
        assert not is_transient(None, None, Failed(data=error))


@pytest.mark.parametrize(
    ("store", "says"),
    [
        ("s3://no-such-bucket/store", "s3://no-such-bucket/store: cannot be written: there is no such bucket at http://"),
        (f"s3://{ACCESS_KEY}:{SECRET_KEY}@quee/store", "sweep.yaml: run.store: credentials do not belong in"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("s3_environment", "prefect_home")
def test_the_command_says_what_is_wrong_with_the_store_before_anything_starts(
    tmp_path: Path, store: str, says: str
) -> None:
    write_sweep(tmp_path, run={"store": store})
    told = refused(tmp_path, "sweep", "sweep.yaml")
    assert told.startswith(says)
    assert ACCESS_KEY not in told
    assert not (tmp_path / "runs" / "small").exists()


LATE = """
import datetime
from botocore import auth
from flows.cli import main
true_time = auth.get_current_datetime
auth.get_current_datetime = lambda *given: true_time(*given) + datetime.timedelta(minutes=MINUTES)
main()
"""


@pytest.mark.parametrize("minutes", [-60, 60])
@pytest.mark.usefixtures("s3_environment")
def test_a_clock_that_is_wrong_is_told_by_the_command(tmp_path: Path, minutes: int) -> None:
    """In a process whose requests carry another time; the server compares it with its own."""
    write_sweep(tmp_path, run={"store": f"s3://quee{tmp_path}"})
    done = subprocess.run(
        [sys.executable, "-c", LATE.replace("MINUTES", str(minutes)), "sweep", "sweep.yaml"], cwd=tmp_path,
        env=child_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    told = only_error(done.stdout + done.stderr)
    assert "this machine's clock and the server's differ too much; set the clock (timedatectl shows it)" in told
    assert not (tmp_path / "runs" / "small").exists()


@pytest.mark.usefixtures("s3_environment")
def test_every_address_of_a_sweep_in_a_bucket_that_is_not_there_is_told(s3_server: S3Server, tmp_path: Path) -> None:
    write_sweep(tmp_path)
    weights = "s3://no-such-bucket/weights.safetensors"
    told = refused(tmp_path, "plan", "sweep.yaml", "--checkpoint", weights)
    assert told == (
        f"{weights}: cannot be read: there is no such bucket at {s3_server.endpoint}; make it, or name another"
    )
    with pytest.raises(StoreError, match="backbones: cannot be read: there is no such bucket"):
        read_shelf("s3://no-such-bucket/backbones")
    write_sweep(tmp_path, run={"artifacts": "s3://no-such-bucket/figures"})
    told = refused(tmp_path, "sweep", "sweep.yaml")
    assert told.startswith("MLflow at s3://no-such-bucket/figures: ")
    assert "bucket does not exist; correct run.artifacts, or make that place" in told
    assert not list((tmp_path / "store").glob("backbone=*"))  # before anything was computed


# Whole or absent


def test_of_two_writers_the_first_wins(s3_gate: S3Gate, url: str) -> None:
    """The second has looked, seen nothing and put its data, when the first publishes."""
    cell, first, second = numbered_cell(0), Store.open(url), Store.open(url)

    def meet(request: Request) -> None:
        if request.method == "PUT" and request.key.endswith(table_entry(cell).manifest):
            s3_gate.judge = lambda _: None
            first.put_table(cell, small_table(1), {"writer": "first"})

    s3_gate.judge = meet
    second.put_table(cell, small_table(2), {"writer": "second"})
    for store in (first, second):
        assert store.get_table(cell).schema.metadata[b"quee.writer"] == b"first"
    assert len(first.sweep_orphans(older_than=0)) == 1
    assert first.missing([cell]) == []


@pytest.mark.parametrize("more", ["", "<Condition>If-None-Match</Condition>"])  # s3fs has an exception for each
def test_a_manifest_that_is_there_already_stays(s3_gate: S3Gate, url: str, more: str) -> None:
    store = Store.open(url)
    s3_gate.fail(Answer(412, "PreconditionFailed", more), when=lambda request: "If-None-Match" in request.headers)
    store.put_artefact("heads", "abc", b"x")
    assert store.get_artefact("heads", "abc") is None  # no server would say so of what is not there
    store.put_artefact("heads", "abc", b"x")
    assert store.get_artefact("heads", "abc") == b"x"


@pytest.mark.parametrize("answer", [Answer(501, "NotImplemented"), Answer(400, "InvalidArgument")])
def test_a_server_without_conditional_puts_serves_too(s3_gate: S3Gate, url: str, answer: Answer) -> None:
    s3_gate.judge = lambda request: answer if "If-None-Match" in request.headers else None
    store = Store.open(url)
    for key in ("abc", "def"):
        store.put_artefact("heads", key, key.encode())
        assert store.get_artefact("heads", key) == key.encode()
    assert sum("If-None-Match" in request.headers for request in s3_gate.requests) == 1  # asked once


def test_a_large_object_comes_in_parts_and_shows_once_all_are_there(s3_gate: S3Gate, url: str) -> None:
    store, place = Store.open(url), Place(url)
    data = os.urandom(2 * PART + 5)
    s3_gate.fail(Answer(403, "AccessDenied"), when=lambda request: request.query.get("partNumber") == ["2"])
    with pytest.raises(StoreError, match="access is denied"):
        store.put_artefact("heads", "abc", data)
    assert place.files() == {}
    assert place.fs.list_multipart_uploads("quee") == []
    assert store.get_artefact("heads", "abc") is None
    s3_gate.fail(DROPPED, when=lambda request: request.query.get("partNumber") == ["2"])
    store.put_artefact("heads", "abc", data)
    assert store.get_artefact("heads", "abc") == data
    assert len(place.files()) == 2


# Requests, which cost


def test_what_a_rerun_asks_for(s3_gate: S3Gate, url: str) -> None:
    store, cells = Store.open(url), [numbered_cell(number) for number in range(2 * len(PATHS))]
    branches = {(cell.shard, cell.path.bits[0]) for cell in cells}
    for number, cell in enumerate(cells):
        store.put_table(cell, small_table(number))
    assert not store.sealed(cells)
    store.seal(cells)
    s3_gate.requests.clear()
    assert Store.open(url).sealed(cells)
    assert [request.method for request in s3_gate.requests] == ["GET"] * len(branches)
    s3_gate.requests.clear()
    assert store.sweep_orphans() == []
    assert [request.method for request in s3_gate.requests] == ["LIST"] * 2  # the root, and all below the backbone
    s3_gate.requests.clear()
    store.get_table(cells[0])
    assert [request.method for request in s3_gate.requests] == ["GET"] * 2


def test_a_listing_of_several_pages_is_whole(s3_gate: S3Gate, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quee_core.s3_place._PAGE", 7)
    place, some = Place(url), {f"artefacts/heads/{number:04d}.0123456789abcdef.bin": b"x" for number in range(16)}
    for name, data in some.items():
        place.write(name, data)
    s3_gate.requests.clear()
    assert len(S3Place.at(url, patience=1).sizes("artefacts/heads")) == len(some)
    assert [request.method for request in s3_gate.requests] == ["LIST"] * 3
    assert set(Store.open(url).sweep_orphans(older_than=0)) == set(some)


# Seals


@pytest.fixture(params=["memory", "s3"])
def sealed(request: pytest.FixtureRequest, url: str) -> tuple[Store, Place]:
    """A store with ten tables of five branches, all of them sealed."""
    if request.param == "s3":
        request.getfixturevalue("s3_environment")
    place = Place(url if request.param == "s3" else f"memory://{url.partition('//')[2]}")
    store = Store.open(place.url)
    for number, cell in enumerate(TEN):
        store.put_table(cell, small_table(number))
    store.seal(TEN)
    return store, place


TEN = [numbered_cell(number) for number in range(len(PATHS))]


def test_a_seal_stands_for_its_tables_alone(sealed: tuple[Store, Place]) -> None:
    store, place = sealed
    assert store.sealed(TEN)
    assert store.sealed(TEN[::-1])
    assert not store.sealed([*TEN, numbered_cell(len(PATHS))])
    of_eight = [cell for cell in TEN if cell.path.bits[0] == 8]
    assert store.sealed(of_eight)
    assert not store.sealed(of_eight[1:])  # another sweep's tables have a seal of their own
    store.seal(of_eight[1:])
    assert store.sealed(of_eight[1:])
    assert store.sealed(TEN)
    before = place.files()
    store.seal(TEN)
    assert place.files() == before
    assert store.missing(TEN) == []
    assert store.sweep_orphans(older_than=0) == []
    assert place.files() == before


@pytest.mark.parametrize("spoilt", [lambda data: data[:-1], lambda _: b"", lambda data: data.replace(b"f", b"e")])
def test_a_damaged_seal_is_none(sealed: tuple[Store, Place], spoilt: Callable[[bytes], bytes]) -> None:
    store, place = sealed
    for name, data in place.files().items():
        if "_branch-" in name:
            place.write(name, spoilt(data))
    assert not store.sealed(TEN)
    assert store.missing(TEN) == []
    store.seal(TEN)
    assert store.sealed(TEN)


@pytest.mark.parametrize("how", ["damaged", "gone", "manifest gone"])
def test_a_table_that_proves_damaged_or_gone_takes_its_branches_seals_away(
    sealed: tuple[Store, Place], how: str
) -> None:
    store, place = sealed
    eight = [cell for cell in TEN if cell.path.bits[0] == 8]
    others = [cell for cell in TEN if cell not in eight]
    spoilt = eight[1]
    if how == "damaged":
        place.write(place.data(spoilt), flip_a_bit(place.read(place.data(spoilt))))
    else:
        if how == "gone":
            place.remove(place.data(spoilt))
        place.remove(place.manifest(spoilt))
    assert store.sealed(TEN)  # so it is not looked at, until somebody wants to use it
    with pytest.raises(DamagedTableError if how == "damaged" else AbsentTableError, match="run"):
        store.get_table(spoilt)
    assert not store.sealed(eight)
    assert store.sealed(others)
    assert store.missing(TEN) == [spoilt]
    store.put_table(spoilt, small_table(TEN.index(spoilt)))
    store.seal(eight)
    assert store.sealed(TEN)
    assert store.get_table(spoilt).equals(small_table(TEN.index(spoilt)))


def test_on_a_disk_nothing_is_sealed(tmp_path: Path) -> None:
    store, place = Store.open(tmp_path), Place(str(tmp_path))
    store.put_table(TEN[0], small_table(0))
    before = place.files()
    store.seal(TEN[:1])
    assert not store.sealed(TEN[:1])
    assert place.files() == before
