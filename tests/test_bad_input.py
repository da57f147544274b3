"""Bad configurations, data and weights: the command ends in one message that says what, where, and what to do.

`test_cli.py` has the others: names that are unknown but near a known one, exits out of order or beyond the depth, a
missing data folder, a head of other classes, weights that are cut short, NaN or a pickle of more than tensors, and
devices that are not there.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from quee_core.backbones.micro_vit import micro_vit
from quee_core.backbones.registry import BACKBONES
from quee_core.config import load_config
from quee_core.data.folder_set import path_ids
from quee_core.data.splits import SPLITS, assign_splits
from quee_core.plan import resolve
from tests.published_files import encoded, noise, write_folder, write_parquet
from tests.quee_command import computed, finished, leftovers, quee, refused, whole_tables, write_sweep

pytestmark = [
    pytest.mark.usefixtures("prefect_home"),
    pytest.mark.xdist_group("bad input"),
    # of MLflow's; an empty mean or a division by zero is a RuntimeWarning, and still an error
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
NAN, INFINITY = float("nan"), float("inf")
SHARES = {"fit": 0.3, "target": 0.3, "select": 0.2, "test": 0.2, "limit": None, "trained_on": "none"}


# Configurations


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"datset": {"limit": 60}}, "datset: unknown field; did you mean 'dataset'?"),
        ({"paths": {"bit": [2]}}, "paths.bit: unknown field; did you mean 'bits'?"),
        ({"predictors": [{"name": "mlp", "feature": "both"}]}, "predictors.0.feature: unknown field; did you mean"),
        ({"paths": {"qqq": 1}}, "paths.qqq: unknown field; known: bits, policy, sampled_paths, seed"),
        ({"paths": {"bits": [0, 4]}}, "paths.bits: [0] are not among [2, 3, 4, 5, 6, 7, 8, 32]"),
        ({"paths": {"bits": [1]}}, "paths.bits: [1] are not among [2, 3"),
        ({"paths": {"bits": [4, 33]}}, "paths.bits: [33] are not among [2, 3"),
        ({"paths": {"bits": ["four"]}}, "paths.bits.0: Input should be a valid integer"),
        ({"heads": {"bits": [1]}}, "heads.bits: [1] are not among [2, 3"),
        ({"prices": {"values": []}}, "prices: values: empty; want at least one price λ"),
        ({"prices": {"values": [0.1, NAN]}}, "prices.values.1: Input should be a finite number (given: nan)"),
        ({"prices": {"values": [-0.5]}}, "prices.values.0: Input should be greater than or equal to 0 (given: -0.5)"),
        ({"prices": {"lowest": -1}}, "prices.lowest: Input should be greater than 0 (given: -1)"),
        ({"prices": {"highest": INFINITY}}, "prices.highest: Input should be a finite number (given: inf)"),
        ({"prices": {"count": 0}}, "prices.count: Input should be greater than or equal to 1 (given: 0)"),
    ],
)
def test_a_field_that_cannot_be_is_named_with_file_and_remedy(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    config = write_sweep(tmp_path, **sections)
    for command in ("plan", "sweep"):
        told = refused(tmp_path, command, config)
        assert told.startswith(f"{config}: {message}"), told
    assert sorted(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"targets": {"clusters": [None, 61]}},
            "targets.clusters: 61 is more clusters than the 60 images of the split",
        ),
        (
            {"predictors": [{"name": "logistic"}, {"name": "nearest_cluster", "options": {"clusters": 500}}]},
            "predictors.1: nearest_cluster makes 500 clusters, more than the 60 images of the split target; lower it",
        ),
        ({"predictors": [{"name": "mlp", "options": {"epoch": 3}}]}, "predictor mlp: unknown option 'epoch'"),
        ({"quantization": {"method": "mes"}}, "quantization.method 'mes': unknown; did you mean 'mse'?"),
    ],
)
def test_what_the_data_cannot_meet_is_told_before_anything_is_computed(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    told = refused(tmp_path, "sweep", write_sweep(tmp_path, **sections))
    assert told.startswith(message), told
    assert not (tmp_path / "store").exists()


def test_as_many_clusters_as_images_are_not_too_many(tmp_path: Path) -> None:
    planned = quee(tmp_path, "plan", write_sweep(tmp_path, targets={"clusters": [60]}))
    assert planned.exit_code == 0, planned.output


def test_a_gpu_that_is_not_there_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    wanted = "cuda:99" if torch.cuda.is_available() else "cuda"
    told = refused(tmp_path, "sweep", write_sweep(tmp_path), "--device", wanted)
    assert told.startswith(f"device {wanted!r}: this machine has {torch.cuda.device_count()} CUDA devices"), told
    assert "--device cpu" in told
    assert not (tmp_path / "store").exists()


# Data


def folder_sweep(folder: Path, dataset: str = "folder", classes: int = 2, **sections: Any) -> Path:
    """A sweep of `folder`/images by the weights in `folder`, or by an untrained model if there are none."""
    weights = folder / "weights.safetensors"
    if not weights.exists():
        torch.manual_seed(0)
        save_file(micro_vit(num_classes=classes).state_dict(), weights)
    return write_sweep(
        folder,
        dataset={"name": dataset, "root": "images", **SHARES},
        backbone={"checkpoint": weights.name, "num_classes": classes},
        **sections,
    )


def test_a_class_without_images_is_named_with_its_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", {"cat": 100, "dog": 0})
    (tmp_path / "images" / "dog" / "notes.txt").write_text("none yet")
    told = refused(tmp_path, "sweep", folder_sweep(tmp_path))
    assert told.startswith("data set folder: class 'dog' is empty: no image in images/dog (suffixes: .png"), told
    assert told.endswith("add some or remove the folder")


def test_a_class_without_images_in_the_fit_split_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", {"cat": 200, "owl": 1})  # the hash puts it into select
    told = refused(tmp_path, "sweep", folder_sweep(tmp_path))
    assert told.startswith("data set folder: class 'owl' has no image in the fit split; add images of it"), told


@pytest.mark.parametrize("damage", ["cut short", "no image", "empty"])
def test_an_unreadable_image_is_named_and_what_was_finished_is_kept(tmp_path: Path, damage: str) -> None:
    write_folder(tmp_path / "images", {"cat": 100, "dog": 100}, lambda seed: noise(seed, 28, 28))
    sound = encoded(noise(0, 28, 28))
    config = folder_sweep(tmp_path)
    bad = tmp_path / "images" / "cat" / f"{in_split(tmp_path, config, 'test'):04d}.png"
    bad.write_bytes({"cut short": sound[: len(sound) // 2], "no image": b"not an image", "empty": b""}[damage])
    told = refused(tmp_path, "sweep", config)
    assert told.startswith(f"{bad.relative_to(tmp_path)}: image cannot be decoded: "), told
    assert told.endswith("replace or remove it")
    kept = whole_tables(tmp_path / "store")
    assert {part for path in kept for part in path.parts if part.startswith("split=")} == {
        "split=target", "split=select",
    }  # fmt: skip
    assert leftovers(tmp_path) == []


def in_split(folder: Path, config: Path, split: str) -> int:
    """Number of an image of the first class that falls into `split`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        plan = resolve(load_config(config))
    return int(plan.splits[split][0].positions[0])


