"""Encoded images to pixels."""

import io
import struct
import zlib

from PIL import Image, UnidentifiedImageError

from quee_core.errors import DataError

# What Pillow's format readers raise on bytes that are damaged; the list is longer than its documentation's.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def decode(encoded: bytes, where: str) -> Image.Image:
    """The image that `encoded` holds (its first frame), with its pixels in memory and no file left open.

    Raises DataError that begins with `where` if it cannot be decoded in full.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except UnidentifiedImageError:
        reason = "no image format that Pillow knows" if encoded else "no bytes"
        raise DataError(f"{where}: image cannot be decoded: {reason}; replace or remove it") from None
    except _DAMAGED as error:
        raise DataError(f"{where}: image cannot be decoded: {error}; replace or remove it") from None
    return image
