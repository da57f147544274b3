"""Ten rounds of `make chaos`, one of each hindrance; and that what watches over them would see what must not be."""

import subprocess
import sys
from pathlib import Path

import pytest

from quee_core.store import Store
from tests.chaos.hindrances import HINDRANCES
from tests.chaos.store_files import FilesOnDisk
from tests.chaos.watcher import Watcher
from tests.dask_cluster import ROOT, wait_until
from tests.feature_tables import numbered_cell, small_table

SEED = 0


@pytest.mark.xdist_group("chaos")
def test_whatever_is_killed_or_hindered_the_same_command_ends_with_the_same_fronts(tmp_path: Path) -> None:
    rounds = len(HINDRANCES)
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--rounds", str(rounds), "--seed", str(SEED), "--folder", tmp_path],
        cwd=ROOT, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    for hindrance in HINDRANCES:
        rows = [line for line in done.stdout.splitlines() if f"  {hindrance.name}  " in line]
        assert len([line for line in rows if " before " not in line]) == 1, f"{hindrance.name} befell no sweep"


@pytest.fixture
def files(tmp_path: Path) -> FilesOnDisk:
    """Of a store of three tables."""
    store = Store.open(tmp_path)
    for number in range(3):
        store.put_table(numbered_cell(number), small_table(number))
    return FilesOnDisk(tmp_path)


def watched(watcher: Watcher) -> list[str]:
    """What it has seen after two more looks."""
    looks = watcher.looks
    wait_until(lambda: watcher.looks >= looks + 2, "the watcher does not look")
    return watcher.violations


def test_the_watcher_sees_a_table_that_is_not_whole(files: FilesOnDisk) -> None:
    with Watcher(files) as watcher:
        assert watched(watcher) == []
        assert watcher.seen == {"table": 3}
        one, other, _ = sorted(name for name in files.versions() if name.endswith(".parquet"))
        watcher.spoil(one, b"half")
        assert watched(watcher) == []  # it was told
        data = files.read(other)
        assert data
        files.write(other, data[:-1])
        [seen] = watched(watcher)
        assert "visible, and its data is not what it says" in seen


def test_the_watcher_sees_a_table_that_is_published_again(files: FilesOnDisk) -> None:
    with Watcher(files) as watcher:
        assert watched(watcher) == []
        manifest = next(name for name in files.versions() if name.endswith(".json"))
        data = files.read(manifest)
        assert data
        files.write(manifest, data)
        assert watched(watcher) == [f"{manifest}: published again"]
