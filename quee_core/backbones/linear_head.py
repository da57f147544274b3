"""A linear classifier in a file of its own, for a backbone that has none: DINOv2 is published that way."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quee_core.backbones.checkpoints import read_checkpoint
from quee_core.errors import CheckpointError

_NAMED = 4


def attach_head(model: Any, source: Path) -> None:
    """Give `model`, a timm `VisionTransformer` without a head, the linear one in the file `source`.

    The file (see `read_checkpoint`) holds one weight float [C, d] or [C, 2 d] and a bias [C]: d features are what the
    model gives for an image, 2 d the class token and the mean of the patch tokens behind the last norm (DINOv2's linear
    heads on one layer). Raises CheckpointError that says what does not fit.
    """
    state = read_checkpoint(source)
    named: dict[str, Tensor] = {name.rpartition(".")[2]: tensor for name, tensor in state.items()}
    if set(named) != {"weight", "bias"} or len(state) != len(named) or named["weight"].ndim != 2:
        held = ", ".join(sorted(state)[:_NAMED])
        raise CheckpointError(f"{source}: holds {held}; want the weight and the bias of one layer")
    weight, bias = named["weight"].float(), named["bias"].float()
    classes, width = weight.shape
    takes = [model.embed_dim, 2 * model.embed_dim] if model.has_class_token else [model.embed_dim]
    if width not in takes or bias.shape != (classes,):
        wanted = " or ".join(f"[classes, {w}]" for w in takes)
        raise CheckpointError(
            f"{source}: weight {list(weight.shape)} and bias {list(bias.shape)}; want {wanted}, and [classes]"
        )
    if not (bool(weight.isfinite().all()) and bool(bias.isfinite().all())):
        raise CheckpointError(f"{source}: values that are not finite: training diverged, or damage")
    model.head = blank_head(width, classes)
    model.head.load_state_dict({"weight": weight, "bias": bias})
    model.num_classes = classes


def blank_head(width: int, classes: int) -> nn.Linear:
    """A head from `width` features to `classes` logits, its weights to be loaded; draws no random numbers."""
    return torch.nn.utils.skip_init(nn.Linear, width, classes)  # type: ignore[no-any-return]
