"""Glyphs: letters and digits in many faces, bent, blurred, crossed out and noisy; drawn by a seed, not stored.

An image depends on its id alone, so that the set has as many images as anyone wants, all under one licence.
"""

from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from quee_core.data.datasets import DatasetDescription, ImageDataset

CLASSES = tuple("0123456789ABCDEFGHIJKLMNPQRSTUVWXYZ")  # no O, which some faces draw as they draw 0
SIDE = 28
FINE = 2 * SIDE  # strokes are drawn at twice the size, and averaged down
FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10",
    "cmti10",
)  # fmt: skip
TRAINING = range(100_000, 200_000)  # ids of the images that the bundled backbone was trained on
PARTS: Mapping[str, range] = MappingProxyType(
    {"train": TRAINING[:6_000], "heldout": range(10_000), "test": range(10_000, 20_000)}
)


class GlyphSet(ImageDataset):
    """The parts `train`, of what the bundled backbone was trained on, and `heldout` and `test`, which it never saw.

    6,000 and twice 10,000 images. An image is drawn when it is first asked for, and kept: 20 MB if all are.
    """

    def __init__(self) -> None:
        self.description = DatasetDescription(
            "glyphs", CLASSES, tuple(PARTS), "test", "train", "MIT; faces: DejaVu, STIX and Computer Modern",
            "drawn by quee",
        )  # fmt: skip

    def sample_ids(self, part: str) -> NDArray[np.int64]:
        """See `ImageDataset`."""
        return np.array(PARTS[part], np.int64)

    def labels(self, part: str) -> NDArray[np.int16]:
        """See `ImageDataset`."""
        return glyph_labels(self.sample_ids(part))

    def image(self, part: str, position: int) -> Image.Image:
        """See `ImageDataset`."""
        return Image.fromarray(self._drawn[PARTS[part][position]])

    def content(self, part: str, position: int) -> bytes:
        """See `ImageDataset`."""
        return self._drawn[PARTS[part][position]].tobytes()

    @cached_property
    def _drawn(self) -> "_Drawn":
        return _Drawn()


class _Drawn(dict[int, NDArray[np.uint8]]):
    """Images by id."""

    def __missing__(self, number: int) -> NDArray[np.uint8]:
        self[number] = _draw(number)
        return self[number]


def glyph_labels(ids: NDArray[np.int64]) -> NDArray[np.int16]:
    """Class of the image of each id, int16 [n]."""
    return np.array([_generator(number).integers(len(CLASSES)) for number in ids.tolist()], np.int16)


def draw_glyphs(ids: range) -> NDArray[np.uint8]:
    """Grey images uint8 [n, 28, 28], one for each id."""
    return np.stack([_draw(number) for number in ids])


def _generator(number: int) -> np.random.Generator:
    return np.random.default_rng([20_241_124, number])


def _draw(number: int) -> NDArray[np.uint8]:
    rng = _generator(number)
    label = int(rng.integers(len(CLASSES)))
    ink = np.asarray(_glyph(CLASSES[label], rng, rng.uniform(-5, 5, 2)), np.float32)
    for _ in range(int(rng.integers(0, 4))):
        # parts of neighbours, as in a line of text that was cut apart badly
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(26, 38)
        away = distance * np.array([np.cos(angle), np.sin(angle)])
        ink = np.maximum(ink, np.asarray(_glyph(CLASSES[int(rng.integers(len(CLASSES)))], rng, away), np.float32))
    ink = np.maximum(ink, np.asarray(_lines(rng), np.float32))
    fine = Image.fromarray(ink.astype(np.uint8)).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.0, 2.2))))
    share = np.asarray(fine.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255
    paper, contrast = rng.uniform(30, 225), rng.uniform(50, 160)
    sign = 1.0 if paper + contrast < 255 and (paper < contrast or rng.random() < 0.5) else -1.0
    grey = paper + sign * contrast * share + rng.normal(0, rng.uniform(4, 28), share.shape)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def _glyph(character: str, rng: np.random.Generator, centre: NDArray[np.float64]) -> Image.Image:
    """One character, bent, its middle moved by `centre` fine pixels."""
    face = _face(FACES[int(rng.integers(len(FACES)))], int(rng.integers(30, 47)))
    canvas = Image.new("L", (FINE, FINE))
    left, top, right, bottom = face.getbbox(character)
    ImageDraw.Draw(canvas).text(((FINE - left - right) / 2, (FINE - top - bottom) / 2), character, fill=255, font=face)
    turn, shear = np.deg2rad(np.clip(rng.normal(0, 14), -32, 32)), rng.uniform(-0.3, 0.3)
    scale = np.diag(1 / rng.uniform(0.7, 1.2, 2))
    bent = scale @ np.array([[np.cos(turn), np.sin(turn) + shear], [-np.sin(turn), np.cos(turn)]])
    middle = np.full(2, FINE / 2)
    offset = middle - bent @ (middle + centre)
    coefficients = (bent[0, 0], bent[0, 1], offset[0], bent[1, 0], bent[1, 1], offset[1])
    return canvas.transform((FINE, FINE), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def _lines(rng: np.random.Generator) -> Image.Image:
    canvas = Image.new("L", (FINE, FINE))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 3))):
        ends = rng.uniform(0, FINE, 4).tolist()
        pen.line(ends, fill=int(rng.integers(120, 256)), width=int(rng.integers(1, 5)))
    return canvas


@lru_cache(maxsize=len(FACES) * 20)
def _face(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)
