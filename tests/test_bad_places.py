"""Damaged tables, places that cannot be written to, disks that fill, and sweeps that are stopped on the way.

The command says what is the matter and where, loses nothing that was finished, and, given again, goes on from there.
"""

import hashlib
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import full_sweep
from flows.prefect_server import OwnServer
from quee_core.config import RunConfig, load_config
from quee_core.errors import StoreError, fault_behind
from quee_core.record import SweepRecord
from quee_core.runs import read_record, write_record
from quee_core.store import Manifest
from tasks.grid_cluster import check_cluster
from tests.prefect_server import prefect_server
from tests.quee_command import (
    CELLS,
    SweepProcess,
    computed,
    finished,
    leftovers,
    only_error,
    quee,
    refused,
    whole_tables,
    write_sweep,
)

pytestmark = [
    pytest.mark.usefixtures("prefect_home"),
    pytest.mark.xdist_group("bad places"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's
]
FINISHED_IS_KEPT = "what is finished is in the store; the same command continues"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepRecord]:
    """The folder of a finished sweep, which stays as it is, and its record."""
    folder = tmp_path_factory.mktemp("first")
    write_sweep(folder)
    record = finished(folder)
    assert computed(record, "extract") == len(whole_tables(folder / "store")) == CELLS
    return folder, record


def test_the_fault_behind_an_error_of_prefects_is_found() -> None:
    """Its server's database may be on the same full disk, so that its own error hides ours."""
    with pytest.raises(ValueError, match="500") as caught:  # noqa: PT012
        try:
            try:
                raise StoreError("the disk is full")
            except StoreError:
                raise RuntimeError("the server cannot note it") from None
        except RuntimeError as error:
            raise ValueError("500") from error
    assert str(fault_behind(caught.value)) == "the disk is full"
    assert fault_behind(ValueError("a bug")) is None


# Damaged tables


def altered(data: Path, _: Path) -> None:
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def of_another_shape(data: Path, _: Path) -> None:
    pq.write_table(pa.table({"x": range(60)}), data)


def unreadable_manifest(_: Path, manifest: Path) -> None:
    manifest.write_text("{")


def of_another_shape_as_if_it_were_ours(data: Path, manifest: Path) -> None:
    """Checksum, size and rows are right, so only who reads the columns can tell."""
    pq.write_table(pa.table({"x": range(60)}), data)
    vouch_for(data, manifest)


def of_another_path_as_if_it_were_ours(data: Path, manifest: Path) -> None:
    """A sound feature table of the very same images; that it is another path's stands in its metadata alone."""
    other = next(path for path in data.parent.parent.glob("*/*.parquet") if path.parent != data.parent)
    data.write_bytes(other.read_bytes())
    vouch_for(data, manifest)


