"""Outcomes out of the store's tables; on another machine, too, to which a key is all that is sent.

What a key stands for is an artefact that names the cells of every path. A host assembles them once, into a folder
that all processes on it map.
"""

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path as FilePath

import pyarrow as pa

from quee_core.errors import AbsentTableError, ConfigError, DamagedTableError, StoreError
from quee_core.locks import alone
from quee_core.paths import Path
from quee_core.store import Store
from quee_core.tables import Cell, Outcomes
from quee_core.whole_files import disk_faults, whole_file

KIND = "outcomes"
UNUSED = 24 * 3600.0  # seconds after which another sweep's folder may go

_SUMS = "sums.json"


def publish_cells(store: Store, key: str, cells: Mapping[Path, Sequence[Cell]]) -> None:
    """Say in the store which cells, shard by shard, each path's answers are made of. Raises StoreError."""
    named = [[str(path), [cell.describe() for cell in shards]] for path, shards in cells.items()]
    store.put_artefact(KIND, key, json.dumps(named).encode())


def read_outcomes(store: Store, key: str) -> Outcomes:
    """The outcomes whose cells were published under `key`; each table's checksum is compared on the way.

    Raises StoreError where the store has no such outcomes, and as `outcomes_of_cells`.
    """
    data = store.get_artefact(KIND, key)
    if data is None:
        raise StoreError(f"{store.url}: no outcomes {key[:16]} there; name a store that all workers reach")
    try:
        cells = {Path.parse(path): [_cell(given) for given in shards] for path, shards in json.loads(data)}
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise DamagedTableError(f"outcomes {key[:16]}: not a list of cells that quee wrote: {error}") from None
    return outcomes_of_cells(store, cells)


def outcomes_of_cells(store: Store, cells: Mapping[Path, Sequence[Cell]]) -> Outcomes:
    """All paths' answers, out of the tables of the cells of each, shard by shard.

    Raises DamagedTableError, having set every damaged table among them aside, and also if one is not there.
    """
    with ThreadPoolExecutor(store.readers) as pool:
        wanted = [cell for shards in cells.values() for cell in shards]
        found = iter(list(pool.map(partial(_table_or_fault, store), wanted)))
    parts = {path: list(itertools.islice(found, len(shards))) for path, shards in cells.items()}
    faults = [part for tables in parts.values() for part in tables if isinstance(part, StoreError)]
    if faults:
        raise DamagedTableError(f"{faults[0]}" + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""))
    return Outcomes.from_tables([(path, pa.concat_tables(tables).combine_chunks()) for path, tables in parts.items()])


def _table_or_fault(store: Store, cell: Cell) -> pa.Table | StoreError:
    try:
        return store.get_table(cell)
    except (DamagedTableError, AbsentTableError) as error:
        return error


def mapped_outcomes(store: Store, key: str, folder: FilePath) -> Outcomes:
    """The same, mapped from a folder below `folder`, which is filled from the store if it is not there or not whole.

    Processes that ask at once wait for the first of them. Folders that nobody asked for in a day are removed; who
    has mapped one keeps its arrays. Raises StoreError, DamagedTableError.
    """
    place = folder / key[:32]
    with disk_faults(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / f"{key[:32]}.lock"):
            if not _is_whole(place):
                shutil.rmtree(place, ignore_errors=True)
                _remove_unused(folder)
                read_outcomes(store, key).save(place)
                sums = _sums(place)
                with whole_file(place / _SUMS) as file:
                    file.write(json.dumps(sums).encode())
            os.utime(place)
            return Outcomes.load(place)


def _is_whole(place: FilePath) -> bool:
    try:
        return bool(json.loads((place / _SUMS).read_bytes()) == _sums(place))
    except (FileNotFoundError, ValueError):  # a cleaner of temporary files may be at it at this very moment
        return False


def _sums(place: FilePath) -> dict[str, str]:
    sums = {}
    for path in sorted(place.iterdir()):
        if path.name != _SUMS:
            with path.open("rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _remove_unused(folder: FilePath) -> None:
    for other in [path for path in folder.iterdir() if path.is_dir() and _is_unused(path)]:
        with suppress(BlockingIOError), alone(folder / f"{other.name}.lock", wait=False):  # else it is in use again
            if _is_unused(other):
                shutil.rmtree(other, ignore_errors=True)


def _is_unused(place: FilePath) -> bool:
    try:
        return place.stat().st_mtime < time.time() - UNUSED
    except FileNotFoundError:  # another process has removed it
        return False


def _cell(given: Mapping[str, str | int]) -> Cell:
    return Cell(
        backbone=str(given["backbone"]),
        dataset=str(given["dataset"]),
        split=str(given["split"]),
        path=Path.parse(str(given["path"])),
        shard=int(given["shard"]),
        shards=int(given["shards"]),
        key=str(given["key"]),
    )
