"""A sweep with its store on S3: the same tables and fronts as on a disk, found again by few requests."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from quee_core.data.parquet_set import ASSETS
from quee_core.errors import DamagedTableError
from quee_core.record import SweepRecord
from quee_core.stages import branches_of, cells_of, extract_branch, outcomes_of
from quee_core.store import Store
from tests.conftest import SmallSweep
from tests.quee_command import CELLS, computed, finished, refused, write_sweep
from tests.s3_gate import S3Gate
from tests.test_store import Place, flip_a_bit


def figures(record: SweepRecord) -> str:
    """All that does not depend on how long something took, as bytes."""
    told = {"fronts", "budgets", "drops", "shares", "calibration", "uniform_accuracies"}
    return record.model_dump_json(include=told)


@pytest.mark.usefixtures("prefect_home")
@pytest.mark.xdist_group("s3")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's
def test_a_sweep_on_s3_gives_the_very_same_and_its_rerun_computes_nothing(tmp_path: Path, s3_gate: S3Gate) -> None:
    on_disk, on_s3, url = tmp_path / "disk", tmp_path / "s3", f"s3://quee{tmp_path}"
    for folder, store in ((on_disk, "store"), (on_s3, url)):
        folder.mkdir()
        write_sweep(folder, run={"store": store})
    record = finished(on_disk)
    assert s3_gate.requests == []

    first = finished(on_s3)
    assert figures(first) == figures(record)
    assert computed(first, "extract") == CELLS
    place = Place(url)
    tables = {name: data for name, data in place.files().items() if name.startswith("backbone=")}
    seals = {name for name in tables if "/_branch-" in name}
    disk = {str(path.relative_to(on_disk / "store")): path for path in on_disk.glob("store/backbone=*/**/*.*")}
    assert {name: path.read_bytes() for name, path in disk.items() if path.is_file()} == {
        name: data for name, data in tables.items() if name not in seals
    }

    s3_gate.requests.clear()
    again = finished(on_s3)
    assert figures(again) == figures(record)
    assert [computed(again, stage) for stage in ("calibrate", "train heads", "extract", "fit the grid")] == [0] * 4
    branches = 6  # three splits, two bit-widths
    assert len(seals) == branches
    looked_at = [request.key.rpartition("/")[2] for request in s3_gate.requests if request.method == "GET"]
    assert sum(name.startswith("_branch-") for name in looked_at) == branches
    assert sum(name.startswith("_part-") for name in looked_at) == CELLS  # once, when they are used
    assert s3_gate.count("LIST") <= branches
    assert s3_gate.count("HEAD") == 0
    assert all(request.key.endswith(".partial") for request in s3_gate.requests if request.method == "PUT")


@pytest.mark.usefixtures("prefect_home")
@pytest.mark.xdist_group("s3")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's
def test_images_on_s3_are_read_piece_by_piece_and_give_the_same_as_those_on_a_disk(
    tmp_path: Path, s3_gate: S3Gate
) -> None:
    on_disk, on_s3, images = tmp_path / "disk", tmp_path / "s3", tmp_path / "images"
    place = Place(f"s3://quee{images}")
    for folder in (on_disk, on_s3, images):
        folder.mkdir()
    for part, source in (("train", "heldout"), ("test", "test")):
        rows = pq.read_table(ASSETS / "fashion_mnist" / f"{source}.parquet").slice(0, 400)
        pq.write_table(rows, images / f"{part}.parquet", row_group_size=50)
        place.fs.pipe_file(f"{place.root}/{part}.parquet", (images / f"{part}.parquet").read_bytes())
    place.fs.pipe_file(f"{place.root}/notes.txt", b"no part of it")
    for folder in (on_disk, on_s3):
        write_sweep(folder, dataset={"name": "parquet", "trained_on": "none"})
    record = finished(on_disk, "--data-root", images)
    s3_gate.requests.clear()
    assert figures(finished(on_s3, "--data-root", place.url)) == figures(record)
    gets = [request for request in s3_gate.requests if request.method == "GET"]
    assert {request.key.rpartition("/")[2] for request in gets} == {"train.parquet", "test.parquet"}
    assert all("Range" in request.headers for request in gets)
    assert s3_gate.count("PUT") == 0

    told = refused(on_s3, "plan", "sweep.yaml", "--data-root", f"s3://quee{tmp_path}/nothing")
    assert f"s3://quee{tmp_path}/nothing holds no .parquet file of labelled images" in told
    assert "there is no such bucket" in refused(on_s3, "plan", "sweep.yaml", "--data-root", "s3://quee-absent/images")
    place.fs.pipe_file(f"{place.root}/test.parquet", (images / "test.parquet").read_bytes()[:-100])
    told = refused(on_s3, "plan", "sweep.yaml", "--data-root", place.url)
    assert f"{place.url}/test.parquet: not a readable Parquet file" in told
    told = refused(on_s3, "plan", "sweep.yaml", "--data-root", "https://example.org/images")
    assert "want s3://bucket/prefix; a folder is given as root" in told
    write_sweep(on_s3)
    told = refused(on_s3, "plan", "sweep.yaml", "--data-root", place.url)
    assert "data set fashion_mnist is read from a folder; copy it there, or use parquet" in told


def test_sealed_tables_that_were_lost_or_damaged_are_computed_again(small_sweep: SmallSweep, tmp_path: Path) -> None:
    """The first pass over the tables finds both, and extraction walks for these two alone."""
    plan, network, exits, calibration = (
        small_sweep.plan, small_sweep.network, small_sweep.exits, small_sweep.calibration,
    )  # fmt: skip
    place = Place(f"memory://{tmp_path}")
    store = Store.open(place.url)
    branches = [
        (shard, cells_of(plan, exits, calibration, split, shard, plan.tree.branch(bits)))
        for split, shard, bits in branches_of(plan)
        if split == "select"
    ]

    def extract() -> list[int]:
        return [extract_branch(plan, store, network, cells, "select", shard).computed for shard, cells in branches]

    for _, cells in branches:
        for cell in cells.values():
            store.put_table(cell, small_sweep.store.get_table(cell))
    assert extract() == [0] * len(branches)
    assert all(store.sealed(list(cells.values())) for _, cells in branches)
    lost, damaged = list(branches[0][1].values())[:2]
    for name in (place.data(lost), place.manifest(lost)):
        place.remove(name)
    place.write(place.data(damaged), flip_a_bit(place.read(place.data(damaged))))
    with pytest.raises(DamagedTableError, match=r"and 1 more"):
        outcomes_of(plan, store, exits, calibration, "select")
    assert len(store.set_aside) == 1
    assert extract() == [2, *[0] * (len(branches) - 1)]
    assert all(store.sealed(list(cells.values())) for _, cells in branches)
    outcomes, _ = outcomes_of(plan, store, exits, calibration, "select")
    assert (outcomes.predicted == small_sweep.select.predicted).all()
