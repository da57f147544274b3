"""A performer's token layer on integers: the random features, and the three products of linear attention.

An answer does not change when the features of a query, or those of all keys of an image, are multiplied with a number,
but for the 1e-8 that is added to the weights, which is scaled along. So a query's features are taken relative to its
largest, and the keys' relative to the largest of the image: both lie in [0, 1], as a softmax's output does.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quee_core.backbones.t2t_vit import LEAST_WEIGHT, TOKEN_WIDTH, PerformerTokens
from quee_core.quantize.methods import LinearSamples, best_range, least, mean_square, softmax_quantizers
from quee_core.quantize.quantizers import ActivationQuantizer, real, to_float32

KEPT_ROWS = 8192  # of keys and queries, for the quantisers of the directions
_LEAST_SUM = 1e-30  # instead of weights that are all 0, whose answer is 0


@dataclass(frozen=True, slots=True, eq=False)
class PerformerSamples:
    """What linear attention is given: keys, queries, values float32 [m, t, 64]; directions: w float32 [features, 64].

    values_range: least and largest value that was seen.
    """

    keys: Tensor
    queries: Tensor
    values: Tensor
    directions: Tensor
    values_range: tuple[float, float]


@dataclass(frozen=True, slots=True)
class PerformerQuantizers:
    """Of the features of keys and queries, the values, and the two sums over tokens: of features times values (context)
    and of features alone (total).
    """

    keys: ActivationQuantizer
    queries: ActivationQuantizer
    value: ActivationQuantizer
    context: ActivationQuantizer
    total: ActivationQuantizer


def performer_rows(samples: PerformerSamples) -> LinearSamples:
    """What is multiplied with the directions: keys and queries, evenly spaced ones if there are many."""
    rows = torch.cat([samples.keys.flatten(0, 1), samples.queries.flatten(0, 1)])
    low, high = (float(end) for end in rows.aminmax())
    return LinearSamples(rows[:: -(-len(rows) // KEPT_ROWS)], low, high)


def performer_quantizers(samples: PerformerSamples, bits: int) -> PerformerQuantizers:
    """One operand after the other, each by the squared error of the answers, whatever the method of other layers.

    A whole range would leave most features, which span many octaves, without a level.
    """
    keys, _ = relative_features(exponents(samples.keys, samples.directions), of_image=True)
    queries, _ = relative_features(exponents(samples.queries, samples.directions), of_image=False)
    wanted = _attend(queries, _context(keys, samples.values), keys.sum(dim=1))

    def error(given_queries: Tensor, context: Tensor, total: Tensor) -> float:
        return mean_square(_attend(given_queries, context, total) - wanted)

    def keys_error(candidate: ActivationQuantizer) -> float:
        given = real(candidate, keys)
        return error(queries, _context(given, samples.values), given.sum(dim=1))

    for_keys = least(softmax_quantizers(bits), keys_error)
    given_keys = real(for_keys, keys)
    total = given_keys.sum(dim=1)
    for_values = best_range(
        samples.values_range, bits, lambda c: error(queries, _context(given_keys, real(c, samples.values)), total)
    )
    context = _context(given_keys, real(for_values, samples.values))
    for_queries = least(softmax_quantizers(bits), lambda c: error(real(c, queries), context, total))
    given_queries = real(for_queries, queries)
    low, high = (float(end) for end in context.aminmax())
    for_context = best_range((low, high), bits, lambda c: error(given_queries, real(c, context), total))
    given_context = real(for_context, context)
    for_total = best_range(
        (0.0, float(total.max())), bits, lambda c: error(given_queries, given_context, real(c, total))
    )
    return PerformerQuantizers(for_keys, for_queries, for_values, for_context, for_total)


class QuantPerformer(nn.Module):
    """`PerformerTokens` with quantised linear layers and products: float32 [n, t, width] to float32 [n, t, 64].

    Sums over tokens are taken in float64, which is exact for them, and rounded to float32 once.
    """

    def __init__(self, layer: PerformerTokens, directions: nn.Module, quantizers: PerformerQuantizers) -> None:
        """layer: one whose linear layers are quantised already. directions: w as a quantised linear layer."""
        super().__init__()
        self.kqv: nn.Module = layer.kqv
        self.proj: nn.Module = layer.proj
        self.norm1: nn.Module = layer.norm1
        self.norm2: nn.Module = layer.norm2
        self.mlp: nn.Module = layer.mlp
        self.directions = directions
        self.features = len(layer.w)
        self.quantizers = quantizers

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        keys, queries, values = self.kqv(self.norm1(x)).split(TOKEN_WIDTH, dim=-1)
        answers = values + self.proj(self._attend(keys, queries, values))
        after: Tensor = answers + self.mlp(self.norm2(answers))
        return after

    def _attend(self, keys: Tensor, queries: Tensor, values: Tensor) -> Tensor:
        of = self.quantizers
        key_features, key_shift = relative_features(self._exponents(keys), of_image=True)
        query_features, query_shift = relative_features(self._exponents(queries), of_image=False)
        k = of.keys.integers(key_features).double()
        v = of.value.integers(values.contiguous()).double()
        context = _context(k, v).float().mul_(to_float32(of.keys.scale * of.value.scale))
        total = k.sum(dim=1).float().mul_(of.keys.scale)
        q = of.queries.integers(query_features).double()
        sums = torch.matmul(q, of.context.integers(context).double()).float()
        weights = torch.matmul(q, of.total.integers(total).double().unsqueeze(2)).float()
        sums.mul_(to_float32(of.queries.scale * of.context.scale))
        weights.mul_(to_float32(of.queries.scale * of.total.scale))
        # as published, for features that are not relative to the largest
        added = torch.exp(math.log(LEAST_WEIGHT * self.features) - query_shift - key_shift)
        return sums / (weights + added).clamp_min_(_LEAST_SUM)

    def _exponents(self, x: Tensor) -> Tensor:
        projected: Tensor = self.directions(x)
        return projected - _half_square(x)


def exponents(x: Tensor, directions: Tensor) -> Tensor:
    """w u - |u|² / 2 of x float32 [n, t, 64] with directions float32 [features, 64]: float32 [n, t, features]."""
    return torch.matmul(x, directions.T) - _half_square(x)


def relative_features(logarithms: Tensor, *, of_image: bool) -> tuple[Tensor, Tensor]:
    """Features relative to the largest of the image, or of the token, and its logarithm, which was taken off.

    logarithms: float32 [n, t, features]. Returns float32 [n, t, features] in (0, 1], and [n, 1, 1] or [n, t, 1].
    """
    shift = logarithms.amax(dim=(1, 2) if of_image else 2, keepdim=True)
    return torch.exp(logarithms - shift), shift


def _half_square(x: Tensor) -> Tensor:
    return x.square().sum(dim=-1, keepdim=True).mul_(0.5)


def _context(features: Tensor, values: Tensor) -> Tensor:
    return torch.matmul(features.transpose(1, 2), values)


def _attend(queries: Tensor, context: Tensor, total: Tensor) -> Tensor:
    weights = torch.matmul(queries, total.unsqueeze(2))
    return torch.matmul(queries, context) / weights.clamp_min(_LEAST_SUM)
