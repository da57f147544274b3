"""The store: whole or absent, whatever happens to writer, disk or files; one battery for each file system."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.dataset
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quee_core
from quee_core.errors import DamagedTableError, StoreError
from quee_core.store import Store
from quee_core.tables import Cell, to_parquet_bytes
from quee_core.whole_files import disk_faults, is_temporary, whole_file
from tests.feature_tables import PATHS, numbered_cell, small_table

CHILDREN = Path(__file__).with_name("store_children.py")
DEADLINE = 60.0  # seconds; a child that takes longer is stuck


class Place:
    """A store's folder, read and written behind the store's back."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)

    def files(self, below: str = "") -> dict[str, bytes]:
        """Contents of every file, by its place below the root."""
        return {
            path[len(self.root) + 1 :]: self.fs.cat_file(path)
            for path in self.fs.find(f"{self.root}/{below}".rstrip("/"))
        }

    def data(self, cell: Cell) -> str:
        """The data file of a cell, below the root."""
        stem = cell.location.removesuffix(".parquet")
        found = [name for name in self.files(cell.folder) if name.startswith(stem)]
        assert len(found) == 1
        return found[0]

    def manifest(self, cell: Cell) -> str:
        folder, _, name = cell.location.rpartition("/")
        return f"{folder}/_{name.removesuffix('.parquet')}.json"

    def read(self, name: str) -> bytes:
        return bytes(self.fs.cat_file(f"{self.root}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        self.fs.makedirs(f"{self.root}/{name}".rpartition("/")[0], exist_ok=True)
        self.fs.pipe_file(f"{self.root}/{name}", data)

    def remove(self, name: str) -> None:
        self.fs.rm_file(f"{self.root}/{name}")


# brackets, since some of fsspec takes them for a pattern
ROOTS = {"file": "file://{folder}/a [b]", "memory": "memory://{unique}/a [b]", "s3": "s3://quee/{unique}/a [b]"}
ON_S3 = pytest.param("s3", marks=pytest.mark.xdist_group("s3"))


def place_for(kind: str, request: pytest.FixtureRequest) -> Place:
    if kind == "s3":
        request.getfixturevalue("s3_environment")
    return Place(ROOTS[kind].format(folder=request.getfixturevalue("tmp_path"), unique=uuid.uuid4()))


@pytest.fixture(params=["file", "memory", ON_S3])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    found = place_for(request.param, request)
    yield found
    if request.param == "memory":
        found.fs.rm(found.root.rpartition("/")[0], recursive=True)


@pytest.fixture(params=["file", ON_S3])
def shared_place(request: pytest.FixtureRequest) -> Place:
    """One that other processes reach too."""
    return place_for(request.param, request)


@pytest.fixture
def store(place: Place) -> Store:
    place.write("someone's notes.txt", b"not ours")
    return Store.open(place.url)


def publish(store: Store, count: int) -> list[Cell]:
    cells = [numbered_cell(number) for number in range(count)]
    for number, cell in enumerate(cells):
        store.put_table(cell, small_table(number))
    return cells


# What a store is


def test_asking_for_room_leaves_nothing_behind(store: Store, place: Place) -> None:
    before = place.files()
    store.check_room(1_000_000)
    assert place.files() == before


def test_tables_come_back_as_they_were_put(store: Store) -> None:
    cells = publish(store, 12)
    for number, cell in enumerate(cells):
        assert store.get_table(cell).equals(small_table(number))
    assert store.missing(cells) == []


def test_the_file_says_what_it_is(store: Store) -> None:
    cell = numbered_cell(3)
    store.put_table(cell, small_table(3), {"weights": "ab12", "torch": "2.9"})
    facts = {key.decode(): value.decode() for key, value in store.get_table(cell).schema.metadata.items()}
    assert facts == {
        "backbone": "micro_vit", "dataset": "fashion_mnist", "split": "test", "path": "2-2", "shard": "0",
        "shards": "1000", "key": cell.key, "rows": "12", "schema_version": "1", "quee.weights": "ab12",
        "quee.torch": "2.9",
    }  # fmt: skip


def test_missing_names_the_others_in_the_order_that_was_asked(store: Store) -> None:
    cells = publish(store, 12)
    lacking = [numbered_cell(number) for number in (40, 13, 21)]
    asked = [lacking[0], *cells[6:], lacking[1], *cells[:6], lacking[2], lacking[0]]
    for contents in (True, False):
        assert store.missing(asked, contents=contents) == [lacking[0], lacking[1], lacking[2], lacking[0]]
    assert Store.open("memory://nothing here").missing(asked) == asked


def test_another_key_is_another_table(store: Store) -> None:
    cell = numbered_cell(0)
    recomputed = Cell(cell.backbone, cell.dataset, cell.split, cell.path, cell.shard, cell.shards, "f" * 64)
    store.put_table(cell, small_table(0))
    assert store.missing([cell, recomputed]) == [recomputed]
    store.put_table(recomputed, small_table(1))
    assert store.get_table(cell).equals(small_table(0))
    assert store.get_table(recomputed).equals(small_table(1))


def test_what_is_there_is_kept_and_putting_it_again_writes_nothing(store: Store, place: Place) -> None:
    [cell] = publish(store, 1)
    before = place.files()
    store.put_table(cell, small_table(0))
    store.put_table(cell, small_table(1), {"writer": "second"})
    assert place.files() == before


def test_another_writer_shows_at_once(store: Store, place: Place) -> None:
    cell = numbered_cell(0)
    assert store.missing([cell]) == [cell]
    Store.open(place.url).put_table(cell, small_table(0))
    assert store.missing([cell]) == []


def test_a_table_that_is_not_there_is_named_with_what_to_do(store: Store) -> None:
    with pytest.raises(StoreError, match=r"bits=2/.*no such table.*run the sweep again") as caught:
        store.get_table(numbered_cell(0))
    assert not isinstance(caught.value, DamagedTableError)


def test_what_is_no_feature_table_is_not_published(store: Store, place: Place) -> None:
    with pytest.raises(DamagedTableError, match="'entropy'"):
        store.put_table(numbered_cell(0), small_table().drop_columns("entropy"))
    assert list(place.files()) == ["someone's notes.txt"]


@given(data=st.binary(max_size=200))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_artefacts_come_back_as_they_were_put(store: Store, data: bytes) -> None:
    key = uuid.uuid4().hex
    assert store.get_artefact("calibration", key) is None
    store.put_artefact("calibration", key, data)
    assert store.get_artefact("calibration", key) == data
    assert store.get_artefact("heads", key) is None
    store.put_artefact("calibration", key, data + b"x")
    assert store.get_artefact("calibration", key) == data


@pytest.mark.parametrize(("kind", "key"), [("..", "a"), ("a", "../b"), ("a/b", "c"), ("", "a"), ("a", "x" * 129)])
def test_artefacts_can_not_leave_their_folder(store: Store, kind: str, key: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        store.put_artefact(kind, key, b"")
    with pytest.raises(ValueError, match="letters, digits"):
        store.get_artefact(kind, key)


def test_a_store_goes_to_another_process(store: Store) -> None:
    cells = publish(store, 1)
    assert pickle.loads(pickle.dumps(store)).missing(cells) == []


def test_other_readers_of_parquet_see_the_tables_of_a_folder(store: Store, place: Place) -> None:
    publish(store, 3)
    found = pyarrow.dataset.dataset(
        f"{place.root}/backbone=micro_vit", filesystem=place.fs, partitioning="hive", format="parquet"
    ).to_table()
    assert found.num_rows == 36
    assert set(found["bits"].to_pylist()) == {int(str(path)) for path in PATHS[:3]}


# Opening


def test_a_folder_a_path_and_a_url_name_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = publish(Store.open("file://store"), 1)
    for url in ("store", "./store", tmp_path / "store", f"file://{tmp_path}/store/"):
        assert Store.open(url).missing(cells) == []


def test_opening_makes_nothing(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    assert store.missing([numbered_cell(0)]) == [numbered_cell(0)]
    assert store.sweep_orphans() == []
    assert not (tmp_path / "store").exists()


def test_an_unknown_kind_of_url_is_named() -> None:
    with pytest.raises(StoreError, match=r"store carrier-pigeon://loft: .*want a folder, file://"):
        Store.open("carrier-pigeon://loft")


def test_a_server_that_is_asked_when_its_store_is_opened_and_has_no_address_is_named() -> None:
    with pytest.raises(StoreError, match=r"store ftp://nowhere\.invalid/x: .*want a folder, file://"):
        Store.open("ftp://nowhere.invalid/x")


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="is a file; name a folder"):
        Store.open(tmp_path / "file")


def test_a_missing_package_is_named_with_how_to_install_it() -> None:
    script = (
        "import sys; sys.modules['s3fs'] = None\n"  # the import fails, installed or not
        "from quee_core.errors import StoreError\n"
        "from quee_core.store import Store\n"
        "try: Store.open('s3://bucket/store')\n"
        "except StoreError as error: print(error)"
    )
    assert "pip install s3fs" in child("-c", script).stdout


# Behind the store's back


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_a_bit(data: bytes) -> bytes:
    return data[:200] + bytes([data[200] ^ 1]) + data[201:]


def foreign_table(_: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table({"a": [1, 2]}), sink)
    return bytes(sink.getvalue().to_pybytes())


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": truncate,
    "one bit": flip_a_bit,
    "empty": lambda _: b"",
    "longer": lambda data: data + b"x",
    "foreign": foreign_table,
}


def assert_set_aside(
    store: Store, place: Place, original: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One thing is in the quarantine, with its reason, and the log and the store's report name it."""
    [noticed] = store.set_aside
    assert reason in noticed.reason
    quarantined = place.files("quarantine")
    assert original in quarantined.values()
    [told] = [json.loads(data) for name, data in quarantined.items() if name.endswith("/reason.json")]
    assert told["reason"] == noticed.reason
    assert noticed.location in told["from"]
    [record] = [record for record in caplog.records if record.name == "quee_core.store"]
    assert record.levelname == "WARNING"
    assert noticed.location in record.getMessage()
    assert noticed.reason in record.getMessage()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_set_aside_named_and_computed_again(
    store: Store, place: Place, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cells = publish(store, 2)
    spoilt = DAMAGE[damage](place.read(place.data(cells[1])))
    place.write(place.data(cells[1]), spoilt)
    assert store.missing(cells) == [cells[1]]
    assert_set_aside(store, place, spoilt, "checksum" if damage == "one bit" else "bytes", caplog)
    assert store.missing(cells) == [cells[1]]
    store.put_table(cells[1], small_table(1))
    assert store.missing(cells) == []
    assert store.get_table(cells[1]).equals(small_table(1))


@pytest.mark.parametrize("damage", DAMAGE)
def test_reading_a_damaged_table_says_so_and_sets_it_aside(
    store: Store, place: Place, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    [cell] = publish(store, 1)
    spoilt = DAMAGE[damage](place.read(place.data(cell)))
    place.write(place.data(cell), spoilt)
    with pytest.raises(DamagedTableError, match=r"bits=2/part-00000.*set aside as quarantine/.*run again"):
        store.get_table(cell)
    assert_set_aside(store, place, spoilt, "checksum" if damage == "one bit" else "bytes", caplog)
    assert store.missing([cell]) == [cell]


@pytest.mark.parametrize("damage", DAMAGE)
def test_putting_over_a_damaged_table_heals_it(store: Store, place: Place, damage: str) -> None:
    [cell] = publish(store, 1)
    place.write(place.data(cell), DAMAGE[damage](place.read(place.data(cell))))
    store.put_table(cell, small_table(0))
    assert store.get_table(cell).equals(small_table(0))
    assert len(store.set_aside) == 1


def test_a_quick_look_trusts_the_contents_but_not_the_size(store: Store, place: Place) -> None:
    cells = publish(store, 3)
    place.write(place.data(cells[0]), flip_a_bit(place.read(place.data(cells[0]))))
    place.write(place.data(cells[1]), truncate(place.read(place.data(cells[1]))))
    assert store.missing(cells, contents=False) == [cells[1]]
    assert store.missing(cells) == cells[:2]


def resign(place: Place, cell: Cell, data: bytes, **changes: object) -> None:
    """Give a cell other data and a manifest that vouches for it."""
    manifest = json.loads(place.read(place.manifest(cell)))
    place.remove(place.data(cell))
    manifest |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} | changes
    place.write(f"{cell.location.removesuffix('.parquet')}.{manifest['sha256'][:16]}.parquet", data)
    place.write(place.manifest(cell), json.dumps(manifest).encode())


def test_a_row_count_that_is_not_the_manifests_is_damage(
    store: Store, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    [cell] = publish(store, 1)
    fewer = to_parquet_bytes(small_table(0).slice(0, 7), {})
    resign(place, cell, fewer)
    assert store.missing([cell]) == [cell]
    assert_set_aside(store, place, fewer, "7 rows, its manifest says 12", caplog)


@pytest.mark.parametrize("data", [b"no Parquet, but the checksum is right", foreign_table(b"")])
def test_another_kind_of_file_that_its_manifest_vouches_for_is_damage(store: Store, place: Place, data: bytes) -> None:
    [cell] = publish(store, 1)
    resign(place, cell, data, rows=2)
    with pytest.raises(DamagedTableError, match="set aside"):
        store.get_table(cell)
    assert store.missing([cell]) == [cell]


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"format": 1, "entry": {}, "sha256": "ab", "bytes": 1, "rows": 1}',
     b'{"format": 2, "entry": {}, "sha256": "' + b"a" * 64 + b'", "bytes": 1, "rows": 1}'],
)  # fmt: skip
def test_an_unreadable_manifest_is_damage(
    store: Store, place: Place, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    [cell] = publish(store, 1)
    place.write(place.manifest(cell), text)
    assert store.missing([cell]) == [cell]
    assert_set_aside(store, place, text, "manifest is unreadable", caplog)
    store.put_table(cell, small_table(0))
    assert store.get_table(cell).equals(small_table(0))


def test_a_table_under_another_cells_name_is_damage(store: Store, place: Place) -> None:
    mine, other = publish(store, 2)
    place.write(place.manifest(mine), place.read(place.manifest(other)))
    assert store.missing([mine, other]) == [mine]
    assert "belongs elsewhere" in store.set_aside[0].reason


def test_a_manifest_without_its_data_is_damage(store: Store, place: Place) -> None:
    cells = publish(store, 2)
    place.remove(place.data(cells[0]))
    with pytest.raises(DamagedTableError, match="its data file is gone"):
        store.get_table(cells[0])
    assert store.missing(cells) == [cells[0]]


@pytest.mark.parametrize("contents", [True, False])
def test_foreign_files_among_the_tables_are_set_aside_by_name(
    store: Store, place: Place, contents: bool, caplog: pytest.LogCaptureFixture
) -> None:
    [cell] = publish(store, 1)
    place.write(cell.location, b"a Parquet file that somebody copied here")
    assert store.missing([cell], contents=contents) == []
    assert_set_aside(store, place, b"a Parquet file that somebody copied here", "quee did not write", caplog)
    assert cell.location not in place.files()
    assert store.get_table(cell).equals(small_table(0))


def test_a_foreign_file_in_the_place_of_a_table_does_not_count_as_one(store: Store, place: Place) -> None:
    cell = numbered_cell(0)
    place.write(cell.location, foreign_table(b""))
    assert store.missing([cell]) == [cell]
    assert [notice.location for notice in store.set_aside] == [cell.location]


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty"])
def test_a_damaged_artefact_is_set_aside_and_counts_as_absent(
    store: Store, place: Place, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = bytes(range(256))
    store.put_artefact("heads", "abc", data)
    [name] = [name for name in place.files("artefacts") if name.endswith(".bin")]
    spoilt = DAMAGE[damage](data)
    place.write(name, spoilt)
    assert store.get_artefact("heads", "abc") is None
    assert_set_aside(store, place, spoilt, "checksum" if damage == "one bit" else "bytes", caplog)
    store.put_artefact("heads", "abc", data)
    assert store.get_artefact("heads", "abc") == data


# Orphans


def make_orphans(store: Store, place: Place) -> tuple[Cell, set[str]]:
    """A whole table, the data of one without a manifest, and an artefact's; on disk a temporary file too."""
    cells = publish(store, 2)
    store.put_artefact("heads", "abc", b"x")
    place.remove(place.manifest(cells[1]))
    place.remove("artefacts/heads/_abc.json")
    orphans = {place.data(cells[1]), *(name for name in place.files("artefacts"))}
    place.write(f"{cells[0].folder}/.part-00000.parquet.4711-0123abcd.partial", b"half")
    return cells[0], {*orphans, f"{cells[0].folder}/.part-00000.parquet.4711-0123abcd.partial"}


def test_orphans_are_removed_and_nothing_else(store: Store, place: Place) -> None:
    cell, orphans = make_orphans(store, place)
    place.write("backbone=micro_vit/readme.parquet", b"another's")
    place.write(f"{cell.folder}/.gitignore", b"*")
    rest = {name: data for name, data in place.files().items() if name not in orphans}
    assert set(store.sweep_orphans(older_than=0)) == orphans
    assert place.files() == rest
    assert store.missing([cell]) == []
    assert store.sweep_orphans(older_than=0) == []


def test_young_files_may_still_have_a_writer(store: Store, place: Place) -> None:
    _, orphans = make_orphans(store, place)
    assert store.sweep_orphans() == []
    assert store.sweep_orphans(older_than=60) == []
    assert orphans <= set(place.files())


def test_age_is_that_of_the_file(tmp_path: Path) -> None:
    store, place = Store.open(tmp_path), Place(str(tmp_path))
    _, orphans = make_orphans(store, place)
    old = sorted(orphans)[0]
    yesterday = (datetime.now(UTC) - timedelta(hours=25)).timestamp()
    os.utime(tmp_path / old, (yesterday, yesterday))
    assert store.sweep_orphans() == [old]


def test_data_that_the_manifest_does_not_name_is_an_orphan(store: Store, place: Place) -> None:
    [cell] = publish(store, 1)
    loser = cell.location.replace(".parquet", ".0123456789abcdef.parquet")
    place.write(loser, b"of a writer that came second")
    assert store.missing([cell]) == []
    assert store.sweep_orphans(older_than=0) == [loser]
    assert store.get_table(cell).equals(small_table(0))


def test_sweeping_a_folder_with_other_things_in_it_touches_none_of_them(store: Store, place: Place) -> None:
    for name in ("thesis.txt", "photos/part-00000-of-00001-aa.0123456789abcdef.parquet", "data/x.0123456789abcdef.bin"):
        place.write(name, b"precious")
    before = place.files()
    assert store.sweep_orphans(older_than=0) == []
    assert place.files() == before


# Disks that refuse


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, warnings being errors there too."""
    run = subprocess.run(
        [sys.executable, "-W", "error", *arguments], env=child_environment(), capture_output=True, text=True,
        timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run


def child_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(quee_core.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("made_before", [True, False])
def test_a_read_only_folder_is_named_with_what_to_do(tmp_path: Path, made_before: bool) -> None:
    folder = tmp_path / "store"
    (folder / numbered_cell(0).folder if made_before else folder).mkdir(parents=True)
    for each in [folder, *folder.rglob("*")]:
        each.chmod(0o555)
    told = child(str(CHILDREN), "unprivileged", str(folder)).stdout
    for each in [folder, *folder.rglob("*")]:
        each.chmod(0o755)
    assert "cannot be written: permission is missing; change the permissions or name another place" in told
    assert str(folder) in told
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_a_disk_that_takes_no_more_is_named_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    told = child(str(CHILDREN), "limited", str(tmp_path), "4096", "table").stdout
    assert "cannot be written: the limit on file sizes is reached" in told
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert Store.open(tmp_path).missing([numbered_cell(0)]) == [numbered_cell(0)]


def test_a_disk_that_is_full_once_the_data_is_written_leaves_no_entry(tmp_path: Path) -> None:
    told = child(str(CHILDREN), "limited", str(tmp_path), "100", "artefact").stdout  # its manifest is longer
    assert "artefacts/heads/abc.bin: cannot be written: the limit on file sizes is reached" in told
    store = Store.open(tmp_path)
    assert store.get_artefact("heads", "abc") is None
    assert len(store.sweep_orphans(older_than=0)) == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_device_is_named_with_what_to_do() -> None:
    says = "store/x: cannot be written: the disk is full; free some space"
    with pytest.raises(StoreError, match=says) as caught, disk_faults("store/x", "written"):
        Path("/dev/full").write_bytes(b"x")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_file_in_the_way_of_a_folder_is_named(store: Store, place: Place) -> None:
    place.write("backbone=micro_vit", b"in the way")
    place.write("artefacts", b"in the way")
    for put in (
        lambda: store.put_table(numbered_cell(0), small_table(0)),
        lambda: store.put_artefact("heads", "abc", b"x"),
    ):
        if place.url.startswith("s3:"):  # which has no folders
            put()
        else:
            with pytest.raises(StoreError, match="a file stands where a folder is needed"):
                put()


def test_a_name_that_is_too_long_for_the_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="too long"):
        Store.open(tmp_path / ("x" * 300)).put_artefact("heads", "abc", b"")


# Writers that do not live to tell


@lru_cache
def expected(number: int) -> pa.Table:
    """What `store_children.py write` publishes as cell `number`."""
    return small_table(number, images=2000, classes=20, embedding=32)


def assert_visible_is_whole(store: Store, cells: list[Cell]) -> int:
    """Every cell that is not missing reads back exactly; nothing was damaged. Returns how many there are."""
    lacking = set(store.missing(cells))
    for number, cell in enumerate(cells):
        if cell in lacking:
            with pytest.raises(StoreError, match="no such table"):
                store.get_table(cell)
        else:
            assert store.get_table(cell).equals(expected(number))
    assert store.set_aside == []
    return len(cells) - len(lacking)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("file", signal.SIGKILL),
        ("file", signal.SIGINT),
        pytest.param("s3", signal.SIGKILL, marks=pytest.mark.xdist_group("s3")),
    ],
)
def test_a_writer_stopped_at_any_moment_leaves_whole_tables_and_its_rerun_completes_them(
    kind: str, how: signal.Signals, request: pytest.FixtureRequest
) -> None:
    place = place_for(kind, request)
    cells = [numbered_cell(number) for number in range(30)]
    finished = 0
    for stop_after, pause in ((2, 0.0), (6, 0.004), (11, 0.011))[kind == "s3" :]:
        finished = max(finished, stopped_while_writing(place.url, how, len(cells), stop_after, pause))
        visible = assert_visible_is_whole(Store.open(place.url), cells)
        assert finished <= visible <= finished + 1  # the one in flight may have become visible
        assert visible < len(cells)
        temporaries = [name for name in place.files() if is_temporary(name.rpartition("/")[2])]
        assert len(temporaries) <= (3 if (kind, how) == ("file", signal.SIGKILL) else 0)
    store = Store.open(place.url)
    for number, cell in enumerate(cells):
        if store.missing([cell]):
            store.put_table(cell, expected(number))
    assert assert_visible_is_whole(store, cells) == len(cells)
    store.sweep_orphans(older_than=0)
    assert len(place.files()) == 2 * len(cells)


def stopped_while_writing(url: str, how: signal.Signals, count: int, stop_after: int, pause: float) -> int:
    """Start a writer, stop it by a signal once it has named `stop_after` tables; returns how many it named."""
    writer = subprocess.Popen(
        [sys.executable, str(CHILDREN), "write", url, str(count)], env=child_environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    stuck = threading.Timer(DEADLINE, writer.kill)
    stuck.start()
    try:
        assert writer.stdout is not None
        for _ in range(stop_after):
            assert writer.stdout.readline(), writer.stderr
        time.sleep(pause)
        writer.send_signal(how)
        rest, _ = writer.communicate()
    finally:
        stuck.cancel()
    assert writer.returncode in (-how, 1, 130)
    return stop_after + len(rest.split())


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_writer_stopped_before_each_single_step_leaves_a_whole_table_or_none(tmp_path: Path, how: str) -> None:
    steps = int(child(str(CHILDREN), "stop-at-each-step", str(tmp_path), how).stdout)
    assert steps >= 6  # two files are opened, renamed, and their folder flushed
    cell, seen = numbered_cell(0), set()
    for step in range(steps + 1):
        store, place = Store.open(tmp_path / str(step)), Place(str(tmp_path / str(step)))
        visible = store.missing([cell]) == []
        seen.add(visible)
        if visible:
            assert store.get_table(cell).equals(small_table(0))
        if how == "interrupt":
            assert not any(is_temporary(name.rpartition("/")[2]) for name in place.files())
        store.put_table(cell, small_table(0))
        store.sweep_orphans(older_than=0)
        assert store.set_aside == []
        assert set(place.files()) == {place.data(cell), place.manifest(cell)}
        assert store.get_table(cell).equals(small_table(0))
    assert seen == {True, False}


def test_processes_that_publish_the_same_cells_at_once_agree(shared_place: Place) -> None:
    count = 12
    child(str(CHILDREN), "race", shared_place.url, "8" if shared_place.url.startswith("file:") else "4", str(count))
    store = Store.open(shared_place.url)
    cells = [numbered_cell(number) for number in range(count)]
    assert store.missing(cells) == []
    for number, cell in enumerate(cells):
        table = store.get_table(cell)
        writer = int(table.schema.metadata[b"quee.writer"])
        assert table.equals(small_table(number if writer else 1000 + number))  # one writer's, not a mixture
    store.sweep_orphans(older_than=0)
    assert len(shared_place.files()) == 2 * count
    assert store.missing(cells) == []
    assert store.set_aside == []


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_file_whose_writing_fails_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, fault: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(fault), whole_file(path) as file:  # noqa: PT012
        file.write(b"half of the n")
        raise fault
    assert path.read_bytes() == b"old"
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        [temporary] = [other for other in tmp_path.iterdir() if other != path]
        assert is_temporary(temporary.name)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
