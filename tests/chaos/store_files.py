"""A store's files, read and spoilt behind its back, with what tells whether one was written again."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.s3_server import BUCKET

AWAY = (BotoCoreError, ClientError, OSError)  # how a store tells that it can't be read now
_MANIFEST = re.compile(r"(?P<folder>backbone=.*/|artefacts/.*/)_(?P<stem>(?!branch-)[^/]*)\.json")


class StoreFiles(Protocol):
    """Names are relative to the store's root. Raises one of AWAY where the store is not to be read."""

    url: str

    def versions(self) -> dict[str, str]:
        """Each file with what changes whenever it is written, though the bytes be the same."""

    def read(self, name: str) -> bytes | None:
        """A file's contents; None if it is not there."""

    def write(self, name: str, data: bytes) -> None:
        """Put `data` in the place of a file."""


class FilesOnDisk:
    """A store in a folder."""

    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        self._folder = folder

    def versions(self) -> dict[str, str]:
        found = {}
        for path in self._folder.rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file():
                    status = path.stat()
                    found[path.relative_to(self._folder).as_posix()] = f"{status.st_ino} {status.st_mtime_ns}"
        return found

    def read(self, name: str) -> bytes | None:
        with suppress(FileNotFoundError):
            return (self._folder / name).read_bytes()
        return None

    def write(self, name: str, data: bytes) -> None:
        beside = self._folder / f"{name}.new"
        beside.write_bytes(data)
        beside.rename(self._folder / name)


class FilesOnS3:
    """A store below a prefix of the tests' bucket."""

    def __init__(self, environment: Mapping[str, str], prefix: str) -> None:
        self.url = f"s3://{BUCKET}/{prefix}"
        self._prefix = f"{prefix}/"
        self._client = boto3.client(
            "s3", endpoint_url=environment["AWS_ENDPOINT_URL"], region_name=environment["AWS_DEFAULT_REGION"],
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=10),
        )  # fmt: skip

    def versions(self) -> dict[str, str]:
        found = {}
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=self._prefix):
            for each in page.get("Contents", ()):
                found[each["Key"].removeprefix(self._prefix)] = f"{each['ETag']} {each['LastModified']}"
        return found

    def read(self, name: str) -> bytes | None:
        try:
            return bytes(self._client.get_object(Bucket=BUCKET, Key=self._prefix + name)["Body"].read())
        except self._client.exceptions.NoSuchKey:
            return None

    def write(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=self._prefix + name, Body=data)


@dataclass(frozen=True)
class Shown:
    """An entry that readers of the store see: its manifest, and the data file that it names."""

    manifest: str
    data: str
    sha256: str

    @property
    def kind(self) -> str:
        """`table`, or the kind of an artefact."""
        return "table" if self.manifest.startswith("backbone=") else self.manifest.split("/")[1]


def manifests(names: Mapping[str, str]) -> list[str]:
    """Those of `names` that make an entry visible."""
    return [name for name in names if _MANIFEST.fullmatch(name)]


def shown(files: StoreFiles, manifest: str) -> Shown | None:
    """The entry that a manifest makes visible; None if it has just gone."""
    match = _MANIFEST.fullmatch(manifest)
    assert match
    text = files.read(manifest)
    if text is None:
        return None
    sha256 = str(json.loads(text)["sha256"])
    suffix = "parquet" if manifest.startswith("backbone=") else "bin"
    return Shown(manifest, f"{match['folder']}{match['stem']}.{sha256[:16]}.{suffix}", sha256)


def is_whole(files: StoreFiles, entry: Shown) -> bool:
    """Whether the data is there, and what the manifest says."""
    data = files.read(entry.data)
    return data is not None and hashlib.sha256(data).hexdigest() == entry.sha256


def whole_entries(files: StoreFiles) -> Iterator[tuple[Shown, tuple[str, str]]]:
    """Every entry that is visible and whole, with the versions of its two files."""
    versions = files.versions()
    for name in manifests(versions):
        entry = shown(files, name)
        if entry is not None and entry.data in versions and is_whole(files, entry):
            yield entry, (versions[name], versions[entry.data])
