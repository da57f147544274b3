"""Quantisers: from float32 values to the integers that stand for them (design, section 3).

There is one rounding formula, here and nowhere else:

    integer = clamp(round(x * inverse), low, high)        value = integer * scale

`round` takes halves to even, `scale` is a float32 and `inverse` the float32 nearest to 1 / scale. The zero point of an
asymmetric quantiser is taken off already: `low` and `high` are the ends of the code range minus the zero point, so 0
stands for 0.0, and a product of values is the product of their integers times the product of their scales. Where few
levels do better astride 0, integers are the odd ones, 2 * clamp(floor(x * inverse), low, high) + 1 with the inverse of
2 * scale. Integers are held in float32, which adds and multiplies them without error while no sum passes `EXACT`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quee_core.errors import QuantizationError

EXACT = 2**24  # every integer of at most this magnitude is a float32
MOST_HALVES = 28  # half octaves of a softmax: with more, attention would no longer be exact in float32

_SMALLEST_SCALE = 2.0**-100  # its inverse is finite, and stands for a range that is nothing but zeros
_EXPONENT_BITS = 0x7F800000  # of a float32
_ROOT_2 = float(np.float32(2**0.5))
_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


def to_float32(value: float) -> float:
    """The float32 nearest to `value`, as a Python number."""
    return float(np.float32(value))


def to_scale(value: float) -> float:
    """The float32 nearest to `value`, but none so small that it has no inverse."""
    return to_float32(max(value, _SMALLEST_SCALE))


def _inverse(scale: float) -> float:
    return float(np.float32(1) / np.float32(scale))


def _check_scale(scale: float) -> None:
    if not (_SMALLEST_SCALE <= scale <= 1 / _SMALLEST_SCALE) or scale != to_float32(scale):
        raise QuantizationError(f"quantiser: scale {scale}; want a float32 between 2^-100 and 2^100")


@dataclass(frozen=True, slots=True)
class Uniform:
    """Evenly spaced levels: integers low … high, low ≤ 0 ≤ high, times `scale`, a float32."""

    scale: float
    low: int
    high: int

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not self.low <= 0 <= self.high:
            raise QuantizationError(f"quantiser: integers from {self.low} to {self.high}; 0 must be one of them")

    @classmethod
    def over(cls, low: float, high: float, bits: int) -> "Uniform":
        """2^bits levels from `low` to `high`, widened to hold 0.0 exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        top = 2**bits - 1
        scale = to_scale((high - low) / top)
        zero = min(round(-low / scale), top)
        return cls(scale, -zero, top - zero)

    @property
    def largest(self) -> int:
        """Largest magnitude of an integer."""
        return max(-self.low, self.high)

    def integers(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """clamp(round(x / scale), low, high), float32 of the shape of `x`."""
        return torch.mul(x, _inverse(self.scale), out=out).round_().clamp_(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Odd:
    """Evenly spaced levels astride 0: integers 2 k + 1 for k = low … high, low ≤ 0 ≤ high, times `scale`, a float32."""

    scale: float
    low: int
    high: int

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not self.low <= 0 <= self.high:
            raise QuantizationError(f"quantiser: k from {self.low} to {self.high}; 0 must be one of them")

    @classmethod
    def over(cls, low: float, high: float, bits: int) -> "Odd":
        """2^bits levels, each amid one of the equal parts that `low` … `high`, widened to hold 0.0, is cut into."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = to_scale((high - low) / 2**bits / 2)
        below = min(round(-low / scale / 2), 2**bits - 1)
        return cls(scale, -below, 2**bits - 1 - below)

    @property
    def largest(self) -> int:
        """Largest magnitude of an integer."""
        return max(-2 * self.low - 1, 2 * self.high + 1)

    def integers(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """2 clamp(floor(x / (2 scale)), low, high) + 1, float32 of the shape of `x`."""
        parts = torch.mul(x, _inverse(2 * self.scale), out=out).floor_().clamp_(self.low, self.high)
        return torch.add(parts.new_ones(()), parts, alpha=2, out=parts)


@dataclass(frozen=True, slots=True)
class TwinUniform:
    """Two evenly spaced ranges, the coarse one's step 2^shift times the fine one's `scale`, told apart by one bit.

    An integer is one of fine_low … fine_high, or 2^shift times one of 1 … coarse_high, whichever range is nearer.
    With fine_high = 0 the fine range is the negative side, which suits a GELU; with fine_low = 0 it is the small
    values, which suits a softmax.
    """

    scale: float
    fine_low: int
    fine_high: int
    shift: int
    coarse_high: int

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not (self.fine_low <= 0 <= self.fine_high and self.coarse_high >= 1 and 0 <= self.shift < 24):
            raise QuantizationError(f"quantiser: ranges of {self} are empty or do not hold 0")
        if self.fine_high >= 1 << self.shift:
            raise QuantizationError(f"quantiser: the ranges of {self} overlap")

    @property
    def largest(self) -> int:
        """Largest magnitude of an integer."""
        return max(-self.fine_low, self.fine_high, self.coarse_high << self.shift)

    def integers(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Fine or coarse integers, in steps of the fine scale, float32 of the shape of `x`."""
        fine = torch.mul(x, _inverse(self.scale), out=out)
        if self.fine_high == 0:  # the ranges meet at 0, so an integer is the sum of its parts in both
            coarse = torch.mul(fine, 2.0**-self.shift).round_().clamp_(0, self.coarse_high)
            return fine.round_().clamp_(self.fine_low, 0).add_(coarse, alpha=1 << self.shift)
        # the larger part counts, once what is nearer to the fine range has no part in the coarse one
        coarse = functional.threshold(fine, (self.fine_high + (1 << self.shift)) / 2, 0.0)
        coarse.mul_(2.0**-self.shift).round_().clamp_(max=self.coarse_high).mul_(1 << self.shift)
        return torch.maximum(fine.round_().clamp_(self.fine_low, self.fine_high), coarse, out=fine)


@dataclass(frozen=True, slots=True)
class Log2:
    """Powers of two, for values in [0, 1]: integers 0, 1, 2, 4 … 2^octaves, times `scale` = 2^-octaves.

    A value becomes the power of two nearest to it on the logarithmic scale, which is the leading bit of the integer
    floor(x * √2 * 2^octaves); what is below 2^-octaves / √2 becomes 0. `bits` bits hold octaves = 2^bits - 2.
    """

    octaves: int

    def __post_init__(self) -> None:
        if not 1 <= self.octaves <= 22:
            raise QuantizationError(f"quantiser: {self.octaves} octaves; want 1 to 22, which float32 sums hold exactly")

    @property
    def scale(self) -> float:
        """Value of integer 1."""
        return 2.0**-self.octaves

    @property
    def largest(self) -> int:
        """Largest integer."""
        return 1 << self.octaves

    def integers(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Powers of two and zeros, float32 of the shape of `x`."""
        scaled = torch.mul(x, to_float32(2.0 ** (self.octaves + 0.5)), out=out).trunc_()
        scaled.view(torch.int32).bitwise_and_(_EXPONENT_BITS)  # drops the mantissa: the leading bit is what stays
        return scaled


@dataclass(frozen=True, slots=True)
class LogRoot2:
    """Powers of √2, for a softmax: 0, and 2^(j/2) for j = 0 … halves, an even number, times `scale`, a float32.

    A value becomes the power nearest to it on the logarithmic scale, or 0 below 2^(-1/4) times the least. An even power
    is an integer, an odd one an integer times √2; a product is summed apart for the two (`parts`), by shifts, and the
    second sum's scale has the √2 in it [RepQ-ViT, arXiv 2212.08254, section 3.3]. `bits` bits hold halves = 2^bits - 2,
    of which `MOST_HALVES` are used: a method for few bits.
    """

    scale: float
    halves: int

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not 2 <= self.halves <= MOST_HALVES or self.halves % 2:
            raise QuantizationError(f"quantiser: {self.halves} half octaves; want an even number, 2 to {MOST_HALVES}")

    @classmethod
    def below(cls, high: float, bits: int) -> "LogRoot2":
        """2^bits levels, but no more than `MOST_HALVES` half octaves, the largest of them `high`."""
        halves = min(2**bits - 2, MOST_HALVES)
        return cls(to_scale(high * 2.0 ** (-halves // 2)), halves)

    @property
    def largest(self) -> int:
        """Largest integer of either part."""
        return 1 << (self.halves // 2)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integers, float32 of the shape of `x`, whose sum, the second times √2, stands for `x`; one of them is 0."""
        scaled = x.mul(to_float32(2.0**0.25 / self.scale)).clamp_(max=self.largest)
        scaled = functional.threshold(scaled, _BELOW_ONE, 0.0)
        octave = scaled.clone()
        octave.view(torch.int32).bitwise_and_(_EXPONENT_BITS)
        is_odd = scaled >= octave * _ROOT_2
        return octave.masked_fill(is_odd, 0.0), octave.masked_fill_(~is_odd, 0.0)

    def integers(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The sum of both parts, in steps of the scale: not integers, where a power is odd."""
        even, odd = self.parts(x)
        return torch.add(even, odd, alpha=_ROOT_2, out=out)


_KINDS: Mapping[str, type[Uniform] | type[Odd] | type[TwinUniform] | type[Log2] | type[LogRoot2]] = MappingProxyType(
    {"uniform": Uniform, "odd": Odd, "twin": TwinUniform, "log2": Log2, "log_root2": LogRoot2}
)
ActivationQuantizer = Uniform | Odd | TwinUniform | Log2 | LogRoot2


def real(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
    """`x` float32 [...] as it looks after quantisation."""
    return quantizer.integers(x).mul_(quantizer.scale)


def to_settings(quantizer: ActivationQuantizer) -> dict[str, Any]:
    """A quantiser as plain JSON values."""
    (kind,) = (name for name, of in _KINDS.items() if type(quantizer) is of)
    return {"kind": kind} | asdict(quantizer)


def from_settings(settings: Mapping[str, Any]) -> ActivationQuantizer:
    """Read back what `to_settings` gave. Raises QuantizationError for anything else."""
    fields = dict(settings)
    try:
        return _KINDS[fields.pop("kind")](**fields)
    except (KeyError, TypeError) as error:
        raise QuantizationError(f"calibration: not a quantiser: {dict(settings)} ({error!r})") from error


@dataclass(frozen=True, slots=True, eq=False)
class WeightGrid:
    """Levels of a weight, symmetric about 0, one scale per output channel.

    scale: float32 [out]. With `odd` the integers are the odd ones from -(2^bits - 1) to 2^bits - 1: 2^bits levels that
    leave 0 out, 2 k + 1 for a code k of `bits` bits. Without, they are all those from -(2^(bits-1) - 1) to
    2^(bits-1) - 1: one level less, 0 among them.
    """

    scale: Tensor
    bits: int
    odd: bool

    @property
    def largest(self) -> int:
        """Largest magnitude of an integer."""
        return (1 << self.bits) - 1 if self.odd else (1 << (self.bits - 1)) - 1

    def integers(self, weight: Tensor) -> Tensor:
        """Integers, as float32, of weight float32 [out, ...]."""
        scale = self.scale.to(weight.device).reshape(-1, *(1,) * (weight.dim() - 1))
        if not self.odd:
            return weight.mul(scale.reciprocal()).round_().clamp_(-self.largest, self.largest)
        parts = weight.mul((2 * scale).reciprocal()).floor_()
        return parts.clamp_(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1).mul_(2).add_(1)
