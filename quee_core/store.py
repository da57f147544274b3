"""The content-addressed store: tables and artefacts that are whole or absent, over any fsspec file system (design, section 5).

An entry is its file and, written after it, a manifest that states the file's sha256 and size. Without its manifest a
file is not an entry; with one that does not match, it is set aside under `quarantine/`, named in the log, and
computed again.
"""

import errno
import hashlib
import io
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from quee_core.errors import DamagedTableError, StoreError
from quee_core.tables import SCHEMA_VERSION, Cell, check_table

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine"
MANIFEST = ".manifest.json"
PARTIAL = ".partial"
ORPHAN_AGE = 24 * 3600.0  # seconds; a temporary file this old has no writer any more


@dataclass(frozen=True)
class SetAside:
    """A damaged or foreign file that was moved out of the way."""

    location: str
    reason: str


class Store:
    """Tables by cell and artefacts by key, below one root."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        self._local = isinstance(fs, LocalFileSystem)
        self.set_aside: list[SetAside] = []

    @classmethod
    def open(cls, url: str) -> "Store":
        """The store at a folder or URL (file://, memory://, s3://). Raises StoreError if it can't be reached."""
        try:
            fs, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise StoreError(f"store {url}: {error}; for s3:// install s3fs") from None
        except ValueError as error:
            raise StoreError(f"store {url}: {error}; want a folder, file://, memory:// or s3://") from None
        return cls(fs, root)

    def put_table(self, cell: Cell, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
        """Publish a cell's table, whole or not at all; publishing it again changes nothing.

        Raises StoreError for a full or read-only disk, DamagedTableError if `table` is no feature table.
        """
        check_table(table)
        facts = {
            "schema_version": str(SCHEMA_VERSION), "key": cell.key, "backbone": cell.backbone, "dataset": cell.dataset,
            "split": cell.split, "path": str(cell.path), "rows": str(table.num_rows),
        } | {f"quee.{name}": value for name, value in (metadata or {}).items()}  # fmt: skip
        buffer = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(facts), buffer, compression="zstd")
        self._publish(cell.location, buffer.getvalue(), {"key": cell.key, "rows": table.num_rows})

    def get_table(self, cell: Cell) -> pa.Table:
        """A cell's table. A damaged one is set aside; raises DamagedTableError that names it and the reason.

        Raises StoreError if there is none.
        """
        data = self._entry(cell.location, cell.key)
        if data is None:
            raise StoreError(
                f"{self._full(cell.location)}: no such table in the store; run the sweep again to compute it"
            )
        try:
            table = pq.read_table(io.BytesIO(data))
            check_table(table)
            rows = self._manifest(cell.location)["rows"]
            if table.num_rows != rows:
                raise DamagedTableError(f"{table.num_rows} rows, its manifest says {rows}")
        except (pa.ArrowException, OSError, DamagedTableError) as error:
            self._quarantine(cell.location, f"not a table that quee wrote: {str(error).splitlines()[0]}")
            raise DamagedTableError(
                f"{self._full(cell.location)}: {error}; set aside under {QUARANTINE}, run again to recompute it"
            ) from None
        return table

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells without a whole table, in order; each folder is listed once, each table's checksum compared.

        Damaged and foreign files in the place of a table are set aside on the way.
        """
        listed: dict[str, set[str]] = {}
        absent = []
        for cell in cells:
            if cell.folder not in listed:
                listed[cell.folder] = self._names(cell.folder)
                self._reject_strangers(cell.folder, listed[cell.folder])
            name = cell.location.rpartition("/")[2]
            if name not in listed[cell.folder] or self._entry(cell.location, cell.key) is None:
                absent.append(cell)
        return absent

    def put_artefact(self, kind: str, key: str, data: bytes) -> None:
        """Publish bytes under a kind and a key, whole or not at all. Raises StoreError."""
        self._publish(f"artefacts/{kind}/{key}", data, {"key": key})

    def get_artefact(self, kind: str, key: str) -> bytes | None:
        """What `put_artefact` published, or None if there is nothing whole; a damaged one is set aside."""
        return self._entry(f"artefacts/{kind}/{key}", key)

    def sweep_orphans(self, *, older_than: float = ORPHAN_AGE) -> list[str]:
        """Remove temporary files and files without a manifest that are older than `older_than` seconds; names them.

        They are what a killed writer leaves; a writer that is still at work is younger.
        """
        removed = []
        for path, info in self._fs.find(self._root, detail=True).items():
            name = path[len(self._root) + 1 :]
            if name.startswith(QUARANTINE) or time.time() - _modified(info) < older_than:
                continue
            if name.endswith(PARTIAL) or not (name.endswith(MANIFEST) or self._fs.exists(path + MANIFEST)):
                self._fs.rm_file(path)
                removed.append(name)
        return removed

    def _publish(self, location: str, data: bytes, facts: Mapping[str, Any]) -> None:
        manifest = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), **facts}
        try:
            self._put(location, data)
            self._put(location + MANIFEST, json.dumps(manifest, sort_keys=True).encode())
        except OSError as error:
            raise StoreError(f"{self._full(location)}: cannot be written ({_reason(error)})") from None

    def _put(self, location: str, data: bytes) -> None:
        path = self._full(location)
        if not self._local:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data)  # one put of the finished object
            return
        folder = path.rpartition("/")[0]
        os.makedirs(folder, exist_ok=True)  # noqa: PTH103
        partial = f"{folder}/.{uuid.uuid4().hex}{PARTIAL}"  # beside its target: another folder may be another disk
        try:
            with open(partial, "xb") as file:  # noqa: PTH123
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)  # noqa: PTH105
        finally:
            if os.path.exists(partial):  # noqa: PTH110
                os.unlink(partial)  # noqa: PTH108

    def _entry(self, location: str, key: str) -> bytes | None:
        """A whole entry's bytes; None if there is none. One that does not match its manifest is set aside."""
        try:
            manifest = self._manifest(location)
            data: bytes = self._fs.cat_file(self._full(location))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError) as error:
            self._quarantine(location, f"manifest is not readable: {error}")
            return None
        except OSError as error:
            raise StoreError(f"{self._full(location)}: cannot be read ({_reason(error)})") from None
        if manifest["key"] != key:
            self._quarantine(location, f"made for key {manifest['key']}, not {key}")
        elif len(data) != manifest["bytes"] or hashlib.sha256(data).hexdigest() != manifest["sha256"]:
            self._quarantine(location, f"{len(data)} bytes whose checksum is not that of its manifest")
        else:
            return data
        return None

    def _manifest(self, location: str) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads(self._fs.cat_file(self._full(location + MANIFEST)))
        for field in ("sha256", "bytes", "key"):
            manifest[field]
        return manifest

    def _names(self, folder: str) -> set[str]:
        try:
            listing = self._fs.ls(self._full(folder), detail=False, refresh=True)
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise StoreError(f"{self._full(folder)}: cannot be listed ({_reason(error)})") from None
        return {path.rstrip("/").rpartition("/")[2] for path in listing}

    def _reject_strangers(self, folder: str, names: set[str]) -> None:
        """Set aside Parquet files that no writer of ours named; files without a manifest may still be in the making."""
        for name in sorted(names):
            if name.endswith(".parquet") and not name.startswith("part-"):
                self._quarantine(f"{folder}/{name}", "a file that quee did not write")

    def _quarantine(self, location: str, reason: str) -> None:
        target = f"{QUARANTINE}/{location.replace('/', '__')}.{uuid.uuid4().hex[:8]}"
        try:
            self._fs.makedirs(self._full(QUARANTINE), exist_ok=True)
            for suffix in ("", MANIFEST):
                if self._fs.exists(self._full(location + suffix)):
                    self._fs.mv(self._full(location + suffix), self._full(target + suffix))
        except FileNotFoundError:
            logger.info("%s: another process set it aside first", self._full(location))
        except OSError as error:
            raise StoreError(f"{self._full(location)}: damaged, and cannot be set aside ({_reason(error)})") from None
        self.set_aside.append(SetAside(location, reason))
        logger.warning("%s: set aside as %s: %s; it is computed again", self._full(location), target, reason)

    def _full(self, location: str) -> str:
        return f"{self._root}/{location}"


def _reason(error: OSError) -> str:
    advice = {
        errno.ENOSPC: "the disk is full; free some space, what is finished is kept",
        errno.EDQUOT: "the quota is used up; free some space, what is finished is kept",
        errno.EFBIG: "the file size limit is reached; raise it (ulimit -f), what is finished is kept",
        errno.EROFS: "the file system is read-only; name another store with --store",
        errno.EACCES: "no permission; name another store with --store",
        errno.EPERM: "not permitted; name another store with --store",
        errno.ENOTDIR: "a file stands where a folder is needed; name another store with --store",
    }
    return advice.get(error.errno or 0, str(error))


def _modified(info: Mapping[str, Any]) -> float:
    stamp = info.get("mtime", info.get("created", info.get("LastModified", 0.0)))
    return float(stamp.timestamp()) if hasattr(stamp, "timestamp") else float(stamp)
