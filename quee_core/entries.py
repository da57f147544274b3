"""Entries of the store: where each lies, the manifest that makes it visible, and the checks that it is whole."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quee_core.errors import DamagedTableError, first_misfit
from quee_core.fingerprints import canonical_json, fingerprint
from quee_core.tables import Cell, from_parquet_bytes

ARTEFACTS = "artefacts"
DATA_NAME = re.compile(r"(?P<stem>.+)\.(?P<sum>[0-9a-f]{16})\.(?P<kind>parquet|bin)")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TABLE_DATA = re.compile(r"part-[0-9]{5,}-of-[0-9]{5,}-[0-9a-f]{20}\.[0-9a-f]{16}\.parquet")
_TABLE_MANIFEST = re.compile(r"_part-[0-9]{5,}-of-[0-9]{5,}-[0-9a-f]{20}\.json")


class Manifest(BaseModel):
    """What makes an entry visible: whose it is, and what its data file must be."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    entry: dict[str, str | int]
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    rows: int | None = Field(ge=0)  # None for an artefact


@dataclass(frozen=True)
class Entry:
    """Where an entry lies, and what its manifest must say it is."""

    folder: str
    stem: str
    suffix: str
    identity: dict[str, str | int]

    @property
    def manifest(self) -> str:
        """The manifest's file."""
        # readers of Parquet folders pass over names with an underscore
        return f"{self.folder}/_{self.stem}.json"

    def data(self, sha256: str) -> str:
        """The data file of these contents."""
        return f"{self.folder}/{self.stem}.{sha256[:16]}{self.suffix}"

    @property
    def location(self) -> str:
        """What the entry is called in messages."""
        return f"{self.folder}/{self.stem}{self.suffix}"


@dataclass(frozen=True)
class Seal:
    """That the tables of a branch are whole: a file that names them. `text` tells it from every other set of tables."""

    folder: str
    branch: str
    text: str

    @property
    def location(self) -> str:
        """Its file, beside the folders of the branch's tables."""
        return f"{self.folder}/{self.branch}{fingerprint(self.text)[:20]}.json"


def table_entry(cell: Cell) -> Entry:
    """The entry of a cell's table."""
    return Entry(cell.folder, basename(cell.location).removesuffix(".parquet"), ".parquet", cell.describe())


def artefact_entry(kind: str, key: str) -> Entry:
    """The entry of an artefact. Raises ValueError for names that could lead out of its folder."""
    for what, name in (("kind", kind), ("key", key)):
        if not _NAME.fullmatch(name):
            raise ValueError(f"artefact {what} {name!r}: want 1 to 128 letters, digits, '.', '_' and '-'")
    return Entry(f"{ARTEFACTS}/{kind}", key, ".bin", {"kind": kind, "key": key})


def branch_of(cell: Cell) -> tuple[str, str]:
    """Folder of the seals of a cell's branch (split, image shard, first bit-width), and how their names begin."""
    folder = cell.folder.rsplit("/", 2)[0]  # above exit= and bits=
    return folder, f"_branch-{cell.shard:05d}-of-{cell.shards:05d}-first-{cell.path.bits[0]}-"


def seals_of(cells: Iterable[Cell]) -> list[Seal]:
    """The seal of each branch that `cells` belong to."""
    branches: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for cell in cells:
        branches.setdefault(branch_of(cell), set()).add((str(cell.path), cell.key))
    return [
        Seal(folder, branch, canonical_json({"format": 1, "tables": sorted(tables)}))
        for (folder, branch), tables in branches.items()
    ]


def is_strange(name: str) -> bool:
    """Whether quee would give no file in a folder of tables this name; hidden files are other programs' business."""
    # a data file without its manifest may be in the making
    return not (_TABLE_DATA.fullmatch(name) or _TABLE_MANIFEST.fullmatch(name) or name.startswith("."))


def parse_manifest(entry: Entry, text: bytes) -> Manifest:
    """The manifest of `entry`. Raises DamagedTableError with the reason if `text` is none, or another entry's."""
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise DamagedTableError(f"its manifest is unreadable at {first_misfit(error)}") from error
    for field, value in entry.identity.items():
        if (stated := manifest.entry.get(field)) != value:
            raise DamagedTableError(f"its manifest belongs elsewhere: {field} is {stated!r}, not {value!r}")
    return manifest


def check_size(manifest: Manifest, size: int | None) -> None:
    """Raises DamagedTableError unless there is a data file, of the size that its manifest states."""
    if size is None:
        raise DamagedTableError("its data file is gone")
    if size != manifest.bytes:
        raise DamagedTableError(f"{size} bytes, its manifest says {manifest.bytes}")


def whole_data(manifest: Manifest, data: bytes | None) -> bytes:
    """`data`, if it is all that its manifest states. Raises DamagedTableError with the reason."""
    check_size(manifest, None if data is None else len(data))
    data = data or b""
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        raise DamagedTableError("its checksum is not that of its manifest")
    if manifest.rows is not None:
        try:
            rows = pq.read_metadata(pa.BufferReader(data)).num_rows
        except (pa.ArrowException, OSError) as error:
            raise DamagedTableError(f"not a Parquet file: {str(error).splitlines()[0]}") from error
        if rows != manifest.rows:
            raise DamagedTableError(f"{rows} rows, its manifest says {manifest.rows}")
    return data


def table_in(cell: Cell, data: bytes) -> pa.Table:
    """The table in a Parquet file of `cell`. Raises DamagedTableError with the reason if it is another one."""
    table = from_parquet_bytes(data)
    stated = table.schema.metadata or {}
    for field, value in cell.describe().items():
        if (found := stated.get(field.encode())) != str(value).encode():
            name = "missing" if found is None else repr(found.decode(errors="replace"))
            raise DamagedTableError(f"its file belongs elsewhere: {field} is {name}, not {str(value)!r}")
    return table


def basename(path: str) -> str:
    """The last part of a path."""
    return path.rpartition("/")[2]
