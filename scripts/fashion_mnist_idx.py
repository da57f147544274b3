"""Fashion-MNIST as published (idx files), and the training images that are held out from the backbone."""

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
OFFICIAL_TRAIN_IMAGES = 60_000
HELDOUT_PER_CLASS = 1_000
HELDOUT_SEED = 20240614
TRAINED_PER_CLASS = 600
TRAINED_SEED = 20261125


def read_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images uint8 [n, 28, 28] and labels uint8 [n] of `split` ("train" or "t10k") in file order."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels


def heldout_indices(labels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Positions of 1,000 images a class, sorted: kept from the backbone's training, shipped with quee."""
    return _of_each_class(labels, np.arange(len(labels)), HELDOUT_PER_CLASS, HELDOUT_SEED)


def trained_indices(labels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Positions of 600 images a class, sorted, that the backbone was trained on: exit heads learn from them."""
    rest = np.setdiff1d(np.arange(len(labels)), heldout_indices(labels))
    return _of_each_class(labels, rest, TRAINED_PER_CLASS, TRAINED_SEED)


def _of_each_class(labels: NDArray[np.uint8], among: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(among[labels[among] == label], count, replace=False) for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