def vouch_for(data: Path, manifest: Path) -> None:
    content = data.read_bytes()
    stated = Manifest.model_validate_json(manifest.read_bytes())
    stated = stated.model_copy(update={"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)})
    manifest.write_text(stated.model_dump_json())
    data.rename(data.with_name(f"{manifest.stem.removeprefix('_')}.{stated.sha256[:16]}.parquet"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (altered, "its checksum is not that of its manifest"),
        (of_another_shape, "bytes, its manifest says"),
        (unreadable_manifest, "its manifest is unreadable"),
        (of_another_shape_as_if_it_were_ours, "column 'sample_id' is missing"),
        (of_another_path_as_if_it_were_ours, "its file belongs elsewhere: path is '2-2-2-2', not '4-4-4-4'"),
    ],
)
def test_damaged_tables_are_set_aside_by_name_and_computed_again(
    first: tuple[Path, SweepRecord], tmp_path: Path, damage: Callable[[Path, Path], None], reason: str
) -> None:
    """One of `target` and one of `select`, so that the second shows only after the first was mended."""
    folder, record = first
    shutil.copytree(folder / "store", tmp_path / "store")
    write_sweep(tmp_path)
    untouched = whole_tables(tmp_path / "store")
    damaged = []
    for split in ("target", "select"):
        [data] = tmp_path.glob(f"store/backbone=*/*/split={split}/exit=4/bits=4-4-4-4/*.parquet")
        [manifest] = data.parent.glob("_*.json")
        damage(data, manifest)
        damaged.append(manifest)
        del untouched[data]

    done = quee(tmp_path, "sweep", "sweep.yaml", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    again = SweepRecord.model_validate_json(done.stdout)
    assert computed(again, "extract") == 2
    assert computed(again, "calibrate") == computed(again, "train heads") == computed(again, "fit the grid") == 0
    assert (again.fronts, again.budgets, again.grid) == (record.fronts, record.budgets, record.grid)
    for manifest in damaged:
        [line] = [line for line in done.stderr.splitlines() if line.startswith(f"WARNING: {manifest}: ")]
        assert reason in line
        told, _, place = line.partition("; set aside as ")
        assert told
        assert (Path(place) / manifest.name).is_file()
    assert "Traceback" not in done.output
    assert "error: " not in done.output
    tables = whole_tables(tmp_path / "store")
    assert len(tables) == CELLS
    assert untouched.items() <= tables.items()


def test_a_foreign_file_among_the_tables_is_set_aside_by_name(first: tuple[Path, SweepRecord], tmp_path: Path) -> None:
    folder, record = first
    shutil.copytree(folder / "store", tmp_path / "store")
    write_sweep(tmp_path)
    [place] = tmp_path.glob("store/backbone=*/*/split=test/exit=8/bits=4-4-4-4-4-4-4-4")
    foreign = place / "part-of-something-else.parquet"
    pq.write_table(pa.table({"x": range(60)}), foreign)
    content = foreign.read_bytes()
    done = quee(tmp_path, "sweep", "sweep.yaml", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    assert f"WARNING: {foreign}: a file that quee did not write; set aside as " in done.stderr
    assert [path.read_bytes() for path in tmp_path.glob(f"store/quarantine/*/{foreign.name}")] == [content]
    again = SweepRecord.model_validate_json(done.stdout)
    assert computed(again, "extract") == 0
    assert (again.fronts, again.budgets) == (record.fronts, record.budgets)


def test_what_of_the_grid_failed_is_told(first: tuple[Path, SweepRecord], tmp_path: Path) -> None:
    _, record = first
    bad = record.grid[1].model_copy(update={"failure": "features hold NaN", "winner": False})
    write_record(record.model_copy(update={"grid": (record.grid[0], bad)}), tmp_path / "runs" / "partly")
    shown = quee(tmp_path, "report", "partly")
    assert shown.exit_code == 0
    assert "note: 1 of 2 grid points could not be fitted; the first, logistic with K = 5: features hold" in shown.output


# Places that cannot be written to


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("no folder")
    return path


@pytest.mark.parametrize("option", ["store", "runs"])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/below", "a file stands where a folder is needed; move it or name another place"),
        ("/proc/quee", "there is no such place, and it cannot be made; name another place"),  # also to root
        ("/dev/null", "a file stands where a folder is needed"),
    ],
)
@pytest.mark.usefixtures("file")
def test_a_place_that_cannot_be_written_is_told_before_anything_is_computed(
    tmp_path: Path, option: str, place: str, message: str
) -> None:
    write_sweep(tmp_path, run={option: place})
    told = refused(tmp_path, "sweep", "sweep.yaml")
    assert place in told
    assert message in told
    assert not list(tmp_path.glob("store/*/*"))
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("file")
def test_where_only_the_tracking_fails_the_report_is_there_and_the_command_says_so(
    first: tuple[Path, SweepRecord], tmp_path: Path
) -> None:
    folder, record = first
    shutil.copytree(folder / "store", tmp_path / "store")
    write_sweep(tmp_path, run={"mlflow_uri": f"sqlite:///{tmp_path}/file/mlflow.db"})
    told = refused(tmp_path, "sweep", "sweep.yaml")
    assert told.startswith(f"MLflow at sqlite:///{tmp_path}/file/mlflow.db: "), told
    assert f"the sweep is finished, its report is {tmp_path}/runs/small/report.html; mend this and run" in told
    assert (tmp_path / "runs" / "small" / "report.html").is_file()
    assert read_record(tmp_path / "runs" / "small" / "record.json").fronts == record.fronts


def test_places_are_looked_at_once_also_in_a_run_that_no_command_started(
    first: tuple[Path, SweepRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[RunConfig] = []

    def look(run: RunConfig) -> None:
        looks.append(run)
        check_cluster(run)

    monkeypatch.setattr(full_sweep, "check_cluster", look)  # the last of them
    folder, _ = first
    shutil.copytree(folder / "store", tmp_path / "store")
    write_sweep(tmp_path)
    finished(tmp_path)
    assert len(looks) == 1

    monkeypatch.chdir(tmp_path)
    sweep = load_config(tmp_path / "sweep.yaml")
    OwnServer()
    assert Path(full_sweep.full_sweep(sweep)).is_file()  # as a worker does
    assert len(looks) == 2
    file = sweep.model_copy(update={"run": sweep.run.model_copy(update={"store": "/dev/null"})})
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        full_sweep.full_sweep(file)


def test_a_home_of_prefect_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", "/proc/quee")
    write_sweep(tmp_path)
    assert refused(tmp_path, "sweep", "sweep.yaml").startswith("/proc/quee: cannot be written: there is no such place")


def test_a_disk_without_room_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    """Under a limit on file sizes, which stops a write as a full disk does, half way and with an error number."""
    write_sweep(tmp_path)
    limit = 1_000_000
    with SweepProcess(tmp_path, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) as sweep:
        code, output = sweep.ended()
    assert code == 2, output
    told = only_error(output)
    assert "the limit on file sizes is reached; raise it (ulimit -f) and run again, what is finished is kept" in told
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["sweep.yaml"]


def test_a_disk_that_fills_on_the_way_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    write_sweep(tmp_path, run={"shard_images": 20})
    with SweepProcess(tmp_path) as sweep:
        sweep.wait_for_tables(3)
        _, most = resource.prlimit(sweep.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(sweep.pid, resource.RLIMIT_FSIZE, (1, most))
        code, output = sweep.ended()
    assert code == 2, output
    assert "cannot be written: the limit on file sizes is reached" in only_error(output)
    assert_the_same_command_continues(tmp_path, most=3 * CELLS)


# Stopped on the way


def assert_the_same_command_continues(folder: Path, most: int) -> None:
    before = whole_tables(folder / "store")
    assert 3 <= len(before) < most
    record = finished(folder)
    after = whole_tables(folder / "store")
    assert before.items() <= after.items()  # the very files: not written again
    assert len(after) == most
    assert computed(record, "extract") == most - len(before)
    assert computed(record, "calibrate") == computed(record, "train heads") == 0


@pytest.mark.parametrize(
    ("number", "code", "how"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_sweep_that_is_interrupted_says_so_and_continues(
    tmp_path: Path, number: signal.Signals, code: int, how: str
) -> None:
    write_sweep(tmp_path, run={"shard_images": 10, "batch": 5})
    with SweepProcess(tmp_path) as sweep:
        sweep.wait_for_tables(3)
        sweep.send(number)
        ended, output = sweep.ended()
    assert ended == code, output
    assert output.splitlines()[-1] == f"{how}: {FINISHED_IS_KEPT}"
    assert "extract: stopped, " in output
    assert "Traceback" not in output
    assert "ERROR" not in output
    assert leftovers(tmp_path) == []
    assert_the_same_command_continues(tmp_path, most=6 * CELLS)


def test_a_sweep_that_is_killed_continues(tmp_path: Path) -> None:
    write_sweep(tmp_path, run={"shard_images": 20, "batch": 10})
    with SweepProcess(tmp_path) as sweep:
        sweep.wait_for_tables(3)
        sweep.send(signal.SIGKILL)
        ended, output = sweep.ended()
    assert ended == -signal.SIGKILL, output
    assert_the_same_command_continues(tmp_path, most=3 * CELLS)


@pytest.mark.parametrize("asked_to_end", [False, True])
def test_a_sweep_whose_prefect_server_goes_away_ends_by_one_line_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_to_end: bool
) -> None:
    """By itself after a while, or when asked to; Prefect would be asked in vain for minutes, and keep the process."""
    write_sweep(tmp_path, run={"shard_images": 10, "batch": 5})
    impatient = (
        "from flows import cli; cli.quiet_surroundings(False); "
        "from flows import server_watch; server_watch.AWAY = 20; cli.main()"
    )
    with monkeypatch.context() as patch, prefect_server(tmp_path / "prefect") as server:
        for name in ("PREFECT_API_URL", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"):
            patch.setenv(name, server.environment[name])
        with SweepProcess(tmp_path, command=(sys.executable, "-c", impatient)) as sweep:
            sweep.wait_for_tables(3)
            server.kill()
            if asked_to_end:
                sweep.send(signal.SIGTERM)
            code, output = sweep.ended()
    *_, last = output.splitlines()
    if asked_to_end:
        assert (code, last) == (143, f"terminated: {FINISHED_IS_KEPT}")
    else:
        assert code == 2, output
        assert only_error(output).startswith(f"Prefect's server at {server.url} has not answered for 2")
    assert "Traceback" not in output
    assert output.count("Unable to connect to") <= 1, output
    assert_the_same_command_continues(tmp_path, most=6 * CELLS)
