"""Faults that a user can mend: one line on the command line. Anything else is a bug and keeps its traceback."""

import difflib
from collections.abc import Iterable
from typing import TypeVar

from pydantic import ValidationError

E = TypeVar("E", bound=BaseException)


class QueeError(Exception):
    """Says what was wrong, where, and what to do about it; ends a command with `exit_code`. passes: a later try, with
    nothing changed, can succeed.
    """

    exit_code = 2
    passes = False


class ConfigError(QueeError):
    """A sweep configuration, or a command-line option, that cannot be run."""


class InvalidPathError(ConfigError):
    """A path or path tree that names impossible bit-widths or exits."""


class DataError(QueeError):
    """A data set that is missing, unreadable or inconsistent; names the file or sample."""


class MissingDataError(DataError):
    """Files of a data set that are not where they are expected."""


class PackedDataError(MissingDataError):
    """Files of a data set lie in archives that have to be unpacked first."""


class BackboneError(QueeError):
    """An unknown backbone, or one that cannot be cut as asked."""


class CheckpointError(BackboneError):
    """A weights file that is damaged, unsafe to load, or made for another model."""


class MissingWeightsError(CheckpointError):
    """Weights that are not where they are expected, or that nobody named."""


class QuantizationError(QueeError):
    """A layer or calibration that cannot be quantised as asked."""


class ShapeMismatchError(QueeError):
    """Arrays that should describe the same images or paths and do not."""


class NumericError(QueeError):
    """Values that are not numbers where numbers are needed; names the place."""


class StoreError(QueeError):
    """A store that cannot be read or written."""


class StoreUnreachableError(StoreError):
    """A store whose server does not answer, or refuses for the moment."""

    passes = True


class AbsentTableError(StoreError):
    """A table that is asked for and not in the store."""


class DamagedTableError(StoreError):
    """A stored table or artefact whose contents are not what its manifest says."""


class DeviceError(QueeError):
    """A compute device that this machine does not have."""


class ServerError(QueeError):
    """A server that a sweep needs and that does not start or answer."""


class ServerUnreachableError(ServerError):
    """A server that was lost, or does not answer for the moment."""

    passes = True


def fault_behind(error: BaseException) -> QueeError | None:
    """The fault of ours that `error` arose from; None if there is none."""
    return first_behind(error, QueeError)


def first_behind(error: BaseException, kind: type[E]) -> E | None:
    """The first exception of `kind` among `error` and what it arose from, by causes and contexts; None if none is."""
    behind, seen = [error], set[int]()
    while behind:
        at = behind.pop()
        if isinstance(at, kind):
            return at
        seen.add(id(at))
        behind += [e for e in (at.__context__, at.__cause__) if e is not None and id(e) not in seen]
    return None


def first_misfit(error: ValidationError) -> str:
    """The first field of a stored document that is not as its model wants it, and why."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "the file"
    return f"{place}: {first['msg']}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause that names the nearest known names, or all of them where none is near."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    shown = ", ".join(options[:20]) + (", …" if len(options) > 20 else "")
    return f"known: {shown}"
