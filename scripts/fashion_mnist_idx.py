"""Fashion-MNIST as published (idx files), and the training images that are held out from the backbone."""

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
OFFICIAL_TRAIN_IMAGES = 60_000
HELDOUT_PER_CLASS = 1_000
HELDOUT_SEED = 20240614


def read_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images uint8 [n, 28, 28] and labels uint8 [n] of `split` ("train" or "t10k") in file order."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels


def heldout_indices(labels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Positions of 1,000 images a class, sorted: kept from the backbone's training, shipped with quee."""
    rng = np.random.default_rng(HELDOUT_SEED)
    chosen = [
        rng.choice(np.flatnonzero(labels == label), HELDOUT_PER_CLASS, replace=False) for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(chosen))
