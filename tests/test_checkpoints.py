"""Weights files: plain ones load whole; damaged, unsafe and foreign ones are refused, and the model stays as it was."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

from quee_core.backbones.checkpoints import load_weights, read_checkpoint, weights_fingerprint, without_head
from quee_core.backbones.micro_vit import micro_vit
from quee_core.errors import CheckpointError

State = dict[str, Tensor]


def small_model(num_classes: int = 3, seed: int = 0, **overrides: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = micro_vit(depth=1, embed_dim=16, num_heads=2, num_classes=num_classes, **overrides).eval()
    return model


STATE: State = small_model().state_dict()


def equal(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        OrderedDict,
        lambda state: {"state_dict": state, "epoch": 3, "arch": "micro_vit"},
        lambda state: {"model": state, "optimizer": {"lr": 0.1, "param_groups": [{"params": [1, 2]}]}},
        lambda state: {"state_dict_ema": state, "state_dict": {name: t + 1 for name, t in state.items()}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_checkpoints_of_the_usual_kinds_load(wrap: Callable[[State], Any], legacy: bool, tmp_path: Path) -> None:
    torch.save(wrap(STATE), tmp_path / "last.pth", _use_new_zipfile_serialization=not legacy)
    assert equal(read_checkpoint(tmp_path / "last.pth"), STATE)


@pytest.mark.parametrize("filename", ["weights.safetensors", "weights.bin", "weights"])
def test_safetensors_are_known_by_content(filename: str, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / filename)
    assert equal(read_checkpoint(tmp_path / filename), STATE)


def test_a_name_that_only_begins_with_module_for_some_is_kept(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(2), "head.weight": torch.ones(3)}
    save_file(state, tmp_path / "mixed.safetensors")
    assert equal(read_checkpoint(tmp_path / "mixed.safetensors"), state)


@given(keep=st.floats(0, 0.999), kind=st.sampled_from(["safetensors", "zip", "legacy"]))
def test_a_truncated_file_is_damaged_whatever_its_kind(
    keep: float, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        path.write_bytes(save(STATE))
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(CheckpointError, match=r"weights.*damaged"):
        read_checkpoint(path)


class _Innocent:
    """What training scripts leave in checkpoints: harmless, but only running its code would tell."""


class _Harmful:
    """On loading, a pickle of it creates a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_is_not_plain_weights_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "bad.pth"
    for guest in (_Innocent(), _Harmful(victim), small_model()):
        torch.save({"state_dict": STATE, "args": guest}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match=r"bad\.pth: refused: a pickle.*safetensors"):
            read_checkpoint(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (torch.ones(3), "holds no state dict"),
        ([torch.ones(3)], "holds no state dict"),
        ({}, "holds no state dict"),
        ({"state_dict": {}}, "holds no state dict"),
        ({"epoch": 3, "loss": 0.5}, "'epoch' is a int"),
        ({0: torch.ones(3)}, "want tensors by parameter name"),
    ],
)
def test_a_pickle_without_a_state_dict(content: Any, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"odd\.pth.*{says}"):
        read_checkpoint(tmp_path / "odd.pth")


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04 no archive", b"<!doctype html>", b"{}" * 40])
@pytest.mark.parametrize("filename", ["page.pth", "page.safetensors"])
def test_a_file_of_another_kind(content: bytes, filename: str, tmp_path: Path) -> None:
    (tmp_path / filename).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"page\..*damaged"):
        read_checkpoint(tmp_path / filename)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pth: no such checkpoint file"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path)


def test_weights_that_fit_are_loaded_whole() -> None:
    model = small_model(seed=1)
    assert not equal(model.state_dict(), STATE)
    load_weights(model, STATE, "here")
    assert equal(model.state_dict(), STATE)


def _without(*names: str) -> State:
    return {name: tensor for name, tensor in STATE.items() if name not in names}


def _with(**tensors: Tensor) -> State:
    return STATE | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (_without("cls_token"), "made for another model: lacks cls_token$"),
        (_with(extra=torch.ones(1)), "has extra, which the model does not"),
        ({f"encoder.{name}": t for name, t in STATE.items()}, r"lacks .* and \d+ more; has encoder\..* and \d+ more"),
        (_with(norm__weight=torch.ones(17)), r"wrong shapes: norm\.weight \[17\], not \[16\]"),
        (
            _with(pos_embed=torch.ones(1, 65, 16)),
            r"pos_embed \[1, 65, 16\], not \[1, 50, 16\] \(made for another image",
        ),
        (
            _with(norm__weight=torch.ones(16, dtype=torch.int8)),
            "wrong types: norm.weight torch.int8, not torch.float32",
        ),
        (_with(norm__weight=torch.full((16,), torch.nan)), "not finite in norm.weight"),
        (_with(norm__bias=torch.full((16,), -torch.inf)), "not finite in norm.bias"),
        (small_model(7).state_dict(), "has a head of 7 classes, and the model one of 3: set num_classes to 7"),
        (without_head(STATE), "has no classifier head, and the model one of 3 classes"),
        ({}, r"lacks .* and \d+ more$"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(state: State, says: str) -> None:
    model = small_model(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"here: .*{says}"):
        load_weights(model, state, "here")
    assert equal(model.state_dict(), before)


def test_a_head_for_a_model_that_has_none() -> None:
    model = small_model(num_classes=0)
    with pytest.raises(CheckpointError, match="has a head of 3 classes, and the model none: set num_classes to 3"):
        load_weights(model, STATE, "here")
    load_weights(model, without_head(STATE), "here")
    assert equal(model.state_dict(), without_head(STATE))


@given(st.data())
def test_the_fingerprint_sees_a_change_of_any_single_bit(data: st.DataObject) -> None:
    model = small_model()
    before = weights_fingerprint(model)
    assert weights_fingerprint(small_model()) == before
    state = model.state_dict()
    tensor = state[data.draw(st.sampled_from(sorted(state)))].view(-1)
    position = data.draw(st.integers(0, len(tensor) - 1))
    bits = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)
    bits[position] ^= 1
    assert weights_fingerprint(model) != before
    bits[position] ^= 1
    assert weights_fingerprint(model) == before


def test_the_fingerprint_sees_settings_that_a_state_dict_does_not_show() -> None:
    model = small_model()
    other = small_model(act_layer=nn.ReLU)
    more_heads = micro_vit(depth=1, embed_dim=16, num_heads=4, num_classes=3)
    for variant in (other, more_heads):
        variant.load_state_dict(model.state_dict())
    assert len({weights_fingerprint(each) for each in (model, other, more_heads)}) == 3


def test_the_fingerprint_ignores_mode_and_gradients() -> None:
    assert weights_fingerprint(small_model().train()) == weights_fingerprint(small_model().requires_grad_(False))