@pytest.mark.parametrize(("label", "row"), [(2, 57), (-1, 3)])
def test_a_label_out_of_range_is_named_with_its_row(tmp_path: Path, label: int, row: int) -> None:
    labels = [k % 2 for k in range(200)]
    labels[row] = label
    pixels = encoded(noise(0, 28, 28))
    write_parquet(
        tmp_path / "images" / "train.parquet", {"sample_id": range(200), "label": labels, "image": [pixels] * 200}
    )
    told = refused(tmp_path, "sweep", folder_sweep(tmp_path, dataset="parquet"))
    assert told == f"images/train.parquet: row {row}: label {label} is out of range; there are 2 classes"


# Weights


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    shipped = BACKBONES["micro_vit_fashion_mnist"].weights
    assert shipped is not None
    return load_file(shipped)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    config = write_sweep(tmp_path)
    del state["norm.weight"]
    state["norm.gain"] = torch.ones(128)
    state["blocks.0.attn.qkv.weight"] = torch.ones(384, 64)
    save_file(state, tmp_path / "other.safetensors")
    told = refused(tmp_path, "sweep", config, "--checkpoint", "other.safetensors")
    assert told == (
        "other.safetensors: made for another model: lacks norm.weight; has norm.gain, which the model does not; "
        "has wrong shapes: blocks.0.attn.qkv.weight [384, 64], not [384, 128]"
    )
    assert "other.safetensors: made for another model" in refused(
        tmp_path, "plan", config, "--checkpoint", "other.safetensors"
    )


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            "head.weight",
            r"path \d+-\d+: sample_id \d+: logits hold NaN or infinite values \(\d+ of 60 images\); check the",
        ),
        ("blocks.3.mlp.fc1.weight", r"blocks\.3\.mlp\.fc2: NaN or infinite values on the calibration images; look at"),
    ],
)
def test_logits_that_overflow_are_named_by_place_and_no_table_holds_them(
    tmp_path: Path, state: dict[str, torch.Tensor], layer: str, message: str
) -> None:
    state[layer] *= 1e38  # finite still, so that nothing is wrong with the file
    save_file(state, tmp_path / "large.safetensors")
    told = refused(tmp_path, "sweep", write_sweep(tmp_path), "--checkpoint", "large.safetensors")
    assert re.match(message, told), told
    assert not list(tmp_path.glob("store/backbone=*/**/exit=8/**/*.parquet"))  # those of exit 4 are sound
    whole_tables(tmp_path / "store")
    assert leftovers(tmp_path) == []


