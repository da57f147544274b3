"""Blocks fitted as a whole: the layers of a plain transformer block one after the other, at one bit-width.

Behind both LayerNorms levels are per channel (`repq`). A linear layer's weights and bias are those of least squared
error on quantised inputs, by ridge regression from sums over all tokens of all images (`moments`), and are then
rounded so that what is left makes up for the error. With `compensates`, a layer is given what the quantised layers
before it make of the images, those of earlier blocks at the same bit-width included, and is to give what the float
layer gives on the float backbone; the two that write into the residual stream also what the stream misses there. That
is the linear compensation of quantised blocks [QwT, Fu et al., CVPR 2025, arXiv 2411.13918], but folded into weights
that are there anyway, so that it costs nothing. The biases of key and value are such that their means are 0: a softmax
does not see the one, and the next layer's bias, fitted too, takes in the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from quee_core.quantize.capture import TOGETHER, attention_hook, linear_hook
from quee_core.quantize.erq import round_by_halves
from quee_core.quantize.layers import QuantAttention, QuantLinear, quantized_linear, replaced, steady, with_affine
from quee_core.quantize.methods import (
    RIDGE,
    AttentionQuantizers,
    AttentionSamples,
    BlockFit,
    LinearQuantizers,
    LinearSamples,
    NormQuantizers,
    RelativeQuantizers,
    input_quantizer,
    least_error_grid,
    relative_attention,
    ridge,
    root2_attention,
    round_in_turn,
    softmax_attention,
)
from quee_core.quantize.moments import Moments
from quee_core.quantize.performer import PerformerQuantizers
from quee_core.quantize.quantizers import ActivationQuantizer, real
from quee_core.quantize.refinement import refined, rescaled
from quee_core.quantize.repq import Reparametrized, reparametrized

COMPENSATING_RIDGE = 0.3  # `methods.RIDGE` where inputs err as well by what came before: chosen on images of `target`
KEPT_IMAGES = 64  # whose attention is kept of each block, of fewer queries than by `capture`
REFINEMENTS = 3  # of levels and scales, in turns

LayerQuantizers = LinearQuantizers | AttentionQuantizers | RelativeQuantizers | NormQuantizers | PerformerQuantizers
Step = Callable[[Tensor], Tensor]  # of a few images

_ATTENTION: Mapping[str, Callable[[AttentionSamples, int, Tensor | None], AttentionQuantizers | RelativeQuantizers]] = {
    "any": softmax_attention,
    "root2": root2_attention,
    "relative": relative_attention,
}


def is_plain(block: nn.Module) -> bool:
    """Whether `block` is norm, attention, norm, MLP with sums around them, and nothing else."""
    if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        return False
    linear = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    return (
        block.attn.gate is None
        and all(type(layer) is nn.Linear for layer in linear)
        and all(isinstance(norm, nn.Identity) for norm in (block.attn.norm, block.mlp.norm))
    )


@dataclass(frozen=True, eq=False)
class Tokens:
    """Of all images, float32 [n, t, d]: on the path that the quantised layers run on, and on the float backbone.

    weights: float32 [t], how much a token counts.
    """

    given: Tensor
    wanted: Tensor
    weights: Tensor

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Both, a few images at a time."""
        return zip(torch.split(self.given, TOGETHER), torch.split(self.wanted, TOGETHER), strict=True)

    def behind(self, quantized: Step, float_: Step) -> "Tokens":
        """What two parts make of them; where both are the same, and so are the tokens, it runs once."""
        wanted = run_together(float_, self.wanted)
        same = quantized is float_ and self.given is self.wanted
        return Tokens(wanted if same else run_together(quantized, self.given), wanted, self.weights)


def run_together(step: Step, values: Tensor) -> Tensor:
    """What `step` makes of float32 [n, ...], a few images at a time."""
    return torch.cat([step(part) for part in torch.split(values, TOGETHER)])


def token_weights(tokens: Tensor, prefix: int) -> Tensor:
    """How much each token of float32 [n, t, d] counts: each of the first `prefix` as the square root of the others.

    The class token answers, but is one of many; and counting for more, it would be fitted on as few rows as images.
    """
    weights = torch.ones(tokens.shape[1], device=tokens.device)
    weights[:prefix] = max(1.0, (tokens.shape[1] - prefix) ** 0.5)
    return weights


