"""Calibration: the quantisers of every layer at every bit-width, found once on unlabelled images, stored and reused."""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import Attention, GluMlp, LayerScale, Mlp, SwiGLU
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from quee_core.archive import Arrays, pack, unpack
from quee_core.backbones.micro_vit import ConvStem
from quee_core.backbones.segmented import DistilledOutput, Output, SegmentedBackbone
from quee_core.backbones.t2t_vit import PerformerTokens
from quee_core.errors import DamagedTableError, NumericError, QuantizationError, ShapeMismatchError
from quee_core.fingerprints import array_fingerprint, fingerprint
from quee_core.paths import BIT_WIDTHS, FULL_PRECISION
from quee_core.quantize.blocks import LayerQuantizers, fit_blocks, is_plain, run_together
from quee_core.quantize.capture import capture
from quee_core.quantize.layers import (
    InParts,
    QuantAttention,
    QuantConv2d,
    QuantLinear,
    check_shape,
    quantized_linear,
    replaced,
    steady,
    with_affine,
)
from quee_core.quantize.methods import (
    AttentionQuantizers,
    LinearQuantizers,
    LinearSamples,
    NormQuantizers,
    QuantMethod,
    RelativeQuantizers,
    quant_method,
)
from quee_core.quantize.performer import (
    PerformerQuantizers,
    PerformerSamples,
    QuantPerformer,
    performer_quantizers,
    performer_rows,
)
from quee_core.quantize.quantizers import from_settings, to_settings

KIND = "calibration"

# Modules that only combine others, or work value by value. Any other could hold a product that stays in float.
_TRANSPARENT = (
    Attention, Block, DistilledOutput, GluMlp, LayerScale, Mlp, nn.ModuleList, nn.Sequential, Output,
    ParallelThingsBlock, ResPostBlock, SwiGLU,
)  # fmt: skip

_DIRECTIONS = "w"  # the random features of a performer, which multiply as a linear layer's weight does


@dataclass(frozen=True, eq=False)
class Calibration:
    """Quantisers by bit-width and layer. `images`: how many were seen.

    `edge` is the bit-width of the stem's first layer and of the final head, `stem` that of the stem's other layers.
    Layers of blocks are named by block ("blocks.3.mlp.fc1"), so that a calibration does not depend on the exits.
    """

    method: str
    edge: int
    stem: int
    images: int
    layers: Mapping[int, Mapping[str, LayerQuantizers]]

    def fingerprint(self) -> str:
        """sha256 over the whole calibration."""
        widths = {str(b): self.fingerprint_of(b) for b in self.layers}
        return fingerprint([self.method, self.edge, self.stem, self.images, widths])

    def fingerprint_of(self, bits: int) -> str:
        """sha256 over the quantisers of one bit-width; other bit-widths do not matter. 32 bits has none."""
        if bits == FULL_PRECISION:
            return fingerprint("float")
        arrays, settings = _to_plain(self._at(bits))
        return fingerprint([array_fingerprint(arrays), settings])

    def to_bytes(self) -> bytes:
        """The calibration as one archive, without pickle."""
        arrays: Arrays = {}
        layers: dict[str, Any] = {}
        for bits, found in self.layers.items():
            own, layers[str(bits)] = _to_plain(found)
            arrays |= {f"{bits}/{name}": array for name, array in own.items()}
        settings = {
            "method": self.method, "edge": self.edge, "stem": self.stem, "images": self.images, "layers": layers,
        }  # fmt: skip
        return pack(arrays, settings, kind=KIND)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Calibration":
        """Read back what `to_bytes` wrote. Raises DamagedTableError for anything else."""
        arrays, settings = unpack(data, kind=KIND)
        try:
            layers = {
                int(bits): {name: _from_plain(arrays, f"{bits}/{name}", made) for name, made in found.items()}
                for bits, found in settings["layers"].items()
            }
            return cls(settings["method"], settings["edge"], settings["stem"], settings["images"], layers)
        except (KeyError, TypeError, ValueError, QuantizationError) as error:
            raise DamagedTableError(f"not a calibration that quee wrote: {error!r}") from error

    def _at(self, bits: int) -> Mapping[str, LayerQuantizers]:
        if bits not in self.layers:
            raise QuantizationError(f"calibration: none at {bits} bits, only at {sorted(self.layers)}; calibrate again")
        return self.layers[bits]


