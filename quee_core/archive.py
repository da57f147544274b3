"""Named arrays and settings in one safetensors file: how fitted things are stored, without pickle."""

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from quee_core.errors import DamagedTableError

Arrays = dict[str, NDArray[Any]]


def pack(arrays: Mapping[str, NDArray[Any]], settings: Mapping[str, Any], *, kind: str) -> bytes:
    """`arrays` (any shapes, plain dtypes) and `settings` (plain JSON values) as bytes that `unpack` reads back.

    The same contents give the same bytes. `kind` says what the archive is, and is checked when it is read.
    """
    # one entry: safetensors writes several in no fixed order
    header = {"quee": json.dumps({"kind": kind, "settings": settings}, sort_keys=True)}
    return bytes(save({name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}, metadata=header))


def unpack(data: bytes, *, kind: str) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and settings of an archive of `kind`. Raises DamagedTableError if `data` is anything else."""
    try:
        arrays: Arrays = load(data)
        (length,) = struct.unpack_from("<Q", data)  # safetensors: header length, then the header as JSON
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["quee"])
        if header["kind"] != kind:
            raise DamagedTableError(f"archive of kind {header['kind']!r} where {kind!r} is wanted")
        settings: dict[str, Any] = header["settings"]
    except (SafetensorError, ValueError, KeyError, struct.error) as error:
        raise DamagedTableError(f"not an archive of {kind!r} that quee wrote: {error}") from None
    return arrays, settings
