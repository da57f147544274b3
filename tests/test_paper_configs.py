"""The six sweeps of configs/paper: planned without their files, and run on few real images to their figures."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from quee_core.config import load_config
from quee_core.data.datasets import load_dataset
from quee_core.data.published import PUBLISHED, AbsentSet
from quee_core.data.splits import choose_splits, image_count
from quee_core.errors import BackboneError, MissingDataError
from quee_core.finetune_config import load_finetune_config
from quee_core.finetuning import WEIGHTS
from quee_core.plan import RANDOM_WEIGHTS, UNSAID
from quee_core.record import SweepRecord
from quee_core.runs import read_record
from tests.published_files import CIFAR10_CLASSES, cifar_batch, encoded, python2_pickle
from tests.quee_command import quee, refused

PAPER = sorted((Path(__file__).parents[1] / "configs" / "paper").glob("*.yaml"))
PER_PART = 130  # real images of each part of a scaled-down set
LIMIT = 60  # of a split; of a set of a hundred classes, which must all be there, as many as there are

pytestmark = pytest.mark.xdist_group("paper")


def real_images(part: int) -> tuple[NDArray[np.uint8], list[int]]:
    """Bundled images as uint8 [n, 32, 32, 3], and their classes."""
    source = load_dataset("fashion_mnist")
    name = ("heldout", "test")[part]
    pixels = [
        np.asarray(source.image(name, k).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
        for k in range(PER_PART)
    ]
    return np.stack(pixels), source.labels(name)[:PER_PART].tolist()


def write_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "batches.meta").write_bytes(python2_pickle({"label_names": list(CIFAR10_CLASSES)}))
    (pixels, labels), test = real_images(0), real_images(1)
    for k in range(5):
        (folder / f"data_batch_{k + 1}").write_bytes(cifar_batch(pixels[k::5], labels[k::5], "labels"))
    (folder / "test_batch").write_bytes(cifar_batch(*test, "labels"))


def write_cifar100(root: Path) -> None:
    """A hundred classes, numbered through: what matters is that each has images."""
    folder = root / "cifar-100-python"
    folder.mkdir()
    (folder / "meta").write_bytes(python2_pickle({"fine_label_names": [f"fine {k}" for k in range(100)]}))
    for part, name in enumerate(("train", "test")):
        pixels, _ = real_images(part)
        (folder / name).write_bytes(cifar_batch(pixels, [k % 100 for k in range(PER_PART)], "fine_labels"))


def write_svhn(root: Path) -> None:
    for part, name in enumerate(("train", "test")):
        pixels, labels = real_images(part)
        digits = np.array([[label or 10] for label in labels], np.uint8)
        savemat(root / f"{name}_32x32.mat", {"X": pixels.transpose(1, 2, 3, 0), "y": digits})


def write_imagenet(root: Path) -> None:
    ids = [f"n0000000{k}" for k in range(10)]
    torch.save(({wnid: (f"kind {wnid}",) for wnid in ids}, []), root / "meta.bin")
    for part, name in enumerate(("train", "val")):
        for k, (pixels, label) in enumerate(zip(*real_images(part), strict=True)):
            (root / name / ids[label]).mkdir(parents=True, exist_ok=True)
            (root / name / ids[label] / f"{name}_{k:08d}.JPEG").write_bytes(encoded(pixels, "JPEG"))


WRITERS: dict[str, Callable[[Path], None]] = {
    "cifar10": write_cifar10, "cifar100": write_cifar100, "svhn": write_svhn, "imagenet": write_imagenet,
}  # fmt: skip


def scaled_down(config: Path, folder: Path) -> Path:
    """The sweep at two exits, two bit-widths, the smallest images of its backbone, and a training of seconds."""
    raw = yaml.safe_load(config.read_text())
    depth = raw["backbone"]["exits"][-1]
    raw["backbone"] |= {"exits": [depth // 2, depth], "image_size": 28 if "dinov2" in config.stem else 32}
    if raw["dataset"]["name"] == "imagenet" and "dinov2" not in config.stem:
        raw["backbone"]["num_classes"] = 10  # of the few that were written
    raw["paths"] = {"bits": raw["paths"]["bits"][::2], "policy": "monotone"}
    raw["heads"] = raw["heads"] | {"epochs": 3, "copies": 0}
    raw |= {
        "quantization": {"method": "minmax", "images": 8}, "targets": {"clusters": [None, 4]}, "prices": {"count": 6},
        "predictors": [{"name": "logistic"}], "embedding": {"dimensions": 4}, "cost": {"batch": 2, "repeats": 1},
        "evaluation": {"resamples": 100},
        "run": {"device": "cpu", "pictures": False, "mlflow_uri": f"sqlite:///{folder.parent}/m.db"},
    }  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_there_are_six_from_a_to_f() -> None:
    assert [re.match(r"fig3([a-f])_", path.stem)[1] for path in PAPER] == list("abcdef")  # type: ignore[index]
    assert "fig3e_cifar10_t2t7" in {path.stem for path in PAPER}
    for path in PAPER:
        assert load_config(path).name == path.stem


@pytest.mark.parametrize("config", PAPER, ids=lambda path: path.stem)
def test_a_plan_is_complete_without_files_and_says_which_are_missing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quee_core.estimate.TRIAL_PIXELS", 1)  # a single image tells the time
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    sweep = load_config(config)
    told = json.loads(quee(tmp_path, "sweep", config, "--dry-run", "--json").output)
    known = PUBLISHED[sweep.dataset.name]
    assert all(told[key] > 0 for key in ("paths", "gates", "cells", "branches", "grid_points", "seconds", "bytes"))
    assert told["cells_missing"] == told["cells"]
    if sweep.dataset.limit is None:
        assert sum(told["images"].values()) == sum(known.parts.values())
    data, weights = told["missing"]
    assert data.startswith(f"data set {sweep.dataset.name}: folder data is missing; expected there: ")
    expected = sweep.backbone.name if sweep.backbone.pretrained else f"data/{sweep.backbone.checkpoint}"
    assert expected in weights
    if "t2t7" in config.stem:  # the quick ones
        lines = quee(tmp_path, "plan", config).output.splitlines()
        assert [line for line in lines if line.startswith("missing: ")] == [f"missing: {data}", f"missing: {weights}"]
        assert f"note: {UNSAID}" in lines
    assert not (tmp_path / "runs").exists()
    assert "data set" in refused(tmp_path, "sweep", config)


@pytest.mark.parametrize("config", [path for path in PAPER if re.search("fig3[c-f]", path.stem)], ids=lambda p: p.stem)
def test_the_weights_of_other_classes_are_those_that_a_fine_tuning_leaves(config: Path) -> None:
    tuning = config.parent.parent / "finetune" / f"{config.stem.partition('_')[2]}.yaml"
    sweep, tuned = load_config(config), load_finetune_config(tuning)
    assert sweep.backbone.checkpoint == f"runs/{tuned.name}/{WEIGHTS}"
    assert (sweep.backbone.name, sweep.dataset.name) == (tuned.backbone.name, tuned.dataset.name)
    assert (sweep.dataset.root, sweep.dataset.trained_on) == (tuned.dataset.root, None)  # the weights say what they saw
    assert sweep.run.runs == tuned.run.runs
    said = config.read_text()
    assert f"quee finetune configs/finetune/{tuning.name}" in said
    assert f"quee sweep configs/paper/{config.name}" in tuning.read_text()


def test_what_stands_for_an_absent_set_is_divided_as_the_set_would_be() -> None:
    shares = {"fit": 0.4, "target": 0.45, "select": 0.15, "test": 0.0}
    splits, _ = choose_splits(AbsentSet("svhn"), shares, seed=0)  # type: ignore[arg-type]
    assert sum(map(image_count, splits.values())) == 73_257 + 26_032
    assert image_count(splits["fit"]) == 73_257
    with pytest.raises(MissingDataError):
        AbsentSet("svhn").image("train", 0)


def test_random_weights_are_drawn_only_where_asked_for_and_always_the_same(tmp_path: Path) -> None:
    from quee_core.backbones import load_backbone

    before = torch.random.get_rng_state()
    drawn = [load_backbone("t2t_vit_7", exits=[7], image_size=32, random_weights=True).fingerprint for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(BackboneError, match="no weights: give a checkpoint"):
        load_backbone("t2t_vit_7", exits=[7], image_size=32)
    with pytest.raises(BackboneError, match="random weights and checkpoint"):
        load_backbone("t2t_vit_7", checkpoint=tmp_path / "w.safetensors", random_weights=True)
    (tmp_path / "both.yaml").write_text("backbone: {name: t2t_vit_7, random_weights: true, checkpoint: a.pt}")
    assert "random_weights and checkpoint: give one of the two" in refused(tmp_path, "plan", "both.yaml")


@pytest.mark.usefixtures("prefect_home")
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's own query
@pytest.mark.parametrize("config", PAPER, ids=lambda path: path.stem)
def test_a_scaled_down_run_goes_through_to_its_figures(config: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    WRITERS[load_config(config).dataset.name](tmp_path / "images")
    limit = PER_PART if load_config(config).dataset.name == "cifar100" else LIMIT
    arguments = ("--random-weights", "--limit", limit, "--data-root", tmp_path / "images")
    done = quee(tmp_path, "sweep", scaled_down(config, tmp_path), *arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    assert f"note: {RANDOM_WEIGHTS}" in done.output
    folder = tmp_path / "runs" / config.stem
    record = read_record(folder / "record.json")
    check_said(record, folder)
    drawn = quee(tmp_path, "figures", config.stem, "--no-png", *(["--track"] if "fig3e" in config.stem else []))
    assert drawn.exit_code == 0, (drawn.output, drawn.exception)
    assert ("tracked: run" in drawn.output) == ("fig3e" in config.stem)
    pages = sorted((folder / "paper").glob("*.html"))
    assert [page.stem for page in pages] == ["fig1", "fig2", "fig3", "fig4", "fig5a", "fig5b", "fig5c"]
    for page in pages:
        said = page.read_text("utf-8").replace("\\u003cbr\\u003e", " ")
        assert "Random weights: the figures say nothing about the backbone." in said, page.stem
        assert f"n = {record.splits['test']} test images" in said
    if "fig3e" in config.stem:
        image = tmp_path / "grey.png"
        Image.new("RGB", (32, 32), (90, 90, 90)).save(image)
        for command in (("route", config.stem, image), ("explain", image, "--run", config.stem)):
            told = quee(tmp_path, *command)
            assert told.exit_code == 0, (told.output, told.exception)
            assert f"note: {RANDOM_WEIGHTS}" in told.stderr


def check_said(record: SweepRecord, folder: Path) -> None:
    """Record and report say that weights are random, and the router is not offered to anybody."""
    assert record.cautions[0] == RANDOM_WEIGHTS
    assert RANDOM_WEIGHTS in (folder / "report.html").read_text("utf-8")
    assert not (folder / "registration.json").exists()
    assert len(record.exits) == len(record.bits) == 2
    names: Sequence[str] = [front.method for front in record.fronts]
    assert {"quee", "static", "threshold"} <= set(names)