def fit_blocks(
    blocks: Sequence[nn.Module],
    tokens: tuple[Tensor, Tensor],
    bits: int,
    how: BlockFit,
    found: dict[str, LayerQuantizers],
    quantized: Callable[[nn.Module, str, Mapping[str, LayerQuantizers]], nn.Module],
    prefix: int,
) -> None:
    """Add the quantisers of all plain blocks at `bits` to `found`, which holds those of the others.

    tokens: float32 [n, t, d] both, behind the quantised stem and the float one. quantized: a block, called so, with
    quantisers that were found. prefix: how many tokens come before the patches.
    """
    given, wanted = tokens
    if how.compensates:
        at = Tokens(given, wanted, token_weights(given, prefix))
    else:
        at = Tokens(wanted, wanted, token_weights(wanted, 0))
    for index, block in enumerate(blocks):
        name = f"blocks.{index}"
        if is_plain(block):
            found |= _Fit(block, name, bits, how).quantizers(at)
        at = at.behind(quantized(block, name, found) if how.compensates else block, block)


class _Fit:
    """One plain block at one bit-width."""

    def __init__(self, block: nn.Module, name: str, bits: int, how: BlockFit) -> None:
        self.block, self.name, self.bits, self.how = block, name, bits, how
        self.found: dict[str, LayerQuantizers] = {}
        attention = block.get_submodule("attn")
        assert isinstance(attention, Attention)  # see is_plain
        self.attention = attention
        self.value_mean = torch.zeros((attention.num_heads, 1, attention.head_dim))

    def quantizers(self, at: Tokens) -> dict[str, LayerQuantizers]:
        """Of every layer, by name, for the tokens at the block."""
        block: Any = self.block
        attention, mlp = self.attention, block.mlp
        norm1, qkv = self._behind_norm("norm1", "attn.qkv", at)
        answers = replaced(attention, "", {"proj": nn.Identity()})
        quantizers = self._attention(nn.Sequential(norm1, qkv), nn.Sequential(block.norm1, attention.qkv), at)
        quantized_answers = QuantAttention(replaced(answers, "", {"qkv": qkv}), quantizers)  # type: ignore[arg-type]
        in_float = nn.Sequential(block.norm1, answers)
        mixed = at.behind(self._on_path(nn.Sequential(norm1, quantized_answers), in_float), in_float)
        proj = self._linear("attn.proj", mixed, nn.Identity(), nn.Identity(), stream=self._stream(at, block.ls1))
        wanted = at.wanted + block.ls1(attention.proj(mixed.wanted))
        given = at.given + block.ls1(proj(mixed.given)) if self.how.compensates else wanted
        after = Tokens(given, wanted, at.weights)
        norm2, fc1 = self._behind_norm("norm2", "mlp.fc1", after)
        in_float = nn.Sequential(block.norm2, mlp.fc1, mlp.act)
        hidden = self._on_path(nn.Sequential(norm2, fc1, steady(mlp.act) or mlp.act), in_float)
        self._linear("mlp.fc2", after, hidden, in_float, stream=self._stream(after, block.ls2))
        return self.found

    def _on_path(self, quantized: nn.Module, in_float: nn.Module) -> nn.Module:
        return quantized if self.how.compensates else in_float

    def _stream(self, at: Tokens, scaling: nn.Module) -> Tokens | None:
        """The residual stream whose errors a layer makes up for; none if they would be divided by a tiny scaling."""
        return at if self.how.compensates and isinstance(scaling, nn.Identity) else None

    def _behind_norm(self, norm_name: str, name: str, at: Tokens) -> tuple[nn.Module, QuantLinear]:
        """A norm as it becomes, and the linear layer behind it."""
        norm = self.block.get_submodule(norm_name)
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            return norm, self._linear(name, at, norm, norm)
        rows = self._samples(name, at, norm).rows
        made = reparametrized(norm, self._weight(name), rows, self.bits)
        self.found[f"{self.name}.{norm_name}"] = made.norm
        changed = with_affine(norm, made.norm)
        return changed, self._linear(name, at, changed, norm, change=made)

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = self.block.get_submodule(name).weight  # type: ignore[assignment]
        return weight.detach().float()

    def _samples(self, name: str, at: Tokens, inputs: nn.Module) -> LinearSamples:
        hook, samples = linear_hook(f"{self.name}.{name}", len(at.given), torch.Generator().manual_seed(0))
        layer = self.block.get_submodule(name)
        for given, _ in at.pairs():
            hook(layer, (inputs(given),))
        return samples()

    def _linear(
        self,
        name: str,
        at: Tokens,
        inputs: nn.Module,
        float_inputs: nn.Module,
        *,
        stream: Tokens | None = None,
        change: Reparametrized | None = None,
    ) -> QuantLinear:
        """Fit a layer on what `inputs` makes of given tokens to what the float layer does with wanted ones."""
        layer = self.block.get_submodule(name)
        assert isinstance(layer, nn.Linear)  # see is_plain
        original = self._weight(name)
        if change is None:
            weight, quantizer = original, input_quantizer(original, self._samples(name, at, inputs), self.bits)
        else:
            weight, quantizer = change.weight, change.inputs
        moments = Moments(layer.in_features, layer.out_features, original.device)
        streams = repeat(None) if stream is None else stream.pairs()
        for (given, wanted), pair in zip(at.pairs(), streams, strict=False):
            output = functional.linear(float_inputs(wanted), original)
            if pair is not None:
                output += pair[1] - pair[0]
            moments.add(real(quantizer, inputs(given)), output, at.weights)
        found = self._least_squares(weight, quantizer, moments)
        if name == "attn.qkv" and self.how.compensates:
            found = self._centred(found, moments, layer)
        self.found[f"{self.name}.{name}"] = found
        return quantized_linear(layer, found, name)

    def _least_squares(self, weight: Tensor, quantizer: ActivationQuantizer, moments: Moments) -> LinearQuantizers:
        given, wanted = moments.means
        covariance, cross = moments.centred()
        moment = covariance.float()
        strength = COMPENSATING_RIDGE if self.how.compensates else RIDGE
        corrected = weight + ridge((cross - weight.double() @ covariance).float(), moment, strength)
        grid = least_error_grid(corrected, moment, self.bits)
        rounded = round_by_halves if self.how.rounding == "halves" else round_in_turn
        integers = rounded(corrected, grid, moment)
        for _ in range(REFINEMENTS if self.how.rounding == "refined" else 0):
            integers = refined(integers, corrected, grid, moment)
            grid = rescaled(grid, integers, corrected, moment)
        left = wanted - (integers * grid.scale[:, None]).double() @ given
        return LinearQuantizers(quantizer, integers.to(torch.int8), grid.scale, left.float())

    def _centred(self, found: LinearQuantizers, moments: Moments, layer: nn.Linear) -> LinearQuantizers:
        """Query, key and value such that the means of the value, and of a key that is not normalised, are 0."""
        _, wanted = moments.means
        mean = wanted.float() if layer.bias is None else wanted.float() + layer.bias.detach().float()
        query, key, value = mean.chunk(3)
        self.value_mean = value.view(self.attention.num_heads, 1, self.attention.head_dim)
        free = isinstance(self.attention.k_norm, nn.Identity)
        taken = torch.cat([torch.zeros_like(query), key if free else torch.zeros_like(key), value])
        return replace(found, correction=found.correction - taken)

    def _attention(
        self, quantized: nn.Module, in_float: nn.Module, at: Tokens
    ) -> AttentionQuantizers | RelativeQuantizers:
        """Of attention behind what the two make of the tokens."""
        choose, wanted = _ATTENTION[self.how.softmax], self._operands(in_float, at.wanted)
        if self.how.compensates:
            values = wanted.value.unflatten(0, (-1, len(self.value_mean))) - self.value_mean
            weights = torch.softmax(torch.bmm(wanted.query, wanted.key.transpose(1, 2)) * wanted.scale, dim=-1)
            answers = torch.bmm(weights, values.flatten(0, 1))
            found = choose(self._operands(quantized, at.given), self.bits, answers)
        else:
            found = choose(wanted, self.bits, None)
        self.found[f"{self.name}.attn"] = found
        return found

    def _operands(self, qkv: nn.Module, tokens: Tensor) -> AttentionSamples:
        hook, samples = attention_hook(f"{self.name}.attn", self.attention, KEPT_IMAGES)
        for part in torch.split(tokens, TOGETHER):
            hook(qkv, part, qkv(part))
        return samples()
