"""What the layers of a float backbone are given: samples for calibration, piece by piece, in bounded memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional

from quee_core.backbones.segmented import SegmentedBackbone
from quee_core.backbones.t2t_vit import TOKEN_WIDTH, PerformerTokens
from quee_core.errors import NumericError
from quee_core.quantize.methods import AttentionSamples, LinearSamples
from quee_core.quantize.performer import PerformerSamples

KEPT_ROWS = 8192  # of each linear layer's inputs, out of all tokens of all images
LEAST_QUERIES = 8  # of an image whose attention is kept
KEPT_IMAGES = 16  # whose attention is kept of each layer
KEPT_SCORES = 2**18  # attention weights among them at most; where all would be more, evenly spaced queries are kept
TOGETHER = 32  # images that run at a time

Samples = LinearSamples | AttentionSamples | PerformerSamples
Layers = Mapping[str, nn.Module]  # nn.Linear, nn.Conv2d, Attention and PerformerTokens by name


@dataclass(slots=True)
class _Seen:
    """Grows while the images pass: the kept values, and the extremes of all."""

    kept: list[Tensor] = field(default_factory=list)
    low: float = 0.0
    high: float = 0.0

    def add(self, values: Tensor, kept: Tensor, name: str) -> None:
        low, high = (float(end) for end in values.aminmax())
        if not (-torch.inf < low and high < torch.inf):  # also false for NaN
            raise NumericError(f"{name}: NaN or infinite values on the calibration images; look at weights and images")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.kept.append(kept.clone())

    def linear(self) -> LinearSamples:
        return LinearSamples(torch.cat(self.kept), self.low, self.high)


def capture(
    backbone: SegmentedBackbone, stem: nn.Module, images: Tensor, layers_of: Callable[[nn.Module, str], Layers]
) -> Iterator[tuple[str, nn.Module, Samples]]:
    """Name, layer and samples of each layer of stem, blocks and output, while the float backbone answers for `images`.

    stem: takes the place of `backbone.stem`. images: float [n, c, h, w]. layers_of: the layers of a piece, by name,
    out of the piece and its own name. Blocks are called "blocks.0", whatever segment they are in.
    Raises NumericError that names the layer whose values are not finite.
    """
    pieces: list[tuple[str, nn.Module]] = [("stem", stem)]
    blocks = [block for segment in backbone.segments for block in segment.blocks]  # type: ignore[union-attr]
    pieces += [(f"blocks.{k}", block) for k, block in enumerate(blocks)]
    if backbone.final is not None:
        pieces.append(("final", backbone.final))
    values = images
    for name, piece in pieces:
        layers = layers_of(piece, name)
        values, seen = _run(piece, layers, values)
        for layer_name, layer in layers.items():
            yield layer_name, layer, seen.pop(layer_name)()


def _run(piece: nn.Module, layers: Layers, values: Tensor) -> tuple[Tensor, dict[str, Callable[[], Samples]]]:
    generator = torch.Generator().manual_seed(0)
    gather: dict[str, Callable[[], Samples]] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            if isinstance(layer, Attention):
                hook, gather[name] = attention_hook(name, layer)
                handle = layer.qkv.register_forward_hook(hook)
            elif isinstance(layer, PerformerTokens):
                hook, gather[name] = _performer_hook(name, layer)
                handle = layer.kqv.register_forward_hook(hook)
            else:
                before, gather[name] = linear_hook(name, len(values), generator)
                handle = layer.register_forward_pre_hook(before)
            hooks.callback(handle.remove)
        behind = torch.cat([piece(part) for part in torch.split(values, TOGETHER)])
    return behind, gather


def linear_hook(
    name: str, images: int, generator: torch.Generator
) -> tuple[Callable[[nn.Module, tuple[Tensor]], None], Callable[[], LinearSamples]]:
    """What to call before a layer, `name` in errors, runs on some of `images`; and what its inputs' sample then is."""
    seen = _Seen()

    def hook(layer: nn.Module, given: tuple[Tensor]) -> None:
        values = given[0].float()
        share = len(values) / images * KEPT_ROWS
        rows = _patches(layer, values) if isinstance(layer, nn.Conv2d) else values.reshape(-1, values.shape[-1])
        if len(rows) > share:
            picked = torch.randperm(len(rows), generator=generator)[: max(1, int(share))]
            rows = rows[picked.sort().values.to(rows.device)]
        seen.add(values, rows, name)

    return hook, seen.linear


def _patches(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """What a convolution without groups multiplies its flattened weight with: float32 [n h' w', c kh kw]."""
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding  # only "valid" is let through
    columns = functional.unfold(images, conv.kernel_size, dilation=conv.dilation, padding=padding, stride=conv.stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def attention_hook(
    name: str, attention: Attention, kept_images: int = KEPT_IMAGES
) -> tuple[Callable[[nn.Module, object, Tensor], None], Callable[[], AttentionSamples]]:
    """What to call with each output of `qkv`; and what the sample of attention's operands then is."""
    operands = {"query": _Seen(), "key": _Seen(), "value": _Seen()}

    def hook(_layer: nn.Module, _given: object, output: Tensor) -> None:
        images, tokens, _ = output.shape
        parts = output.float().view(images, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
        normed = attention.q_norm(parts[0]), attention.k_norm(parts[1]), parts[2]
        # of many images few queries each would be kept, of the largest models the class token's alone
        most = min(kept_images, max(1, KEPT_SCORES // (attention.num_heads * tokens * LEAST_QUERIES)))
        room = max(most - sum(map(len, operands["query"].kept)) // attention.num_heads, 0)
        step = -(-most * attention.num_heads * tokens**2 // KEPT_SCORES)
        for (operand, seen), values in zip(operands.items(), normed, strict=True):
            kept = values[:room].flatten(0, 1)
            seen.add(values, kept[:, ::step] if operand == "query" else kept, f"{name} ({operand})")

    def samples() -> AttentionSamples:
        query, key, value = (torch.cat(seen.kept) for seen in operands.values())
        ranges = {operand: (seen.low, seen.high) for operand, seen in operands.items()}
        return AttentionSamples(query, key, value, attention.scale, ranges)

    return hook, samples


def _performer_hook(
    name: str, layer: PerformerTokens
) -> tuple[Callable[[nn.Module, object, Tensor], None], Callable[[], Samples]]:
    operands = {"keys": _Seen(), "queries": _Seen(), "values": _Seen()}

    def hook(_layer: nn.Module, _given: object, output: Tensor) -> None:
        room = max(KEPT_IMAGES - sum(map(len, operands["keys"].kept)), 0)
        for (operand, seen), values in zip(operands.items(), output.float().split(TOKEN_WIDTH, dim=-1), strict=True):
            seen.add(values, values[:room], f"{name} ({operand})")

    def samples() -> Samples:
        keys, queries, values = (torch.cat(seen.kept) for seen in operands.values())
        seen = operands["values"]
        return PerformerSamples(keys, queries, values, layer.w.detach().float(), (seen.low, seen.high))

    return hook, samples
