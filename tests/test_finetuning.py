"""Fine-tuning: real epochs on real images; stopped and continued it ends with the same bits; its images stay out."""

import math
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.torch import load_file, save_file

from quee_core.backbones import load_backbone
from quee_core.backbones.checkpoints import read_checkpoint
from quee_core.config import load_config, parse_config
from quee_core.data.datasets import load_dataset
from quee_core.data.splits import TrainedShare
from quee_core.errors import CheckpointError, ConfigError, DamagedTableError, NumericError
from quee_core.finetune_config import FinetuneConfig, TrainingConfig, load_finetune_config
from quee_core.finetuning import STATE, WEIGHTS, Training, _precision, learning_rate, prepare, train
from quee_core.plan import SweepPlan, resolve
from quee_core.trained_images import NOTE, read_trained_images
from tests.published_files import noise, write_folder
from tests.quee_command import SweepProcess, only_error, quee, refused

pytestmark = [
    pytest.mark.xdist_group("fine-tuning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's
]
EPOCHS = 3


def written(folder: Path, **sections: Any) -> Path:
    """Clothing by the micro ViT with its head anew, some dozen images an epoch."""
    raw: dict[str, Any] = {
        "name": "clothes",
        "dataset": {"name": "fashion_mnist", "limit": 96, "watched": 120},
        "backbone": {"name": "micro_vit_fashion_mnist"},
        "training": {"epochs": EPOCHS, "batch": 16, "learning_rate": 1e-3},
        "run": {"runs": str(folder / "runs"), "mlflow_uri": f"sqlite:///{folder.parent / 'mlflow.db'}"},
    }
    for section, fields in sections.items():
        raw[section] = {**raw[section], **fields} if isinstance(fields, dict) else fields
    path = folder / "finetune.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def training_of(folder: Path, **sections: Any) -> Training:
    return prepare(load_finetune_config(written(folder, **sections)))


def test_the_command_trains_tracks_and_leaves_a_sweep_of_the_weights(tmp_path: Path) -> None:
    config = written(tmp_path)
    done = quee(tmp_path, "finetune", str(config))
    assert done.exit_code == 0, (done.output, done.exception)
    folder = tmp_path / "runs" / "clothes"
    *_, last, weights, sweep = done.output.splitlines()
    number, loss, accuracy, _, n, _ = last.split("\t")
    assert (number, n) == (str(EPOCHS), "120")
    assert float(accuracy) > 40  # of ten classes, with a head that began at random
    assert math.isfinite(float(loss))
    assert (weights, sweep) == (f"weights: {folder / WEIGHTS}", f"sweep them: quee sweep {folder / 'sweep.yaml'}")
    asked = load_config(folder / "sweep.yaml")
    plan = resolve(asked)
    learnt = {id_ for s in training_of(tmp_path).learnt for id_ in plan.dataset.sample_ids(s.part)[s.positions]}
    for split in ("target", "select", "test"):
        assert not learnt & set(plan.sample_ids(split).tolist())
    client = MlflowClient(f"sqlite:///{tmp_path.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fine-tuning of micro_vit_fashion_mnist on fashion_mnist")
    [run] = client.search_runs([experiment.experiment_id], "attributes.run_name = 'clothes'")
    history = client.get_metric_history(run.info.run_id, "accuracy")
    assert (run.info.status, [metric.step for metric in history]) == ("FINISHED", [1, 2, 3])
    assert f"{100 * history[-1].value:.2f}" == accuracy
    again = quee(tmp_path, "finetune", str(config))  # nothing is left to do
    assert again.output == done.output
    assert len(client.search_runs([experiment.experiment_id], "attributes.run_name = 'clothes'")) == 1


def test_a_training_that_is_killed_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = (written(tmp_path / name) for name in ("whole", "killed"))
    assert quee(tmp_path / "whole", "finetune", str(whole)).exit_code == 0
    state = tmp_path / "killed" / "runs" / "clothes" / STATE
    with SweepProcess(tmp_path / "killed", arguments=("finetune", killed)) as process:
        process.wait_for(state.exists)
        process.send(signal.SIGKILL)
        process.ended()
    assert not state.with_name(WEIGHTS).exists()
    done = quee(tmp_path / "killed", "finetune", str(killed))
    assert done.exit_code == 0, done.output
    wanted = load_file(tmp_path / "whole" / "runs" / "clothes" / WEIGHTS)
    found = load_file(state.with_name(WEIGHTS))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def in_a_process(folder: Path, config: Path) -> tuple[int, str]:
    """The command by itself, as a user runs it: it forks processes that decode, which one of tests may fail at."""
    with SweepProcess(folder, arguments=("finetune", config)) as process:
        return process.ended()


def test_decoding_in_other_processes_changes_nothing(tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        schedule = {"epochs": 1, "batch": 48, "learning_rate": 1e-3, "workers": workers}
        code, output = in_a_process(folder, written(folder, training=schedule))
        assert code == 0, output
        found.append(load_file(folder / "runs" / "clothes" / WEIGHTS))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_is_drawn_at_random_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    training = training_of(tmp_path, training={"epochs": 1, "batch": 48, "learning_rate": 1e-3})
    torch.manual_seed(7)
    np.random.seed(7)
    wanted = torch.rand(3), np.random.rand(3)
    torch.manual_seed(7)
    np.random.seed(7)
    list(train(training, tmp_path / "run"))
    assert torch.equal(torch.rand(3), wanted[0])
    assert np.array_equal(np.random.rand(3), wanted[1])


def test_a_set_without_a_held_out_part_is_learnt_by_a_share_that_sweeps_keep_out(tmp_path: Path) -> None:
    def grey(seed: int) -> np.ndarray[Any, Any]:
        return np.full((28, 28, 3), seed % 251, np.uint8)

    images = tmp_path / "images"
    write_folder(images, {"cat": 150, "dog": 150}, grey)
    where = {"name": "folder", "root": str(images)}
    config = written(
        tmp_path, dataset=where | {"share": 0.6, "seed": 3, "limit": None, "watched": 50}, training={"epochs": 1},
    )  # fmt: skip
    assert quee(tmp_path, "finetune", str(config)).exit_code == 0
    folder = tmp_path / "runs" / "clothes"
    said = read_trained_images(folder / WEIGHTS)
    assert said is not None
    assert said.name == "folder"
    assert said.settings == {"trained_on": "share", "trained_share": 0.6, "trained_seed": 3}
    raw = yaml.safe_load((folder / "sweep.yaml").read_text())
    raw["dataset"] |= {"test": 0.2, "fit": 0.3, "target": 0.3, "select": 0.2}
    raw["quantization"], raw["targets"] = {"images": 8}, {"clusters": [None, 3]}
    plan = resolve(parse_config(raw, source="it"))
    dataset = load_dataset("folder", images)
    saw = {part: TrainedShare(0.6, 3).saw(dataset.sample_ids(part)) for part in dataset.description.parts}
    assert 0.5 < np.concatenate([*saw.values()]).mean() < 0.7
    for split, parts in plan.splits.items():
        for part in parts:
            assert (saw[part.part][part.positions] == (split == "fit")).all()
    for field, value in (("trained_seed", 4), ("trained_share", 0.7)):
        wrong = raw | {"dataset": raw["dataset"] | {field: value}}
        with pytest.raises(ConfigError, match=r"set dataset\.trained_on: share, dataset\.trained_share: 0\.6, "):
            resolve(parse_config(wrong, source="it"))
    plain = {k: v for k, v in raw["dataset"].items() if not k.startswith("trained")}
    told = resolve(parse_config(raw | {"dataset": plain}, source="it"))  # what the weights say themselves
    assert told.config == plan.config
    assert {split: plan.split_fingerprint(split) for split in plan.splits} == {
        split: told.split_fingerprint(split) for split in told.splits
    }
    plain |= {"trained_on": "none"}
    with pytest.raises(ConfigError, match="it was fine-tuned on images of folder"):
        resolve(parse_config(raw | {"dataset": plain}, source="it"))


def test_weights_do_not_speak_for_images_that_they_cannot_know(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", {"cat": 150, "dog": 150}, lambda seed: noise(seed, 28, 28, 3))
    learnt = {"name": "folder", "root": str(tmp_path / "images"), "share": 0.6, "limit": None, "watched": 50}
    tuning = written(tmp_path, dataset=learnt, training={"epochs": 1})
    assert quee(tmp_path, "finetune", str(tuning)).exit_code == 0
    raw = yaml.safe_load((tmp_path / "runs" / "clothes" / "sweep.yaml").read_text())
    raw["quantization"], raw["targets"] = {"images": 8}, {"clusters": [None, 3]}

    def asked(images: Path, **fields: Any) -> SweepPlan:
        shares = {"name": "folder", "root": str(images), "fit": 0.3, "target": 0.3, "select": 0.2, "test": 0.2}
        return resolve(parse_config(raw | {"dataset": shares | fields}, source="it"))

    same = asked(tmp_path / "images")
    moved = tmp_path / "moved" / "train"  # the same images by other names, so that hashes draw others
    shutil.copytree(tmp_path / "images", moved)
    grown = tmp_path / "grown"
    shutil.copytree(tmp_path / "images", grown)
    write_folder(tmp_path / "more", {"cat": 40, "dog": 40}, lambda seed: noise(seed + 1000, 28, 28, 3))
    for file in (tmp_path / "more").rglob("*.png"):
        file.rename(grown / file.parent.name / f"new{file.name}")
    write_folder(
        tmp_path / "other", {"cat": 150, "dog": 150}, lambda seed: noise(seed + 2000, 28, 28, 3)
    )  # others by those names
    anew = tmp_path / "anew"
    shutil.copytree(tmp_path / "images", anew)
    for file in anew.rglob("*.png"):
        Image.open(file).resize((20, 20)).save(file)
    explicit = same.config.dataset.model_dump(include={"trained_on", "trained_share", "trained_seed"})
    renamed, thinned, shifted = tmp_path / "renamed", tmp_path / "thinned", tmp_path / "shifted"
    for to in (renamed, thinned, shifted):
        shutil.copytree(tmp_path / "images", to)
    (renamed / "dog").rename(renamed / "hound")  # half of the images
    for file in [*(thinned / "cat").iterdir()][::6]:
        file.unlink()
    cats = sorted((shifted / "cat").iterdir())
    cats[75].unlink()
    for before, after in pairwise(cats[75:]):  # the names stay, half of the cats have another
        after.rename(before)
    assert set(asked(thinned, **explicit).sample_ids("test").tolist()) < set(same.sample_ids("test").tolist())
    refusals = [(moved.parent, {}), (moved.parent, explicit), (tmp_path / "other", {}), (anew, {}), (renamed, {}),
                (renamed, explicit), (shifted, {}), (shifted, explicit)]  # fmt: skip
    others = r"that are not among these, or lie here under other names"
    for images, fields in refusals:
        with pytest.raises(ConfigError, match=others):
            asked(images, **fields)
    for images in (moved.parent, tmp_path / "other", anew):  # the user's word
        assert asked(images, trained_on="none").config.dataset.trained_on == "none"
    for images in (renamed, shifted):  # where some lie as they were
        with pytest.raises(ConfigError, match=others):
            asked(images, trained_on="none")
    assert asked(anew, **explicit).sample_ids("test").tolist() == same.sample_ids("test").tolist()
    assert set(same.sample_ids("test").tolist()) <= set(asked(grown).sample_ids("test").tolist())
    start = {"checkpoint": raw["backbone"]["checkpoint"]}
    with pytest.raises(CheckpointError, match=r"training\.pt: what `quee finetune` goes on from.*name the weights"):
        read_checkpoint(Path(start["checkpoint"]).with_name(STATE))
    for images, share, told in (
        (tmp_path / "other", 0.5, None), (tmp_path / "images", 0.6, None), (tmp_path / "images", 0.5, "0.6"),
        (moved.parent, 0.6, "other names"), (moved.parent, 0.5, "other names"),
    ):  # fmt: skip
        data = learnt | {"root": str(images), "share": share}
        again = load_finetune_config(written(tmp_path, name="again", dataset=data, backbone=start))
        if told is None:
            assert prepare(again).seen.trained_share == share
        else:
            with pytest.raises(ConfigError, match=rf"it has learnt from other images of folder before \(.*{told}"):
                prepare(again)


@pytest.mark.parametrize(
    "note",
    [
        "not json", '{"trained_on": "train", "probes": []}', '{"name": "folder", "trained_on": "shar", "probes": []}',
        '{"name": "folder", "trained_on": "share", "probes": []}',
        '{"name": "folder", "trained_on": "train", "probes": [], "limit": 10}',
    ],
)  # fmt: skip
def test_a_note_that_quee_did_not_write_is_refused_by_name(note: str, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "odd.safetensors", {NOTE: note})
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: its note quee\.trained_on is none that this version"):
        read_trained_images(tmp_path / "odd.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "plain.safetensors")
    assert read_trained_images(tmp_path / "plain.safetensors") is None


@pytest.mark.parametrize(("capability", "wanted"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_that_would_emulate_bfloat16_trains_in_float16(
    capability: tuple[int, int], wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert _precision(TrainingConfig(), torch.device("cuda:1")) is wanted


def test_a_t2t_backbone_is_tuned_to_other_classes_and_keeps_what_is_frozen(tmp_path: Path) -> None:
    import timm

    start = timm.create_model("t2t_vit_7", img_size=32, depth=7, num_classes=1000)
    torch.save({"state_dict_ema": {f"module.{k}": v for k, v in start.state_dict().items()}}, tmp_path / "t2t.pth.tar")
    sections: dict[str, Any] = {
        "backbone": {"name": "t2t_vit_7", "checkpoint": str(tmp_path / "t2t.pth.tar"), "image_size": 32},
        "dataset": {"limit": 12, "watched": 8},
        "training": {"epochs": 1, "batch": 6},
    }
    training = training_of(tmp_path, **sections)
    list(train(training, tmp_path / "run"))
    tuned = load_file(tmp_path / "run" / WEIGHTS)
    assert tuned["head.weight"].shape == (10, 256)
    frozen = {name for name, tensor in start.named_parameters() if not tensor.requires_grad}
    changed = {name for name, tensor in start.state_dict().items() if tensor.shape == tuned[name].shape} - {
        name for name, tensor in start.state_dict().items() if torch.equal(tensor, tuned[name])
    }
    assert frozen
    assert not frozen & changed
    assert "blocks.0.attn.qkv.weight" in changed
    loaded = load_backbone(
        "t2t_vit_7", exits=[3, 7], checkpoint=tmp_path / "run" / WEIGHTS, image_size=32, num_classes=10
    )
    assert loaded.backbone.num_classes == 10


def test_rates_rise_to_the_peak_and_fall_to_nothing() -> None:
    settings = TrainingConfig(learning_rate=0.5, warmup=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == max(rates) == 0.5
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    flat = TrainingConfig(learning_rate=0.5, warmup=0)
    assert learning_rate(0, 1, flat) == 0.5


def test_what_cannot_go_on_is_told(tmp_path: Path) -> None:
    config = written(tmp_path, training={"epochs": 1, "batch": 48})
    list(train(prepare(load_finetune_config(config)), tmp_path / "runs" / "clothes"))
    other = written(tmp_path, training={"epochs": 2, "batch": 48})
    assert "another training was begun here, of other settings" in refused(tmp_path, "finetune", str(other))
    state = tmp_path / "runs" / "clothes" / STATE
    data = bytearray(state.read_bytes())
    data[: len(data) // 2] = os.urandom(len(data) // 2)
    state.write_bytes(data)
    with pytest.raises(DamagedTableError, match=r"training\.pt: cannot be read .*delete it to begin anew"):
        list(train(prepare(load_finetune_config(config)), state.parent))
    wild = training_of(tmp_path, name="wild", training={"epochs": 2, "batch": 16, "learning_rate": 1e30, "clip": 1e30})
    with pytest.raises(NumericError, match="the loss is no number any more; lower training"):
        list(train(wild, tmp_path / "runs" / "wild"))


def test_weights_that_learnt_from_other_images_before_are_no_start(tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_folder(images, {"cat": 30, "dog": 30}, lambda seed: np.full((28, 28, 3), seed % 251, np.uint8))
    where = {"name": "folder", "root": str(images), "limit": None, "watched": 8}
    first = written(tmp_path, dataset=where | {"share": 0.5}, training={"epochs": 1})
    assert quee(tmp_path, "finetune", str(first)).exit_code == 0
    start = {"checkpoint": str(tmp_path / "runs" / "clothes" / WEIGHTS)}
    second = written(tmp_path, name="second", dataset=where | {"share": 0.6}, backbone=start)
    told = refused(tmp_path, "finetune", str(second))
    assert "it has learnt from other images of folder before (trained_on share, trained_share 0.5" in told
    same = written(tmp_path, name="second", dataset=where | {"share": 0.5}, backbone=start, training={"epochs": 1})
    assert quee(tmp_path, "finetune", str(same)).exit_code == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named_whichever_process_reads_it(tmp_path: Path, workers: int) -> None:
    images = tmp_path / "images"
    write_folder(images, {"cat": 20, "dog": 20}, lambda seed: np.full((28, 28, 3), seed % 251, np.uint8))
    for image in images.glob("cat/*.png"):
        image.write_bytes(b"not an image")
    config = written(
        tmp_path, dataset={"name": "folder", "root": str(images), "limit": None, "watched": 8},
        training={"epochs": 1, "workers": workers},
    )  # fmt: skip
    code, output = in_a_process(tmp_path, config)
    assert code == 2, output
    assert "image cannot be decoded" in only_error(output)


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    config = written(tmp_path, training={"epoch": 3})
    assert "training.epoch: unknown field; did you mean 'epochs'?" in refused(tmp_path, "finetune", str(config))
    config = written(tmp_path, backbone={"name": "micro_vit_fashion_mnist", "head": "h.pth"})
    assert "backbone: a new head is trained" in refused(tmp_path, "finetune", str(config))
    config = written(tmp_path, backbone={"name": "t2t_vit_7"})
    assert "t2t_vit_7: no weights: give a checkpoint" in refused(tmp_path, "finetune", str(config))
    config = written(tmp_path, backbone={"name": "micro_vit_fashion_mnist", "exits": [3, 99]})
    assert "99 is beyond the backbone's depth" in refused(tmp_path, "finetune", str(config))
    assert set(FinetuneConfig.model_fields) == {"name", "dataset", "backbone", "training", "run"}
