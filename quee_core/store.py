"""The content-addressed store: entries that are whole or absent, on a disk or at a URL (design, section 5).

An entry is a data file whose name ends in the checksum of its contents, and a manifest, written last and in one step,
that makes it visible. Two writers of one entry can therefore not mix: each has a data file of its own unless both
wrote the same bytes, and the manifest names one of them: the first, where the place can create a file only if there is
none (S3, and a disk with hard links). What does not match its manifest is set aside under `quarantine/`, named in the
log, and computed again. A writer that is killed leaves at most a file that nobody reads, which `sweep_orphans` removes.

At a URL every look costs a request. A branch whose tables are all there is therefore sealed: one file names them, so
that a rerun asks for that file alone. The seal is a note, not the truth: a table is checked whenever it is read, and
one that is damaged or gone takes the seals of its branch away.
"""

import hashlib
import logging
import os
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

import pyarrow as pa
from pydantic import ValidationError

from quee_core.entries import (
    ARTEFACTS,
    DATA_NAME,
    Entry,
    Manifest,
    artefact_entry,
    basename,
    branch_of,
    check_size,
    is_strange,
    parse_manifest,
    seals_of,
    table_entry,
    table_in,
    whole_data,
)
from quee_core.errors import AbsentTableError, DamagedTableError
from quee_core.fingerprints import canonical_json
from quee_core.places import PATIENCE, READ_AT_ONCE, Place, open_place
from quee_core.tables import SCHEMA_VERSION, Cell, check_table, to_parquet_bytes
from quee_core.whole_files import is_temporary

__all__ = ["ORPHAN_AGE", "QUARANTINE", "Manifest", "SetAside", "Store"]

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine"
ORPHAN_AGE = 24 * 3600.0  # seconds; a file this old that no manifest names has no writer any more


@dataclass(frozen=True)
class SetAside:
    """A damaged or foreign file that was moved out of the way: where it was, why, and the folder where it is."""

    location: str
    reason: str
    quarantined: str