# Answers without surprise


def grey(value: int) -> Callable[[int], NDArray[np.uint8]]:
    """Images that are nearly of one shade of grey."""
    return lambda seed: (value + noise(seed, 28, 28) // 16).astype(np.uint8)


@pytest.mark.parametrize("answer", ["bright", "middling"])
def test_exits_that_are_always_right_or_always_wrong_give_honest_figures(tmp_path: Path, answer: str) -> None:
    """The first exit is always right; the last says `answer` to every image, where "middling" is never right.

    Not a warning either: a division by zero or a logarithm of zero would raise one, which here is an error.
    """
    images = tmp_path / "images"
    for name, value in (("bright", 220), ("dark", 20)):
        write_folder(images / name, {".": 100}, grey(value))
    write_folder(images / "middling", {".": 100}, grey(110))
    for path in in_splits_beside_fit(images, sorted((images / "middling").iterdir())):
        path.unlink()
    torch.manual_seed(0)
    model = micro_vit(num_classes=3)
    torch.nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([answer == "bright", False, answer == "middling"]) * 9.0)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    folder_sweep(tmp_path, classes=3, heads={"epochs": 40})
    record = finished(tmp_path)

    groups = {row.class_name: row.n for row in record.shares}
    assert groups["middling"] == 0
    share = groups["bright"] / groups["all"] if answer == "bright" else 0
    for row in record.uniform_accuracies:
        assert row.accuracy == pytest.approx(1 if row.exit == 1 else share)
        assert row.low <= row.accuracy <= row.high
        assert row.high - row.low > 0.05  # all of n is no proof of all
    fronts = {front.method: front for front in record.fronts}
    for front in fronts.values():
        assert all(point.accuracy == 1 for point in front.points), front.method
        assert front.hypervolume == pytest.approx(1, abs=0.01)
        assert front.hypervolume_high - front.hypervolume_low > 0.05
    assert len(record.budgets) == 7
    for budget in record.budgets:
        assert (budget.accuracy, budget.baseline_accuracy, budget.difference) == (1, 1, 0)
        assert budget.difference_low < 0 < budget.difference_high
    assert not any(row.failure for row in record.grid)
    figures = [x for row in record.grid for x in (row.rmse, row.brier, row.ece, row.hypervolume)]
    assert all(x is not None and np.isfinite(x) for x in figures)
    assert all(gate.brier < 0.05 for gate in record.calibration)
    again = finished(tmp_path)
    assert computed(again, "extract") == 0
    assert again.fronts == record.fronts


def in_splits_beside_fit(root: Path, paths: list[Path]) -> list[Path]:
    """Those of `paths` that the hash does not put into `fit`."""
    shares = {name: SHARES[name] for name in SPLITS}
    return [p for p, split in zip(paths, assign_splits(path_ids(root, paths), shares, 0), strict=True) if split]
