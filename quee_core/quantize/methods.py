"""How quantisers are chosen: `minmax` takes the whole range, `mse` what makes a layer's output err least (design, 3).

With these two a layer is judged by itself, on samples of what the float backbone gives it, so that its quantisers at
one bit-width depend neither on other bit-widths nor on the path that leads to it. The others fit the layers of a block
to one another (`blocks`); `compensated` alone looks at a path, the uniform one at its own bit-width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor

from quee_core.errors import QuantizationError, did_you_mean
from quee_core.quantize.quantizers import (
    EXACT,
    ActivationQuantizer,
    Log2,
    LogRoot2,
    Odd,
    TwinUniform,
    Uniform,
    WeightGrid,
    real,
    to_scale,
)

Error = Callable[[ActivationQuantizer], float]  # what a quantiser of a layer's input does to the layer's output

FEW_BITS = 4  # up to which a level more, or where 0 lies, makes a difference
MANY_BITS = 7  # from which clipping pays only where the largest values are rare
SEARCHED_ROWS = 1024  # on which candidates of fewer bits are compared; whatever is fitted sees all samples
CLIPS = tuple(0.8**k for k in range(14))  # shares of the observed range, from 1 down to 0.055
SIDE_CLIPS = (0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)  # of one end, relative to the best clip of both
MANY_BITS_CLIPS = (1.0, 0.9, 0.8, 0.65, 0.5, 0.3)
WEIGHT_CLIPS = tuple(1 - k / 40 for k in range(32))  # shares of the largest weight of a channel
LOG2_OCTAVES = 14  # most of a softmax's octaves: with more, attention would no longer be exact in float32
RIDGE = 0.1  # weight of the original weights, in units of the inputs' mean second moment
DAMPING = 0.01  # of the same units, added to a second moment that is inverted


@dataclass(frozen=True, slots=True, eq=False)
class LinearSamples:
    """Inputs of a linear layer: rows float32 [n, in], and the least and the largest input of all that were seen."""

    rows: Tensor
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSamples:
    """Operands of attention, one matrix for each image and head: query [m, q, head_dim], key, value [m, t, head_dim].

    scale: of the scores, before the softmax. ranges: least and largest value that was seen, by operand.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    ranges: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, eq=False)
class LinearQuantizers:
    """Of one linear layer or convolution: inputs, and integers of the weight.

    integers: int8 [out, in]; scale: float32 [out], their unit; correction: float32 [out], added to the bias.
    """

    inputs: ActivationQuantizer
    integers: Tensor
    scale: Tensor
    correction: Tensor


@dataclass(frozen=True, slots=True)
class AttentionQuantizers:
    """Of query, key, value and the softmax's output."""

    query: ActivationQuantizer
    key: ActivationQuantizer
    value: ActivationQuantizer
    weights: ActivationQuantizer


@dataclass(frozen=True, slots=True)
class RelativeQuantizers:
    """Of query, key, value, and attention's weights before they are normalised, the largest of each query being 1.

    Answers are divided by the sum of a query's quantised weights, behind the product: a flat row of weights has as many
    levels as a steep one, and what rounding adds to all of them cancels.
    """

    query: ActivationQuantizer
    key: ActivationQuantizer
    value: ActivationQuantizer
    exponentials: ActivationQuantizer


@dataclass(frozen=True, slots=True, eq=False)
class NormQuantizers:
    """Weight and bias, float32 [d], that take the place of a LayerNorm's so that one quantiser suits all channels."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class BlockFit:
    """How the layers of a plain block are fitted to one another, one after the other (`blocks.fit_blocks`).

    softmax: which levels attention's weights have. rounding: of the linear layers' weights. compensates: whether a
    layer is fitted on what the quantised layers before it give, and makes up for their errors.
    """

    softmax: Literal["any", "root2", "relative"]
    rounding: Literal["in turn", "halves", "refined"]
    compensates: bool


class QuantMethod(Protocol):
    """Chooses the quantisers of one layer at one bit-width."""

    @property
    def blocks(self) -> BlockFit | None:
        """How plain blocks are fitted as a whole; None where their layers are, too, judged one by one."""
        ...

    def linear(self, weight: Tensor, samples: LinearSamples, bits: int) -> LinearQuantizers:
        """Of weight float32 [out, in]; a convolution comes as a linear layer on its patches."""
        ...

    def attention(self, samples: AttentionSamples, bits: int) -> AttentionQuantizers:
        """Of both products of an attention layer."""
        ...


def quant_method(name: str) -> QuantMethod:
    """The method called `name`. Raises QuantizationError with near names if there is none."""
    if name not in QUANT_METHODS:
        raise QuantizationError(f"quantization.method {name!r}: unknown; {did_you_mean(name, QUANT_METHODS)}")
    return QUANT_METHODS[name]


@dataclass(frozen=True, slots=True)
class MinMax:
    """The whole observed range of inputs, the largest magnitude of each channel's weights."""

    blocks: BlockFit | None = None

    def linear(self, weight: Tensor, samples: LinearSamples, bits: int) -> LinearQuantizers:
        """Nearest integers; no correction."""
        grid = _clipped_grid(weight, bits, 1.0, odd=False)
        inputs = Uniform.over(samples.low, samples.high, bits)
        return LinearQuantizers(inputs, grid.integers(weight).to(torch.int8), grid.scale, torch.zeros_like(grid.scale))

    def attention(self, samples: AttentionSamples, bits: int) -> AttentionQuantizers:
        """A softmax's range is [0, 1]."""
        query, key, value = (Uniform.over(*samples.ranges[name], bits) for name in ("query", "key", "value"))
        return AttentionQuantizers(query, key, value, Uniform.over(0.0, 1.0, bits))