class Store:
    """Tables by cell and artefacts by key, in one place. Threads, processes and hosts may share it.

    `set_aside` tells what this object has moved to the quarantine, in order.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self.set_aside: list[SetAside] = []

    @classmethod
    def open(cls, url: str | os.PathLike[str], *, patience: float = PATIENCE) -> "Store":
        """The store at a folder or URL (file://, memory://, s3://); nothing is made before something is put.

        patience: seconds for which a step is tried again that a server did not answer, or refused for the moment;
        then StoreUnreachableError is raised, which a later try may not meet.
        Endpoint, region and credentials of s3:// are those that AWS's own tools use: AWS_ENDPOINT_URL and the like.
        Raises StoreError for a kind of URL that is unknown or lacks its package, one that holds credentials, or a file
        where the folder should be.
        """
        return cls(open_place(os.fspath(url), patience=patience))

    @property
    def url(self) -> str:
        """Where the store is, in full: what opens it from any working folder."""
        return self._place.url

    @property
    def readers(self) -> int:
        """How many threads reading at once serve best: one on a disk, several where each read waits for a server."""
        return READ_AT_ONCE if self._place.remote else 1

    def check_room(self, size: int) -> None:
        """See that the store takes a file, on a local disk one of `size` bytes; none is left behind.

        Raises StoreError that names the store's root.
        """
        self._place.check_room(size)

    def put_table(self, cell: Cell, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
        """Publish a cell's table, whole or not at all. One that is there and whole is kept: the first writer wins.

        The file's metadata states cell, schema version and rows, and `metadata` under names that begin with "quee.".
        Raises StoreError for a full or read-only disk, DamagedTableError if `table` is no feature table.
        """
        check_table(table)
        facts = {name: str(value) for name, value in cell.describe().items()} | {
            "schema_version": str(SCHEMA_VERSION),
            "rows": str(table.num_rows),
        }
        facts |= {f"quee.{name}": value for name, value in (metadata or {}).items()}
        self._publish(table_entry(cell), to_parquet_bytes(table, facts), rows=table.num_rows)

    def get_table(self, cell: Cell) -> pa.Table:
        """A cell's table: checksum and rows compared with the manifest, columns with the schema, its cell with `cell`.

        Raises DamagedTableError that names a damaged one and the reason, having set it aside; AbsentTableError if
        there is none; StoreError if it can't be read.
        """
        entry = table_entry(cell)
        shown = self._place.shown(entry.location)
        try:
            found = self._read(entry)
            table = None if found is None else table_in(cell, found)
        except DamagedTableError as error:
            self._unseal(cell)
            target = self._quarantine_entry(entry, str(error))
            raise DamagedTableError(
                f"{shown}: {error}; set aside as {target}, run again to compute the table anew"
            ) from error
        if table is None:
            self._unseal(cell)
            raise AbsentTableError(f"{shown}: no such table in the store; run the sweep again to compute it")
        return table

    def missing(self, cells: Sequence[Cell], *, contents: bool = True) -> list[Cell]:
        """The cells without a whole table, in order; each folder is listed once.

        contents: read the tables and compare their checksums; else only manifests are read, and sizes compared.
        What is damaged, and foreign files among the tables, are set aside on the way. Raises StoreError if the store
        can't be read, or a damaged file not be set aside.
        """
        absent: set[Cell] = set()
        folders: dict[str, list[Cell]] = defaultdict(list)
        for cell in dict.fromkeys(cells):
            folders[cell.folder].append(cell)
        for folder, members in folders.items():
            sizes = self._place.attempt(folder, "listed", partial(self._place.sizes, folder))
            for name in sorted(filter(is_strange, sizes)):
                self._quarantine([f"{folder}/{name}"], "a file that quee did not write")
            listed = [cell for cell in members if basename(table_entry(cell).manifest) in sizes]
            absent.update(set(members) - set(listed))
            absent.update(self._not_whole(listed, None if contents else sizes))
        return [cell for cell in cells if cell in absent]

    def sealed(self, cells: Sequence[Cell]) -> bool:
        """Whether each branch among `cells` is sealed with these very tables, found by one read a branch.

        Never on a local disk, where looking at the tables themselves costs little. Raises StoreError.
        """
        return self._place.remote and all(self._bytes(seal.location) == seal.text.encode() for seal in seals_of(cells))

    def seal(self, cells: Sequence[Cell]) -> None:
        """Note for each branch among `cells`, all of whose tables must be there, that they are. Raises StoreError."""
        for seal in seals_of(cells) if self._place.remote else ():
            self._place.attempt(seal.location, "written", partial(self._place.put, seal.location, seal.text.encode()))

    def put_artefact(self, kind: str, key: str, data: bytes) -> None:
        """Publish bytes under a kind and a key, whole or not at all; what is there and whole is kept.

        kind, key: letters, digits, '.', '_' and '-', at most 128; ValueError otherwise. Raises StoreError.
        """
        self._publish(artefact_entry(kind, key), data, rows=None)

    def get_artefact(self, kind: str, key: str) -> bytes | None:
        """What `put_artefact` published, or None if there is nothing whole; a damaged one is set aside.

        Raises StoreError if the store can't be read.
        """
        entry = artefact_entry(kind, key)
        try:
            return self._read(entry)
        except DamagedTableError as error:
            self._quarantine_entry(entry, str(error))
            return None

    def sweep_orphans(self, *, older_than: float = ORPHAN_AGE) -> list[str]:
        """Remove what killed writers left, older than `older_than` seconds; returns where it was.

        That is temporary files, and data files that no manifest names. Only files with names that the store gives,
        in its own folders, are touched. A writer still at work is younger. Raises StoreError.
        """
        oldest = datetime.now(UTC) - timedelta(seconds=older_than)
        found = self._place.attempt("", "listed", lambda: list(self._own_folders()))
        orphans = [location for folder, names in found for location in self._orphans(folder, names)]
        return [at for at in orphans if self._place.attempt(at, "swept", partial(self._remove_old, at, oldest))]

    def _remove_old(self, location: str, oldest: datetime) -> bool:
        written = self._place.modified(location)
        return written is not None and written <= oldest and self._place.remove(location)

    def _publish(self, entry: Entry, data: bytes, *, rows: int | None) -> None:
        sha256 = hashlib.sha256(data).hexdigest()
        manifest = Manifest(entry=entry.identity, sha256=sha256, bytes=len(data), rows=rows)
        try:
            if self._read(entry) is not None:
                logger.debug("%s: there already", entry.location)
                return
        except DamagedTableError as error:
            self._quarantine_entry(entry, str(error))

        def write() -> None:
            self._place.put(entry.data(sha256), data)
            if not self._place.create(entry.manifest, canonical_json(manifest.model_dump()).encode()):
                logger.debug("%s: another writer was first", entry.location)

        self._place.attempt(entry.location, "written", write)

    def _read(self, entry: Entry) -> bytes | None:
        """A whole entry's data; None if there is none. Raises DamagedTableError with the reason, StoreError."""
        text = self._bytes(entry.manifest)
        if text is None:
            return None
        manifest = parse_manifest(entry, text)
        return whole_data(manifest, self._bytes(entry.data(manifest.sha256)))

    def _not_whole(self, cells: Sequence[Cell], sizes: Mapping[str, int] | None) -> Iterator[Cell]:
        """Those of `cells` whose entry is gone or damaged; the damaged ones are set aside.

        sizes: of the files of their folder, if these are to be compared instead of the contents.
        """
        entries = {cell: table_entry(cell) for cell in cells}
        manifests: dict[Cell, Manifest] = {}
        for cell, text in zip(cells, self._place.read_many([e.manifest for e in entries.values()]), strict=True):
            if text is None:
                yield cell
                continue
            try:
                manifests[cell] = parse_manifest(entries[cell], text)
            except DamagedTableError as error:
                self._quarantine_entry(entries[cell], str(error))
                yield cell
        places = [entries[cell].data(manifest.sha256) for cell, manifest in manifests.items()]
        found = self._place.read_many(places) if sizes is None else (self._size(place, sizes) for place in places)
        for (cell, manifest), data in zip(manifests.items(), found, strict=True):
            try:
                if isinstance(data, int):
                    check_size(manifest, data)
                else:
                    whole_data(manifest, data)
            except DamagedTableError as error:
                self._quarantine_entry(entries[cell], str(error))
                yield cell

    def _size(self, location: str, sizes: Mapping[str, int]) -> int | None:
        # a table published while the folder was listed may show there without its data
        name = basename(location)
        return (
            sizes[name] if name in sizes else self._place.attempt(location, "read", partial(self._place.size, location))
        )

    def _bytes(self, location: str) -> bytes | None:
        return self._place.attempt(location, "read", partial(self._place.read, location))

    def _own_folders(self) -> Iterator[tuple[str, set[str]]]:
        """Folders of tables and artefacts with the names of the files in them; nothing else below the root."""
        for name in self._place.folders():
            if name == ARTEFACTS or name.startswith("backbone="):
                yield from self._place.tree(name)

    def _orphans(self, folder: str, names: set[str]) -> Iterator[str]:
        """Temporary files of a folder that holds `names`, and data files that no manifest names."""
        data = {name: match for name in names if (match := DATA_NAME.fullmatch(name))}
        rivals = Counter(match["stem"] for match in data.values())
        for name in sorted(names):
            if is_temporary(name):
                yield f"{folder}/{name}"
            elif match := data.get(name):
                manifest = f"_{match['stem']}.json"
                # a manifest beside one data file names that one, or shows as damaged when it is read
                if manifest not in names or (
                    rivals[match["stem"]] > 1 and not self._names(f"{folder}/{manifest}", match)
                ):
                    yield f"{folder}/{name}"

    def _names(self, manifest: str, data: re.Match[str]) -> bool:
        text = self._bytes(manifest)
        try:
            return text is not None and Manifest.model_validate_json(text).sha256.startswith(data["sum"])
        except ValidationError:
            logger.debug("%s: unreadable, so the data files beside it are kept", manifest)
            return True

    def _unseal(self, cell: Cell) -> None:
        """Take away every seal of a cell's branch, whatever other tables it names: `seal` writes it anew."""
        if not self._place.remote:
            return
        folder, branch = branch_of(cell)
        for name in self._place.attempt(folder, "listed", partial(self._place.sizes, folder)):
            if name.startswith(branch):
                location = f"{folder}/{name}"
                self._place.attempt(location, "removed", partial(self._place.remove, location))

    def _quarantine_entry(self, entry: Entry, reason: str) -> str:
        """Set aside an entry: its manifest first, so that it is invisible at once, then the data that it names."""
        files = [entry.manifest]
        # where the manifest is unreadable, its data is an orphan now
        with suppress(ValidationError):
            files.append(entry.data(Manifest.model_validate_json(self._bytes(entry.manifest) or b"").sha256))
        return self._quarantine(files, reason)

    def _quarantine(self, locations: Sequence[str], reason: str) -> str:
        """Move files to a folder of their own in the quarantine, with the reason; returns that folder."""
        target = f"{QUARANTINE}/{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        doing = f"set aside, though it should be ({reason})"

        def move(location: str) -> bool:
            return self._place.move(location, f"{target}/{basename(location)}")

        moved = [at for at in locations if self._place.attempt(at, doing, partial(move, at))]
        if moved:
            told = canonical_json({"from": moved, "reason": reason}).encode()
            self._place.attempt(moved[0], doing, lambda: self._place.put(f"{target}/reason.json", told))
            self.set_aside.append(SetAside(moved[0], reason, target))
            logger.warning("%s: %s; set aside as %s", self._place.shown(moved[0]), reason, self._place.shown(target))
        return target