class QuantizedBackbone(nn.Module):
    """A backbone whose segments can run at any calibrated bit-width, or at 32, which is the backbone itself.

    backbone: the float one, whose norms and embeddings the quantised parts share. stem: images to tokens at the edge
    bit-width. final: tokens to logits at the edge bit-width, None without a head.
    """

    def __init__(
        self,
        backbone: SegmentedBackbone,
        stem: nn.Module,
        segments: Mapping[int, Sequence[nn.Module]],
        final: nn.Module | None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.stem = stem
        self._segments = nn.ModuleDict({str(bits): nn.ModuleList(parts) for bits, parts in segments.items()})
        self.final = final

    @property
    def bits(self) -> tuple[int, ...]:
        """Bit-widths that segments can run at, ascending."""
        return (*sorted(map(int, self._segments)), FULL_PRECISION)

    def segments(self, index: int, bits: int) -> nn.Module:
        """Segment `index` (from 0) at `bits`. Raises QuantizationError for a bit-width that it was not made for."""
        if bits == FULL_PRECISION:
            return self.backbone.segments[index]
        if str(bits) not in self._segments:
            raise QuantizationError(f"segment {index + 1}: not quantised to {bits} bits, only to {list(self.bits)}")
        part: nn.Module = self._segments[str(bits)][index]  # type: ignore[index]
        return part


def calibrate(
    backbone: SegmentedBackbone,
    images: Tensor | Iterable[Tensor],
    bits: Sequence[int],
    method: str,
    *,
    edge_bits: int,
    stem_bits: int | None = None,
) -> Calibration:
    """Find the quantisers of every layer of the blocks at each of `bits`, and of stem and head at `edge_bits`.

    stem_bits: bit-width of the stem's layers behind its first, the one that sees the image; by default `edge_bits`.
    images: float [n, c, h, w], or batches of them; preprocessed, unlabelled, out of `fit`, a few hundred. The float
    backbone runs over them once, and what its layers are given is sampled on the way; each layer is then judged by
    itself, but for blocks that the method fits as a whole, over which the images run again at each bit-width. 32 among
    `bits`, or as `edge_bits`, needs no quantisers.
    Raises NumericError that names a layer with values that are not finite, QuantizationError for an unknown method or
    bit-width, no images, a backbone in training mode, or a kind of layer that cannot be quantised.
    """
    chosen = quant_method(method)
    stem_bits = stem_bits or edge_bits
    if unknown := [b for b in (*bits, edge_bits, stem_bits) if b not in BIT_WIDTHS]:
        raise QuantizationError(f"calibration: bit-widths {unknown} are not among {list(BIT_WIDTHS)}")
    if (edge_bits == FULL_PRECISION) != (stem_bits == FULL_PRECISION):
        raise QuantizationError(
            f"calibration: stem at {stem_bits} bits, its first layer at {edge_bits}: 32 bits are for both or none; set "
            "quantization.stem_bits and quantization.edge_bits together"
        )
    batches = [images] if isinstance(images, Tensor) else [*images]
    if not sum(map(len, batches)):
        raise QuantizationError("calibration: no images")
    given = torch.cat(batches)
    if backbone.training:
        raise QuantizationError("calibration: the backbone must be in evaluation mode; call its eval() first")
    inner = sorted({*bits} - {FULL_PRECISION})
    widths = sorted({*inner, edge_bits, stem_bits} - {FULL_PRECISION})
    layers: dict[int, dict[str, LayerQuantizers]] = {width: {} for width in widths}
    stem = _folded(backbone.stem)
    in_stem = _quantizable(stem, "stem")
    first = next((name for name, part in in_stem.items() if isinstance(part, nn.Linear | nn.Conv2d)), None)
    behind_first = in_stem.keys() - {first}
    blocks = [block for part in backbone.segments for block in part.blocks]  # type: ignore[union-attr]
    as_a_whole = tuple(f"blocks.{k}." for k, block in enumerate(blocks) if chosen.blocks and is_plain(block))
    with torch.inference_mode():
        for name, layer, samples in capture(backbone, stem, given, _quantizable):
            if name.startswith(as_a_whole):  # captured all the same: values that are not finite are found here
                continue
            edge = stem_bits if name in behind_first else edge_bits
            for width in inner if name.startswith("blocks.") else {edge} - {FULL_PRECISION}:
                if isinstance(samples, LinearSamples):
                    layers[width][name] = _linear_quantizers(layer, samples, width, chosen)
                elif isinstance(samples, PerformerSamples):
                    rows = performer_rows(samples)
                    layers[width][f"{name}.{_DIRECTIONS}"] = chosen.linear(samples.directions, rows, width)
                    layers[width][name] = performer_quantizers(samples, width)
                else:
                    layers[width][name] = chosen.attention(samples, width)
        if chosen.blocks is not None and inner and as_a_whole:
            quantized_stem = _quantized_stem(backbone, edge_bits, stem_bits, layers)
            tokens = run_together(quantized_stem, given), run_together(backbone.stem, given)
            for width in inner:
                fit_blocks(blocks, tokens, width, chosen.blocks, layers[width], _quantized, backbone.num_prefix_tokens)
    return Calibration(method, edge_bits, stem_bits, len(given), layers)


def quantize_backbone(backbone: SegmentedBackbone, calibration: Calibration, bits: Sequence[int]) -> QuantizedBackbone:
    """The backbone with its segments at each of `bits` besides 32, stem and head at the calibration's bit-widths.

    `backbone` stays as it is. Raises QuantizationError if the calibration lacks a bit-width or a layer, or was made
    for layers of other shapes.
    """
    final = backbone.final
    image_size = backbone.num_tokens * backbone.embed_dim
    if calibration.edge != FULL_PRECISION:
        final = None if final is None else _quantized(final, "final", calibration._at(calibration.edge))
        calibration._at(calibration.stem)  # or says that it is missing
    stem = _quantized_stem(backbone, calibration.edge, calibration.stem, calibration.layers)
    starts = (0, *backbone.exits[:-1])
    segments = {}
    for width in sorted({*bits} - {FULL_PRECISION}):
        found = calibration._at(width)
        blocks = [
            [_quantized(block, f"blocks.{k}", found) for k, block in enumerate(part.blocks, start)]  # type: ignore[arg-type]
            for start, part in zip(starts, backbone.segments, strict=True)
        ]
        segments[width] = [InParts(nn.Sequential(*part), image_size) for part in blocks]
    return QuantizedBackbone(backbone, stem, segments, final).eval().requires_grad_(False)


def quantize_linear(linear: nn.Linear, inputs: Tensor, bits: int, method: str) -> nn.Module:
    """A linear layer quantised by itself; `linear` itself at 32 bits.

    inputs: float [n, in], n ≥ 1, a sample of what it is given. Raises NumericError for inputs that are not finite,
    ShapeMismatchError for inputs of another width, QuantizationError for an unknown method.
    """
    if bits == FULL_PRECISION:
        return linear
    if inputs.dim() != 2 or inputs.shape[1] != linear.in_features or not len(inputs):
        raise ShapeMismatchError(f"inputs {tuple(inputs.shape)} of a linear layer; want [n, {linear.in_features}]")
    with torch.inference_mode():
        rows = inputs.float()
        low, high = (float(end) for end in rows.aminmax())
        if not (-torch.inf < low and high < torch.inf):
            raise NumericError("inputs of a linear layer: NaN or infinite values; no range can be found for them")
        found = _linear_quantizers(linear, LinearSamples(rows, low, high), bits, quant_method(method))
    return quantized_linear(linear, found)


def linear_to_arrays(layer: QuantLinear) -> Arrays:
    """A quantised linear layer as arrays: weight int8 [out, in], scale and bias float32 [out]; inputs."""
    settings = json.dumps(to_settings(layer.inputs), sort_keys=True).encode()
    return {
        "weight": layer.integers().cpu().numpy(),
        "scale": layer.weight_scale.cpu().numpy(),
        "bias": layer.bias.cpu().numpy(),
        "inputs": np.frombuffer(settings, np.uint8),
    }


def linear_from_arrays(arrays: Mapping[str, NDArray[Any]]) -> QuantLinear:
    """The layer that `linear_to_arrays` wrote; it computes the same bits. Raises DamagedTableError for other arrays."""
    try:
        inputs = from_settings(json.loads(arrays["inputs"].tobytes()))
        weight, scale, bias = (torch.from_numpy(arrays[name].copy()) for name in ("weight", "scale", "bias"))
        return QuantLinear(weight, scale, bias, inputs)
    except (KeyError, ValueError, QuantizationError) as error:
        raise DamagedTableError(f"not the arrays of a quantised linear layer: {error!r}") from error


def _linear_quantizers(layer: nn.Module, samples: LinearSamples, bits: int, method: QuantMethod) -> LinearQuantizers:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return method.linear(weight.detach().float().flatten(1), samples, bits)


def _quantizable(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Every linear layer, convolution and attention in `module`, by name.

    Raises QuantizationError for one that has no integer version here, and for a module that may multiply in float.
    """
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules(prefix=prefix):
        where = f"{name}: a {type(part).__name__} that cannot be quantised"
        if type(part) is nn.Linear or isinstance(part, Attention | PerformerTokens):
            found[name] = part
        elif type(part) is nn.Conv2d:
            if part.groups != 1 or part.padding_mode != "zeros" or part.padding == "same":
                raise QuantizationError(f"{where}: groups {part.groups}, padding {part.padding} ({part.padding_mode})")
            found[name] = part
        elif isinstance(part, nn.Linear | nn.Conv2d):
            raise QuantizationError(f"{where}: only plain linear layers and convolutions have integer versions")
        elif prefix != "stem" and any(True for _ in part.children()) and not isinstance(part, _TRANSPARENT):
            raise QuantizationError(f"{where}: it may multiply activations in float")
    return found


def _folded(stem: nn.Module) -> nn.Module:
    """The stem with batch normalisation folded into the convolutions before it; the stem itself if there is none."""
    patches = stem.patch_embed
    if not isinstance(patches, ConvStem):
        return stem
    folded = copy.copy(patches)
    folded._modules = dict(patches._modules)
    folded.conv1, folded.bn1 = fuse_conv_bn_eval(patches.conv1, patches.bn1), nn.Identity()  # type: ignore[assignment]
    folded.conv2, folded.bn2 = fuse_conv_bn_eval(patches.conv2, patches.bn2), nn.Identity()  # type: ignore[assignment]
    return replaced(stem, "", {"patch_embed": folded})


def _quantized_stem(
    backbone: SegmentedBackbone, edge: int, stem: int, layers: Mapping[int, Mapping[str, LayerQuantizers]]
) -> nn.Module:
    """The stem at bit-widths `stem` and, for its first layer, `edge`; the backbone's own where those are 32."""
    if edge == FULL_PRECISION:
        return backbone.stem
    quantized = _quantized(_folded(backbone.stem), "stem", {**layers[stem], **layers[edge]})
    return InParts(quantized, backbone.num_tokens * backbone.embed_dim)


def _quantized(module: nn.Module, prefix: str, found: Mapping[str, LayerQuantizers]) -> nn.Module:
    """`module` with quantised linear layers, convolutions and attention, norms to suit, and steady activations."""
    changed: dict[str, nn.Module] = {
        name: kept for name, part in module.named_modules(prefix=prefix) if (kept := steady(part)) is not None
    }
    products: dict[str, Attention | PerformerTokens] = {}
    for name, part in _quantizable(module, prefix).items():
        quantizers = found.get(name)
        if (isinstance(part, Attention) and isinstance(quantizers, AttentionQuantizers | RelativeQuantizers)) or (
            isinstance(part, PerformerTokens) and isinstance(quantizers, PerformerQuantizers)
        ):
            products[name] = part
        elif isinstance(part, nn.Linear) and isinstance(quantizers, LinearQuantizers):
            changed[name] = quantized_linear(part, quantizers, name)
        elif isinstance(part, nn.Conv2d) and isinstance(quantizers, LinearQuantizers):
            check_shape(quantizers, part.weight, name)
            weight = quantizers.integers.reshape(part.weight.shape)
            changed[name] = QuantConv2d(part, weight, quantizers.scale, quantizers.correction, quantizers.inputs)
        else:
            raise QuantizationError(f"calibration: no quantisers for {name}; it was made for another backbone")
    for name, part in module.named_modules(prefix=prefix):
        affine = found.get(name)
        if isinstance(part, nn.LayerNorm) and isinstance(affine, NormQuantizers):
            changed[name] = with_affine(part, affine)
    for name, part in products.items():
        inner = replaced(part, name, changed)
        if isinstance(part, PerformerTokens):
            directions = _quantized_directions(part, found.get(f"{name}.{_DIRECTIONS}"), name)
            changed[name] = QuantPerformer(inner, directions, found[name])  # type: ignore[arg-type]
        else:
            changed[name] = QuantAttention(inner, found[name])  # type: ignore[arg-type]
    return replaced(module, prefix, changed)


def _quantized_directions(layer: PerformerTokens, found: LayerQuantizers | None, name: str) -> QuantLinear:
    if not isinstance(found, LinearQuantizers):
        raise QuantizationError(
            f"calibration: no quantisers for {name}.{_DIRECTIONS}; it was made for another backbone"
        )
    check_shape(found, layer.w, f"{name}.{_DIRECTIONS}")
    return QuantLinear(found.integers, found.scale, found.correction, found.inputs).to(layer.w.device)


def _to_plain(found: Mapping[str, LayerQuantizers]) -> tuple[Arrays, dict[str, Any]]:
    arrays: Arrays = {}
    settings: dict[str, Any] = {}
    for name, layer in found.items():
        if isinstance(layer, LinearQuantizers):
            settings[name] = {"inputs": to_settings(layer.inputs)}
            for part in ("integers", "scale", "correction"):
                arrays[f"{name}/{part}"] = getattr(layer, part).cpu().numpy()
        elif isinstance(layer, NormQuantizers):
            settings[name] = {}
            for part in ("weight", "bias"):
                arrays[f"{name}/{part}"] = getattr(layer, part).cpu().numpy()
        else:
            settings[name] = {operand: to_settings(getattr(layer, operand)) for operand in asdict(layer)}
    return arrays, settings


def _from_plain(arrays: Arrays, name: str, made: Mapping[str, Any]) -> LayerQuantizers:
    quantizers = {operand: from_settings(settings) for operand, settings in made.items()}
    tensors = {
        part: torch.from_numpy(arrays[f"{name}/{part}"].copy())
        for part in ("integers", "scale", "correction", "weight", "bias")
        if f"{name}/{part}" in arrays
    }
    if "integers" in tensors:
        return LinearQuantizers(quantizers["inputs"], **tensors)
    if tensors:
        return NormQuantizers(**tensors)
    for kind in (PerformerQuantizers, RelativeQuantizers, AttentionQuantizers):
        if quantizers.keys() == {field.name for field in fields(kind)}:
            return kind(**quantizers)
    raise QuantizationError(f"calibration: {name} has quantisers of {sorted(quantizers)}, which no layer has")
