"""Weights files: read without running code, checked against the model before a single weight is touched."""

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from quee_core.errors import CheckpointError, MissingWeightsError

# Where training scripts keep the weights inside a checkpoint; averaged weights first, as timm does.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Put in front of every name by data-parallel training and by torch.compile.
_PREFIXES = ("module.", "_orig_mod.")
_HEADS = ("head", "head_dist")
_NAMED = 3
TRAINING_STATE = "quee.training"  # key in a file that `quee finetune` goes on from, which is no file of weights


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a weights file: tensors by name, on the CPU.

    Reads safetensors, and torch pickles with `weights_only=True`: a file that holds anything but plain tensors and
    containers could run code when loaded, and is refused. Unwraps `state_dict_ema`, `model_ema`, `state_dict` and
    `model` (the first of them that is there), and takes off the prefixes `module.` and `_orig_mod.`.
    Raises CheckpointError, naming the file, if it is damaged, unsafe, or holds no state dict; MissingWeightsError if it
    is not there.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except FileNotFoundError:
        raise MissingWeightsError(f"{path}: no such checkpoint file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    is_pickle = path.suffix != ".safetensors" and (start == b"PK" or start[:1] == b"\x80")
    content = _read_pickle(path) if is_pickle else _read_safetensors(path)
    if isinstance(content, Mapping) and TRAINING_STATE in content:
        raise CheckpointError(
            f"{path}: what `quee finetune` goes on from, and does not say which images it has seen; name the weights "
            "beside it, which are there once the training is done"
        )
    return state_dict_of(content, path)


def read_note(path: Path, name: str) -> str | None:
    """What the metadata of a safetensors file say under `name`; None for no such note, or another kind of file."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as file:
            notes: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError):
        return None  # whoever reads the weights says what is wrong with them
    return notes.get(name)


def state_dict_of(content: object, source: object) -> dict[str, Tensor]:
    """The state dict in what a weights file holds, unwrapped and without prefixes as `read_checkpoint` says.

    source: what errors name. Raises CheckpointError if there is none.
    """
    if isinstance(content, Mapping):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{source}: holds no state dict; want tensors by parameter name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{source}: holds no state dict: {name!r} is a {type(value).__name__}; want tensors by parameter name"
            )
    state = dict(content)
    while prefix := next((own for own in _PREFIXES if all(name.startswith(own) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `model`, if every name, shape and kind of number fits and every value is finite.

    source: the file or place that errors name. Raises CheckpointError that names the first few faults, or the two
    class counts where only the head differs; `model` is then unchanged.
    """
    expected = model.state_dict()
    if fault := _head_fault(expected, state):
        raise CheckpointError(f"{source}: {fault}")
    faults = []
    if missing := [name for name in expected if name not in state]:
        faults.append(f"lacks {_first(missing)}")
    if unexpected := [name for name in state if name not in expected]:
        faults.append(f"has {_first(unexpected)}, which the model does not")
    shared = {name: (state[name], expected[name]) for name in expected if name in state}
    if misshapen := [name for name, (given, wanted) in shared.items() if given.shape != wanted.shape]:
        shapes = (f"{name} {list(state[name].shape)}, not {list(expected[name].shape)}" for name in misshapen)
        faults.append(f"has wrong shapes: {_first(shapes)}{_size_hint(misshapen)}")
    if other := [
        name for name, (given, want) in shared.items() if given.is_floating_point() != want.is_floating_point()
    ]:
        kinds = (f"{name} {state[name].dtype}, not {expected[name].dtype}" for name in other)
        faults.append(f"has wrong types: {_first(kinds)}")
    if faults:
        raise CheckpointError(f"{source}: made for another model: {'; '.join(faults)}")
    if broken := [name for name, (given, _) in shared.items() if not given.isfinite().all()]:
        raise CheckpointError(f"{source}: values that are not finite in {_first(broken)}: training diverged, or damage")
    model.load_state_dict(dict(state), strict=True)


def without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the classifiers `head` and `head_dist`, for a model that is built without them."""
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in _HEADS}


def weights_fingerprint(model: nn.Module) -> str:
    """Sha256, in hex, over a model's architecture and weights: what its answers depend on, wherever it is cut.

    Weights: names, types, shapes and bytes of the state dict. Architecture: for every module its class and its plain
    settings (numbers of heads, epsilons, strides, …), which a state dict does not show.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        settings = {
            key: repr(value)
            for key, value in sorted(vars(module).items())
            if not key.startswith("_") and key != "training" and _is_plain(value)
        }
        digest.update(json.dumps([name, type(module).__qualname__, settings]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_safetensors(path: Path) -> object:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        expected = "a safetensors file" if path.suffix == ".safetensors" else "safetensors or a torch checkpoint"
        raise CheckpointError(f"{path}: damaged, cut short, or not {expected} ({error})") from error


def _read_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: a pickle that holds more than plain tensors could run code when loaded, or is damaged; "
            "save the weights alone, with safetensors.torch.save_file(model.state_dict(), …)"
        ) from error
    except Exception as error:  # damage makes the unpickler trip over its own stack, in any way that Python knows
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: damaged, cut short, or not a torch checkpoint ({reason})") from error


def _head_fault(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """What is wrong if the state fits but for the class count; None if it fits, or is wrong elsewhere too."""
    body = {name: tensor.shape for name, tensor in without_head(expected).items()}
    if {name: tensor.shape for name, tensor in without_head(state).items()} != body:
        return None
    classes, given = _class_count(expected), _class_count(state)
    if classes == given:
        return None
    if given is None:
        return f"has no classifier head, and the model one of {classes} classes: build the model with num_classes 0"
    if classes is None:
        return f"has a head of {given} classes, and the model none: set num_classes to {given}"
    return (
        f"has a head of {given} classes, and the model one of {classes}: set num_classes to {given} if those are the "
        f"images' classes, or fine-tune it to the {classes} first (`quee finetune`, configs/finetune)"
    )


def _class_count(state: Mapping[str, Tensor]) -> int | None:
    weight = state.get("head.weight")
    return None if weight is None or weight.ndim != 2 else len(weight)


def _size_hint(misshapen: list[str]) -> str:
    return " (made for another image size?)" if misshapen == ["pos_embed"] else ""


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _NAMED
    return ", ".join(listed[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