@dataclass(frozen=True, slots=True)
class LeastOutputError:
    """Ranges, kinds and weights of least squared error of the layer's output.

    Inputs: the ends of the range by a grid search; up to `FEW_BITS` also with levels astride 0, behind a GELU also with
    a range for each side, for a softmax also twin ranges and powers of two. Weights: those of least error on the
    *quantised* inputs (ridge regression towards the original ones), clipped per output channel, then rounded one
    input at a time, each time moving what is not yet rounded so that it makes up for the error [GPTQ, arXiv
    2210.17323; ERQ, arXiv 2407.06794]. What error is left on average goes into the bias.
    """

    blocks: BlockFit | None = None

    def linear(self, weight: Tensor, samples: LinearSamples, bits: int) -> LinearQuantizers:
        """See the class."""
        inputs = input_quantizer(weight, samples, bits)
        rows, given = samples.rows, real(inputs, samples.rows)
        mean, given_mean = rows.mean(dim=0), given.mean(dim=0)
        centred, given_centred = rows - mean, given - given_mean
        moment = given_centred.T @ given_centred / len(rows)
        wanted = weight + ridge(weight @ (centred.T @ given_centred / len(rows) - moment), moment)
        grid = least_error_grid(wanted, moment, bits)
        integers = round_in_turn(wanted, grid, moment)
        correction = weight @ mean - (integers * grid.scale[:, None]) @ given_mean
        return LinearQuantizers(inputs, integers.to(torch.int8), grid.scale, correction)

    def attention(self, samples: AttentionSamples, bits: int) -> AttentionQuantizers:
        """Query and key first, by the error of what attention gives; then its weights and the value."""
        return softmax_attention(samples, bits)


