"""The shelf of new backbones: what its files say, what is wrong with them, and when they count as changed."""

import os
from pathlib import Path

import fsspec
import pytest

from quee_core.backbones.fetched import fetch_checkpoint
from quee_core.backbones.registry import ASSETS
from quee_core.backbones.shelf import read_shelf
from quee_core.config import SweepConfig
from quee_core.errors import BackboneError, CheckpointError
from quee_core.plan import outline

WEIGHTS = (ASSETS / "micro_vit_fashion_mnist.safetensors").read_bytes()


@pytest.fixture(params=["file", "memory"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "file" else f"memory://{tmp_path.name}-shelf"


def put(shelf: str, name: str, data: bytes = WEIGHTS) -> None:
    fs, root = fsspec.core.url_to_fs(shelf)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/{name}", data)


def test_files_of_weights_are_backbones_by_their_names(shelf: str) -> None:
    put(shelf, "micro_vit_fashion_mnist.safetensors")
    put(shelf, "vit_tiny_patch16_224__run-7.pth")
    put(shelf, "vit_tiny_patch16_224__run-7.yaml", b"num_classes: 12\nexits: [6, 12]\n")
    put(shelf, "notes.txt")
    put(shelf, ".vit_tiny_patch16_224.pth.upload")
    (first, second), faults = read_shelf(shelf)
    assert faults == []
    assert (first.label, first.backbone.name) == ("micro_vit_fashion_mnist", "micro_vit_fashion_mnist")
    assert (second.label, second.backbone.name) == ("vit_tiny_patch16_224__run-7", "vit_tiny_patch16_224")
    assert (second.backbone.num_classes, second.backbone.exits) == (12, (6, 12))
    assert ("://" in str(first.backbone.checkpoint)) == shelf.startswith("memory")


def test_a_version_is_kept_until_weights_or_description_change(tmp_path: Path) -> None:
    shelf = str(tmp_path)
    put(shelf, "a.safetensors")
    put(shelf, "b.safetensors")

    def versions() -> list[str]:
        return [one.version for one in read_shelf(shelf)[0]]

    before = versions()
    assert len(set(before)) == 2
    assert versions() == before
    put(shelf, "a.yaml", b"exits: [4, 8]")
    described = versions()
    assert described[0] != before[0]
    assert described[1] == before[1]
    os.utime(tmp_path / "b.safetensors", (1, 1))
    assert versions()[1] != before[1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"exits: many", "exits"),
        (b"- 4\n- 8", "want a mapping"),
        (b"{exits: [4", "not YAML"),
        (b"pretrained: true", "unknown pretrained; want name, num_classes"),
    ],
)
def test_a_bad_description_keeps_back_its_weights_and_no_others(shelf: str, text: bytes, why: str) -> None:
    put(shelf, "a.safetensors")
    put(shelf, "b.safetensors")
    put(shelf, "b.yaml", text)
    found, [fault] = read_shelf(shelf)
    assert [one.label for one in found] == ["a"]
    assert "b.safetensors: its description b.yaml" in fault
    assert why in fault


def test_two_files_of_one_name_are_refused(shelf: str) -> None:
    put(shelf, "a.safetensors")
    put(shelf, "a.pth")
    with pytest.raises(BackboneError, match="two files of weights are called a; rename"):
        read_shelf(shelf)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=f"{tmp_path}/shelf: no such folder of backbones; make it"):
        read_shelf(f"{tmp_path}/shelf")


def test_remote_weights_are_copied_once_and_again_when_they_change(tmp_path: Path) -> None:
    shelf = f"memory://{tmp_path.name}-fetched"
    put(shelf, "a.safetensors", b"first")
    copy = fetch_checkpoint(f"{shelf}/a.safetensors", tmp_path / "copies")
    assert copy.read_bytes() == b"first"
    made = copy.stat().st_mtime_ns
    assert fetch_checkpoint(f"{shelf}/a.safetensors", tmp_path / "copies") == copy
    assert copy.stat().st_mtime_ns == made
    put(shelf, "a.safetensors", b"second")
    assert fetch_checkpoint(f"{shelf}/a.safetensors", tmp_path / "copies").read_bytes() == b"second"
    with pytest.raises(CheckpointError, match=r"memory://.*/b.safetensors: no such checkpoint"):
        fetch_checkpoint(f"{shelf}/b.safetensors", tmp_path / "copies")


def test_a_plan_fetches_no_weights_and_says_that_they_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{tmp_path.name}-planned/a.safetensors"
    put(url.removesuffix("/a.safetensors"), "a.safetensors", b"no weights at all")
    monkeypatch.setattr("quee_core.estimate.TRIAL_PIXELS", 1)  # a single image tells the time
    sweep = SweepConfig.model_validate(
        {"backbone": {"name": "micro_vit_fashion_mnist", "checkpoint": url}, "run": {"runs": tmp_path / "runs"}}
    )
    planned, missing = outline(sweep)
    assert missing == (f"{url}: not fetched yet; a sweep copies it to {tmp_path / 'runs' / 'checkpoints'}",)
    assert planned.tree.paths
    assert not (tmp_path / "runs").exists()
    fetch_checkpoint(url, tmp_path / "runs" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        outline(sweep)  # what is there is looked at
