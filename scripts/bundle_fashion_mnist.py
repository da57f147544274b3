"""Make the Fashion-MNIST files that quee ships, out of the published ones.

    apt-get install dataset-fashion-mnist
    python scripts/bundle_fashion_mnist.py

heldout.parquet holds 1,000 training images a class, which scripts/train_micro_vit.py leaves out; train.parquet 600 of
those that it trains on; test.parquet the official test images. Images are PNG. A sample_id is the image's position
in the official training file, or 60,000 and more for test.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fashion_mnist_idx import DEBIAN_FOLDER, OFFICIAL_TRAIN_IMAGES, heldout_indices, read_split, trained_indices
from PIL import Image

ASSETS = Path(__file__).resolve().parents[1] / "quee_core" / "assets" / "fashion_mnist"
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def png(pixels: np.ndarray) -> bytes:
    """uint8 [28, 28] as the smallest PNG that Pillow makes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write(path: Path, images: np.ndarray, labels: np.ndarray, ids: np.ndarray) -> None:
    """One part as Parquet, uncompressed: PNG does not shrink further."""
    schema = pa.schema(
        [("sample_id", pa.int64()), ("label", pa.int16()), ("image", pa.binary())],
        metadata={"classes": json.dumps(CLASSES)},
    )
    table = pa.table([pa.array(ids), pa.array(labels.astype(np.int16)), pa.array(map(png, images))], schema=schema)
    pq.write_table(table, path, compression="none", row_group_size=2000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the idx files (%(default)s)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the Parquet files (%(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels = read_split(args.data, "train")
    for name, kept in (("heldout", heldout_indices(labels)), ("train", trained_indices(labels))):
        write(args.out / f"{name}.parquet", images[kept], labels[kept], kept)
    images, labels = read_split(args.data, "t10k")
    write(args.out / "test.parquet", images, labels, OFFICIAL_TRAIN_IMAGES + np.arange(len(labels)))


if __name__ == "__main__":
    main()