def input_quantizer(weight: Tensor, samples: LinearSamples, bits: int) -> ActivationQuantizer:
    """Of the inputs of weight [out, in], by what its error does to the output."""
    # rare values, which few rows would miss, are what decides at many bits
    rows = samples.rows if bits >= MANY_BITS else samples.rows[:: -(-len(samples.rows) // SEARCHED_ROWS)]
    narrows = len(weight) < weight.shape[1]  # then the outputs are fewer than the inputs, and cheaper to find
    through = weight.T if narrows else weight.T @ weight

    def error(candidate: ActivationQuantizer) -> float:
        wrong = real(candidate, rows).sub_(rows)
        after = wrong @ through
        return float(after.mul_(after if narrows else wrong).sum())

    best = best_range((samples.low, samples.high), bits, error)
    if -samples.high / 4 < samples.low < 0:  # as behind a GELU
        # an exact float32 product is worth more than the last bit of error
        sums = _clipped_grid(weight, bits, 0.75, odd=False).integers(weight).abs().sum(dim=1).max()
        twins = [twin for twin in _two_sided(samples, bits) if twin.largest * float(sums) <= EXACT]
        best = least([best, *twins], error)
    return best


def softmax_attention(samples: AttentionSamples, bits: int, wanted: Tensor | None = None) -> AttentionQuantizers:
    """Of both products, by the error of attention's answers; wanted [m, q, head_dim]: by default those in float."""
    candidates = softmax_quantizers(bits)
    return AttentionQuantizers(*least_error_operands(samples, bits, candidates, _softmax, torch.bmm, wanted))


def root2_attention(samples: AttentionSamples, bits: int, wanted: Tensor | None = None) -> AttentionQuantizers:
    """The same with a softmax in half octaves [RepQ-ViT, section 3.3]."""
    candidates = [LogRoot2.below(clip, bits) for clip in CLIPS]
    return AttentionQuantizers(*least_error_operands(samples, bits, candidates, _softmax, torch.bmm, wanted))


def relative_attention(samples: AttentionSamples, bits: int, wanted: Tensor | None = None) -> RelativeQuantizers:
    """The same where weights are normalised behind the product."""
    tokens = samples.key.shape[1]  # weights up to 1 each: their sums grow with them
    candidates = list(softmax_quantizers(bits))
    # an exact float32 product is worth more than the last bit of error
    quick = [candidate for candidate in candidates if tokens * candidate.largest * 2**bits <= EXACT]
    return RelativeQuantizers(*least_error_operands(samples, bits, quick or candidates, _relative, _normalised, wanted))


def least_error_operands(
    samples: AttentionSamples,
    bits: int,
    candidates: Iterable[ActivationQuantizer],
    weigh: Callable[[Tensor], Tensor],
    mix: Callable[[Tensor, Tensor], Tensor],
    wanted: Tensor | None,
) -> tuple[ActivationQuantizer, ActivationQuantizer, ActivationQuantizer, ActivationQuantizer]:
    """Of query, key, value and weights, one after the other, by the squared error of what attention gives.

    candidates: for the weights. weigh: scores to weights. mix: weights and value to answers. wanted: answers; None for
    those in float.
    """
    query, key, value = samples.query, samples.key, samples.value

    def weights_of(q: Tensor, k: Tensor) -> Tensor:
        return weigh(torch.bmm(q, k.transpose(1, 2)) * samples.scale)

    answers = mix(weights_of(query, key), value) if wanted is None else wanted

    def error(weights: Tensor, v: Tensor) -> float:
        return mean_square(mix(weights, v) - answers)

    chosen_query = best_range(samples.ranges["query"], bits, lambda c: error(weights_of(real(c, query), key), value))
    given_query = real(chosen_query, query)
    chosen_key = best_range(samples.ranges["key"], bits, lambda c: error(weights_of(given_query, real(c, key)), value))
    given = weights_of(given_query, real(chosen_key, key))
    chosen_weights = least(candidates, lambda c: error(real(c, given), value))
    given = real(chosen_weights, given)
    chosen_value = best_range(samples.ranges["value"], bits, lambda c: error(given, real(c, value)))
    return chosen_query, chosen_key, chosen_value, chosen_weights


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1)


def _relative(scores: Tensor) -> Tensor:
    return torch.exp(scores - scores.amax(dim=-1, keepdim=True))


def _normalised(weights: Tensor, value: Tensor) -> Tensor:
    return torch.bmm(weights, value) / weights.sum(dim=-1, keepdim=True)


def round_in_turn(weight: Tensor, grid: WeightGrid, moment: Tensor) -> Tensor:
    """Integers, as float32, of weight [out, in], that err little on inputs of second moment [in, in].

    Input by input, in order of falling second moment; the error of each moves the weights of the inputs to come. A row
    that errs less when every weight is just rounded to the nearest level stays so.
    """
    size = len(moment)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    inverse = torch.linalg.inv(_damped(moment)[order][:, order].double())
    factor = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True).float()
    left = weight[:, order].clone()
    integers = torch.empty_like(left)
    block = 64
    for start in range(0, size, block):
        end = min(start + block, size)
        errors = torch.empty_like(left[:, start:end])
        for k in range(start, end):
            integers[:, k] = grid.integers(left[:, k : k + 1])[:, 0]
            errors[:, k - start] = (left[:, k] - integers[:, k] * grid.scale) / factor[k, k]
            left[:, k + 1 : end] -= errors[:, k - start, None] * factor[k, k + 1 : end]
        left[:, end:] -= errors @ factor[start:end, end:]
    in_turn, nearest = integers[:, torch.argsort(order)], grid.integers(weight)
    # going in turn is greedy: for a row of few inputs it can do worse than not looking ahead
    worse = _row_errors(in_turn, weight, grid, moment) > _row_errors(nearest, weight, grid, moment)
    return torch.where(worse[:, None], nearest, in_turn)


def _row_errors(integers: Tensor, weight: Tensor, grid: WeightGrid, moment: Tensor) -> Tensor:
    """(ŵ - w) E[x xᵀ] (ŵ - w)ᵀ of each row of weight [out, in]; float32 [out]."""
    wrong = integers * grid.scale.to(weight.device)[:, None] - weight
    return (wrong @ moment).mul_(wrong).sum(dim=1)


def ridge(missing: Tensor, moment: Tensor, strength: float = RIDGE) -> Tensor:
    """Change [out, in] of a weight W that makes up best for what its output misses.

    missing: [out, in], E[(y - W x̂) x̂ᵀ], y the output that is wanted, x̂ the quantised inputs; moment: [in, in],
    E[x̂ x̂ᵀ]. strength: weight of no change, in units of the mean second moment.
    """
    size = len(moment)
    weight = strength * moment.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(size, device=moment.device, dtype=torch.float64)
    solved = torch.linalg.solve(moment.double() + weight * eye, missing.T.double())
    change: Tensor = solved.T.float()
    return change


