"""Outcomes on another machine: read from the store by key, kept in a folder of the host, and never used damaged."""

import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from quee_core.errors import DamagedTableError, StoreError
from quee_core.paths import Path as BitPath
from quee_core.shared_outcomes import KIND, UNUSED, mapped_outcomes, publish_cells, read_outcomes
from quee_core.store import Store
from quee_core.tables import Cell, Outcomes
from tests.feature_tables import PATHS, small_table

KEY = "ab" * 32


def cell_of(path: BitPath, shard: int) -> Cell:
    return Cell("micro_vit", "fashion_mnist", "target", path, shard, 2, f"{shard}{path.exit}" + "0" * 38)


@pytest.fixture
def published(tmp_path: Path) -> tuple[Store, Outcomes]:
    """A store with the tables of three paths in two shards each, and what they make together."""
    store, cells, tables = Store.open(tmp_path / "store"), {}, []
    for number, path in enumerate(PATHS[2:5]):
        cells[path] = [cell_of(path, shard) for shard in range(2)]
        parts = [small_table(number, images=10 + shard) for shard in range(2)]
        for cell, table in zip(cells[path], parts, strict=True):
            store.put_table(cell, table)
        tables.append((path, pa.concat_tables(parts)))
    publish_cells(store, KEY, cells)
    return store, Outcomes.from_tables(tables)


def assert_same(found: Outcomes, wanted: Outcomes) -> None:
    assert found.paths == wanted.paths
    for name in ("sample_ids", "labels", "predicted", "errors", "uncertainty", "top_p", "top_class", "embedding"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def test_what_was_published_is_read_back_and_mapped(published: tuple[Store, Outcomes], tmp_path: Path) -> None:
    store, wanted = published
    assert_same(read_outcomes(store, KEY), wanted)
    mapped = mapped_outcomes(store, KEY, tmp_path / "host")
    assert_same(mapped, wanted)
    assert isinstance(mapped.embedding, np.memmap)


def test_a_host_reads_the_store_once(published: tuple[Store, Outcomes], tmp_path: Path) -> None:
    store, wanted = published
    mapped_outcomes(store, KEY, tmp_path / "host")
    for path in (tmp_path / "store").rglob("*.parquet"):
        path.unlink()
    assert_same(mapped_outcomes(store, KEY, tmp_path / "host"), wanted)


def test_several_processes_at_once_fill_one_folder(published: tuple[Store, Outcomes], tmp_path: Path) -> None:
    store, wanted = published
    with multiprocessing.get_context("fork").Pool(4) as pool:
        inodes = pool.starmap(_mapped_inode, [(store.url, str(tmp_path / "host"))] * 8)
    assert len(set(inodes)) == 1
    assert_same(mapped_outcomes(store, KEY, tmp_path / "host"), wanted)


def _mapped_inode(url: str, folder: str) -> int:
    mapped_outcomes(Store.open(url), KEY, Path(folder))
    return (Path(folder) / KEY[:32] / "embedding.npy").stat().st_ino


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "unfinished"])
def test_what_a_host_keeps_is_read_anew_if_it_is_not_whole(
    published: tuple[Store, Outcomes], tmp_path: Path, damage: str
) -> None:
    store, wanted = published
    mapped_outcomes(store, KEY, tmp_path / "host")
    file = tmp_path / "host" / KEY[:32] / ("sums.json" if damage == "unfinished" else "errors.npy")
    data = bytearray(file.read_bytes())
    if damage == "changed":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-5])
    else:
        file.unlink()
    assert_same(mapped_outcomes(store, KEY, tmp_path / "host"), wanted)


def test_damage_in_the_store_and_a_store_without_them_are_named(
    published: tuple[Store, Outcomes], tmp_path: Path
) -> None:
    store, _ = published
    with pytest.raises(StoreError, match="nowhere: no outcomes abababababababab there; name a store that all workers"):
        mapped_outcomes(Store.open(tmp_path / "nowhere"), KEY, tmp_path / "host")
    store.put_artefact(KIND, "cd" * 32, b"[[1]]")
    with pytest.raises(DamagedTableError, match="outcomes cdcdcdcdcdcdcdcd: not a list of cells that quee wrote"):
        read_outcomes(store, "cd" * 32)
    [table, *_] = sorted((tmp_path / "store").rglob("*.parquet"))
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(DamagedTableError, match=r"set aside as .*, run again"):
        mapped_outcomes(store, KEY, tmp_path / "host")


def test_folders_that_nobody_asked_for_in_a_day_are_removed(published: tuple[Store, Outcomes], tmp_path: Path) -> None:
    store, _ = published
    host = tmp_path / "host"
    for name, age in (("old", 2 * UNUSED), ("young", UNUSED / 2)):
        (host / name).mkdir(parents=True)
        os.utime(host / name, (time.time() - age,) * 2)
    mapped_outcomes(store, KEY, host)
    assert {path.name for path in host.iterdir() if path.is_dir()} == {"young", KEY[:32]}


def test_a_folder_that_somebody_reads_again_after_a_day_is_not_taken_from_under_him(
    published: tuple[Store, Outcomes], tmp_path: Path
) -> None:
    store, wanted = published
    host, place = tmp_path / "host", tmp_path / "host" / KEY[:32]
    mapped = mapped_outcomes(store, KEY, host)
    named = store.get_artefact(KIND, KEY)
    assert named is not None
    others = [f"{number:02d}" * 32 for number in range(2)]
    for other in others:
        store.put_artefact(KIND, other, named)
    os.utime(place, (time.time() - 2 * UNUSED,) * 2)

    with (host / f"{KEY[:32]}.lock").open("wb") as reader:
        fcntl.flock(reader, fcntl.LOCK_EX)  # as who checks and maps the folder does
        mapped_outcomes(store, others[0], host)
        assert (place / "errors.npy").is_file()
    mapped_outcomes(store, others[1], host)
    assert not place.exists()
    assert_same(mapped, wanted)  # who has mapped it keeps it
    assert_same(mapped_outcomes(store, KEY, host), wanted)  # and who comes later reads it anew
