"""Finished runs on disk: a folder for each, with its record and its report."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quee_core.errors import ConfigError, StoreError, did_you_mean, first_misfit
from quee_core.fingerprints import fingerprint
from quee_core.record import Registration, SweepRecord
from quee_core.redaction import redacted
from quee_core.whole_files import disk_faults, whole_file

RECORD = "record.json"
REPORT = "report.html"
REGISTRATION = "registration.json"
TRACKING_LOCK = ".tracking.lock"  # held by the process that tracks or registers the run
ROUTER = "router"
ROUTER_MANIFEST = "router.json"


def report_path(folder: Path) -> Path:
    """Where a run's report lies."""
    return folder / REPORT


def router_folder(folder: Path) -> Path:
    """Where a run's deployable router lies."""
    return folder / ROUTER


def remove_other_folders(parent: Path, kept: Iterable[Path]) -> None:
    """Remove the folders in `parent` that are not among `kept`. Raises StoreError where one can't be removed."""
    wanted = set(kept)
    with disk_faults(parent, "cleaned up"):
        for folder in parent.iterdir():
            if folder.is_dir() and folder not in wanted:
                shutil.rmtree(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, making its folder. Raises StoreError for a full or read-only disk."""
    with disk_faults(path, "written"), whole_file(path) as file:
        file.write(text.encode())


def write_record(record: SweepRecord, folder: Path) -> Path:
    """Write `record` into `folder`; returns the file."""
    path = folder / RECORD
    write_text(path, record.model_dump_json(indent=2))
    return path


def read_record(path: Path) -> SweepRecord:
    """Read a record. Raises StoreError that names file and field if it is none."""
    try:
        return SweepRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise StoreError(
            f"{path}: not a record of this version of quee: {first_misfit(error)}; run its sweep again to write it anew"
        ) from None


def record_digest(record: SweepRecord) -> str:
    """Fingerprint of what a sweep found, whenever and however fast it found it, and whatever the passwords were."""
    measured: dict[str, Any] = {"created": True, "timings": True, "baselines": {"__all__": {"seconds"}}}
    return fingerprint(redacted(record.model_dump(mode="json", exclude=measured)))


def write_registration(registration: Registration, folder: Path) -> None:
    """Write what became of a run's router into its `folder`. Raises StoreError for a full or read-only disk."""
    write_text(folder / REGISTRATION, registration.model_dump_json(indent=2))


def forget_registration(folder: Path) -> None:
    """Remove what a run of the same name left: it was another router. Raises StoreError where it cannot be removed."""
    with disk_faults(folder / REGISTRATION, "removed"):
        (folder / REGISTRATION).unlink(missing_ok=True)


def read_registration(folder: Path) -> Registration | None:
    """What `write_registration` wrote into a run's folder; None if there is nothing of the kind."""
    try:
        return Registration.model_validate_json((folder / REGISTRATION).read_bytes())
    except (OSError, ValidationError):
        return None


def find_router(run: str, runs: Path) -> Path:
    """The router folder of a run given by name or folder, or that folder itself.

    Raises ConfigError with near names if there is none.
    """
    for candidate in (Path(run), Path(run) / ROUTER, runs / run / ROUTER):
        if (candidate / ROUTER_MANIFEST).is_file():
            return candidate
    known = [path.parent.parent.name for path in runs.glob(f"*/{ROUTER}/{ROUTER_MANIFEST}")]
    hint = (
        did_you_mean(run, known)
        if known
        else f"{runs.resolve()} holds no router; `quee sweep` writes one for each run, --runs names its folder"
    )
    raise ConfigError(f"run {run!r}: no router in {runs}; {hint}")


def find_record(run: str, runs: Path) -> tuple[SweepRecord, Path]:
    """The record of a run given by name, folder or file, and its folder.

    Raises ConfigError with near names if there is no such run.
    """
    for candidate in (Path(run), Path(run) / RECORD, runs / run / RECORD):
        if candidate.is_file():
            return read_record(candidate), candidate.parent
    known = [path.parent.name for path in runs.glob(f"*/{RECORD}")]
    hint = (
        did_you_mean(run, known)
        if known
        else f"{runs.resolve()} holds no finished run; start one with `quee sweep`, or name its folder with --runs"
    )
    raise ConfigError(f"run {run!r}: not found in {runs}; {hint}")