def _damped(moment: Tensor) -> Tensor:
    strength = DAMPING * moment.diagonal().mean().clamp_min(1e-30)
    return moment + strength * torch.eye(len(moment), device=moment.device, dtype=moment.dtype)


def least_error_grid(weight: Tensor, moment: Tensor, bits: int) -> WeightGrid:
    """The clip of each output channel by (w - ŵ)ᵀ E[x xᵀ] (w - ŵ), the kind of levels by the sum over all channels."""
    kinds = []
    damped = _damped(moment)
    for odd in (False, True) if bits <= FEW_BITS else (False,):
        best, scale = torch.full((len(weight),), torch.inf, device=weight.device), torch.ones_like(weight[:, 0])
        for clip in WEIGHT_CLIPS:
            grid = _clipped_grid(weight, bits, clip, odd=odd)
            wrong = grid.integers(weight).mul_(grid.scale[:, None]).sub_(weight)
            error = (wrong @ damped).mul_(wrong).sum(dim=1)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, grid.scale, scale)
        kinds.append((float(best.sum()), WeightGrid(scale, bits, odd)))
    return min(kinds, key=lambda kind: kind[0])[1]


def _clipped_grid(weight: Tensor, bits: int, clip: float, *, odd: bool) -> WeightGrid:
    steps = 2**bits if odd else 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1).mul(clip / steps).clamp_min(2.0**-100)
    return WeightGrid(scale, bits, odd)


def best_range(seen: tuple[float, float], bits: int, error: Error) -> ActivationQuantizer:
    """Evenly spaced levels of least `error` over a range `seen`.

    Both ends are clipped alike, then, at fewer than `MANY_BITS`, each by itself.
    """
    if bits >= MANY_BITS:
        return least([Uniform.over(seen[0] * clip, seen[1] * clip, bits) for clip in MANY_BITS_CLIPS], error)
    kinds: tuple[type[Uniform] | type[Odd], ...] = (Uniform, Odd) if bits <= FEW_BITS else (Uniform,)
    best: list[tuple[float, ActivationQuantizer]] = []
    for kind in kinds:
        _, clip = min((error(kind.over(seen[0] * clip, seen[1] * clip, bits)), clip) for clip in CLIPS)
        low, high = seen[0] * clip, seen[1] * clip
        _, high = min((error(kind.over(low, high * share, bits)), high * share) for share in SIDE_CLIPS)
        found, low = min((error(kind.over(low * share, high, bits)), low * share) for share in SIDE_CLIPS)
        best.append((found, kind.over(low, high, bits)))
    return min(best, key=lambda of: of[0])[1]


def least(candidates: Iterable[ActivationQuantizer], error: Error) -> ActivationQuantizer:
    """The candidate of least `error`, the first among equals."""
    return min(candidates, key=error)


def softmax_quantizers(bits: int) -> Iterator[ActivationQuantizer]:
    """Candidates for values in [0, 1] of which most are small: clipped ranges, powers of two, twin ranges."""
    for clip in CLIPS:
        yield Uniform.over(0.0, clip, bits)
    yield Log2(min(2**bits - 2, LOG2_OCTAVES))
    half = 2 ** (bits - 1)
    for clip in CLIPS[:8]:
        for shift in range(max(bits - 1, 1), 10):
            # half of the levels, 0 among them, for the small values; the others end at the clip
            coarse = half << shift
            if 2 * coarse / clip * 2**bits <= EXACT:  # a row of integers with values of `bits` bits, see QuantAttention
                yield TwinUniform(to_scale(clip / coarse), 0, half - 1, shift, half)


def _two_sided(samples: LinearSamples, bits: int) -> Iterator[TwinUniform]:
    half = 2 ** (bits - 1)
    for clip in CLIPS[:8] if bits < MANY_BITS else MANY_BITS_CLIPS:
        for shift in range(1, 6):
            scale = to_scale(clip * samples.high / ((half - 1) << shift))
            if scale * half < -2 * samples.low:  # else the fine range would reach far beyond what there is
                yield TwinUniform(scale, -half, 0, shift, half - 1)


def mean_square(wrong: Tensor) -> float:
    """Mean of the squares of all elements."""
    return float(wrong.square().mean())


# what is no plain block, such as stem and heads, is treated by all but `minmax` as by `mse`
QUANT_METHODS: Mapping[str, QuantMethod] = MappingProxyType(
    {
        "minmax": MinMax(),
        "mse": LeastOutputError(),
        "repq": LeastOutputError(BlockFit("root2", "in turn", compensates=False)),
        "erq": LeastOutputError(BlockFit("any", "halves", compensates=False)),
        "compensated": LeastOutputError(BlockFit("relative", "refined", compensates=True)),
    }
)
