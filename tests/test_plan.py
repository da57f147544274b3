"""What a sweep resolves to before anything is computed."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from quee_core.backbones.micro_vit import micro_vit
from quee_core.config import SweepConfig
from quee_core.errors import CheckpointError, MissingWeightsError
from quee_core.plan import resolve, weights_file
from tests.conftest import small_config


def folder_of_images(root: Path, classes: int, images: int) -> Path:
    rng = np.random.default_rng(0)
    for name in range(classes):
        (root / f"class{name}").mkdir(parents=True)
        for k in range(images):
            Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(root / f"class{name}" / f"{k}.png")
    return root


def config_of_own_images(tmp_path: Path) -> SweepConfig:
    """Of 600 images below `data`, and of weights there; 40 of them calibrate, 60 train heads."""
    data = folder_of_images(tmp_path / "data", 3, 200)
    save_file(micro_vit(num_classes=3).state_dict(), data / "own.safetensors")
    sections: dict[str, Any] = {
        "dataset": {"name": "folder", "root": str(data), "limit": None, "fit": 0.4, "target": 0.3, "select": 0.1,
                    "test": 0.2, "trained_on": "none"},
        "backbone": {"name": "micro_vit_fashion_mnist", "checkpoint": "own.safetensors", "num_classes": 3},
        "quantization": {"images": 40},
        "heads": {"images": 60},
    }  # fmt: skip
    return small_config(tmp_path, **sections)


def test_a_relative_checkpoint_is_looked_for_below_the_data_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, elsewhere = folder_of_images(tmp_path / "data", 3, 60), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    sections = {
        "dataset": {"name": "folder", "root": str(data), "limit": 50, "fit": 0.3, "target": 0.3, "select": 0.2,
                    "test": 0.2, "trained_on": "none"},
        "backbone": {"name": "micro_vit_fashion_mnist", "checkpoint": "own.safetensors", "num_classes": 3},
    }  # fmt: skip
    told = (
        rf"own\.safetensors: no such checkpoint file; expected there, or at {re.escape(str(data / 'own.safetensors'))}"
    )
    with pytest.raises(MissingWeightsError, match=told):
        resolve(small_config(tmp_path, **sections))
    with pytest.raises(CheckpointError, match="cannot be looked for: File name too long; name another file"):
        weights_file("w" * 300, data, tmp_path)
    save_file(micro_vit(num_classes=3).state_dict(), data / "own.safetensors")
    below = resolve(small_config(tmp_path, **sections)).loaded.fingerprint
    save_file(micro_vit(num_classes=3).state_dict(), elsewhere / "own.safetensors")
    assert resolve(small_config(tmp_path, **sections)).loaded.fingerprint != below


def test_calibration_and_head_images_are_of_every_class_though_the_set_is_ordered_by_class(tmp_path: Path) -> None:
    config = config_of_own_images(tmp_path)
    plan = resolve(config)
    fit = {(s.part, p) for s in plan.splits["fit"] for p in s.positions.tolist()}
    for parts, count in ((plan.calibration_images(), 40), (plan.head_images(), 60)):
        chosen = {(s.part, p) for s in parts for p in s.positions.tolist()}
        labels = np.concatenate([plan.dataset.labels(s.part)[s.positions] for s in parts])
        assert len(chosen) == count
        assert chosen < fit
        assert np.bincount(labels, minlength=3).min() >= count // 6


def test_a_split_is_known_by_the_images_that_are_read_of_it(tmp_path: Path) -> None:
    config = config_of_own_images(tmp_path)

    def prints() -> dict[str, str]:
        plan = resolve(config)
        return {split: plan.split_fingerprint(split) for split in plan.splits}

    plan, before = resolve(config), prints()
    read = {p for s in (*plan.head_images(), *plan.calibration_images()) for p in s.positions.tolist()}
    idle = next(p for s in plan.splits["fit"] for p in s.positions.tolist() if p not in read)
    files = sorted((tmp_path / "data").rglob("*.png"))
    files[idle].write_bytes(files[min(read)].read_bytes())
    assert prints() == before
    files[min(read)].write_bytes(files[idle + 1 if idle + 1 < len(files) else idle - 1].read_bytes())
    assert {split for split, own in prints().items() if own != before[split]} == {"fit"}
