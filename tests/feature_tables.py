"""Small feature tables and their cells, the same in every process that asks for the same ones."""

import numpy as np
import pyarrow as pa

from quee_core.fingerprints import fingerprint
from quee_core.paths import Path
from quee_core.tables import Cell, feature_table

PATHS = tuple(Path(bits) for bits in ((2,), (4,), (8,), (2, 2), (4, 2), (4, 4), (8, 2), (8, 4), (8, 8), (32, 32)))


def small_table(number: int = 0, *, images: int = 12, classes: int = 5, embedding: int = 3) -> pa.Table:
    """Answers to `images` images; `number` names the answers, not the images."""
    images_rng, rng = np.random.default_rng(images), np.random.default_rng(number)
    return feature_table(
        np.arange(100, 100 + images),
        images_rng.integers(0, classes, images).astype(np.int16),
        rng.normal(0, 3, (images, classes)).astype(np.float32),
        rng.normal(0, 3, (images, embedding)).astype(np.float32),
    )


def numbered_cell(number: int) -> Cell:
    """Cell `number`: over the paths first, then over shards."""
    shard, which = divmod(number, len(PATHS))
    return Cell("micro_vit", "fashion_mnist", "test", PATHS[which], shard, 1000, fingerprint(number))
