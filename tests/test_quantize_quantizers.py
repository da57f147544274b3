"""Quantisers against their definitions: nearest level, few enough levels, the same in place, read back as written."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor

from quee_core.errors import QuantizationError
from quee_core.quantize.quantizers import (
    ActivationQuantizer,
    Log2,
    LogRoot2,
    Odd,
    TwinUniform,
    Uniform,
    WeightGrid,
    from_settings,
    real,
    to_scale,
    to_settings,
)

SCALES = st.floats(1e-4, 10).map(to_scale)
BITS = st.sampled_from([2, 3, 4, 5, 6, 7, 8])
ENDS = st.floats(-100, 100, allow_subnormal=False)


@st.composite
def twins(draw: st.DrawFn) -> tuple[TwinUniform, int]:
    bits = draw(BITS)
    half = 2 ** (bits - 1)
    if draw(st.booleans()):
        return TwinUniform(draw(SCALES), -half, 0, draw(st.integers(0, 8)), half - 1), bits
    return TwinUniform(draw(SCALES), 0, half - 1, draw(st.integers(bits - 1, 10)), half), bits


@st.composite
def quantizers(draw: st.DrawFn) -> tuple[ActivationQuantizer, int]:
    bits = draw(BITS)
    low, high = sorted((draw(ENDS), draw(ENDS)))
    assume(high - low > 1e-3)
    return draw(
        st.one_of(
            st.just((Uniform.over(low, high, bits), bits)),
            st.just((Odd.over(low, high, bits), bits)),
            st.just((Log2(2 ** min(bits, 4) - 2), min(bits, 4))),
            st.just((LogRoot2.below(max(abs(low), abs(high)), bits), bits)),
            twins(),
        )
    )


def levels_of(quantizer: ActivationQuantizer) -> list[float]:
    match quantizer:
        case Uniform(_, low, high):
            return list(range(low, high + 1))
        case Odd(_, low, high):
            return [2 * k + 1 for k in range(low, high + 1)]
        case TwinUniform(_, low, high, shift, coarse):
            return [*range(low, high + 1), *(k << shift for k in range(1, coarse + 1))]
        case Log2(octaves):
            return [0, *(1 << k for k in range(octaves + 1))]
        case LogRoot2(_, halves):
            return [0, *(float(np.float32(2 ** (j / 2))) for j in range(halves + 1))]


def values(draw_from: np.ndarray, quantizer: ActivationQuantizer) -> Tensor:
    """Numbers in [-1, 1] spread over a little more than the quantiser's range; not below 0 for powers of two."""
    x = torch.from_numpy(draw_from)
    if isinstance(quantizer, Log2):
        return x.abs()
    x = x.abs() if isinstance(quantizer, LogRoot2) else x
    return x * (1.2 * quantizer.largest * quantizer.scale)


UNIT_ARRAYS = npst.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1, 1, width=32))


@given(quantizers(), UNIT_ARRAYS)
def test_every_integer_is_one_of_few_levels_and_in_place_is_the_same(
    chosen: tuple[ActivationQuantizer, int], unit: np.ndarray
) -> None:
    quantizer, bits = chosen
    x = values(unit, quantizer)
    integers = quantizer.integers(x)
    levels = levels_of(quantizer)
    assert len(levels) <= 2**bits
    assert max(map(abs, levels)) == quantizer.largest
    assert set(integers.tolist()) <= set(map(float, levels))
    out = torch.empty_like(x)
    assert torch.equal(quantizer.integers(x, out=out), integers)
    assert torch.equal(out, integers)
    assert torch.equal(quantizer.integers(x, out=x), integers)
    assert torch.equal(x, integers)


@given(quantizers(), UNIT_ARRAYS)
def test_the_level_is_the_nearest_one(chosen: tuple[ActivationQuantizer, int], unit: np.ndarray) -> None:
    quantizer, _ = chosen
    x = values(unit, quantizer)
    if isinstance(quantizer, Log2 | LogRoot2):  # nearest on the logarithmic scale: a geometric mean divides two levels
        a_step = 1.0 if isinstance(quantizer, Log2) else 0.5
        above = (x.double() / quantizer.scale).clamp_min(0.5).log2() / a_step  # the least level
        below_least = above < -0.5
        wanted = torch.where(below_least, 0.0, 2.0 ** (a_step * above.round()).clamp(max=math.log2(quantizer.largest)))
        undecided = (above % 1 - 0.5).abs() < 1e-5
        torch.testing.assert_close(quantizer.integers(x)[~undecided].double(), wanted[~undecided], rtol=1e-6, atol=0)
        return
    levels = torch.tensor(sorted(set(levels_of(quantizer))), dtype=torch.float64) * quantizer.scale
    nearest = (x.double()[:, None] - levels).abs().amin(dim=1)
    taken = (x.double() - real(quantizer, x).double()).abs()
    assert bool((taken <= nearest * (1 + 1e-5) + 1e-6 * quantizer.largest * quantizer.scale).all())


@given(quantizers(), UNIT_ARRAYS)
def test_quantising_again_changes_nothing_and_order_is_kept(
    chosen: tuple[ActivationQuantizer, int], unit: np.ndarray
) -> None:
    quantizer, _ = chosen
    x = values(np.sort(unit), quantizer).sort().values
    once = real(quantizer, x)
    assert torch.equal(real(quantizer, once), once)
    assert all(a <= b for a, b in pairwise(once.tolist()))


@given(quantizers())
def test_settings_are_read_back(chosen: tuple[ActivationQuantizer, int]) -> None:
    assert from_settings(to_settings(chosen[0])) == chosen[0]


@given(ENDS, ENDS, BITS)
def test_a_uniform_range_holds_zero_and_its_ends(a: float, b: float, bits: int) -> None:
    low, high = sorted((a, b))
    quantizer = Uniform.over(low, high, bits)
    assert quantizer.high - quantizer.low == 2**bits - 1
    assert float(real(quantizer, torch.zeros(1))) == 0.0
    ends = torch.tensor([low, high])
    assert bool(((real(quantizer, ends) - ends).abs() <= 1.001 * quantizer.scale).all())


@given(
    npst.arrays(np.float32, (4, 6), elements=st.floats(-2, 2, width=32)),
    npst.arrays(np.float32, 4, elements=st.floats(0.0625, 1, width=32)),
    BITS,
    st.booleans(),
)
def test_weights_go_to_the_nearest_level_of_their_channel(
    weight: np.ndarray, scale: np.ndarray, bits: int, odd: bool
) -> None:
    grid = WeightGrid(torch.from_numpy(scale), bits, odd)
    integers = grid.integers(torch.from_numpy(weight)).numpy()
    levels = np.arange(-grid.largest, grid.largest + 1, 2 if odd else 1)
    assert len(levels) <= 2**bits
    assert set(integers.ravel()) <= set(levels.astype(np.float32))
    nearest = np.abs(weight[..., None] - levels * scale[:, None, None].astype(np.float64)).min(axis=-1)
    taken = np.abs(weight - integers * scale[:, None].astype(np.float64))
    assert (taken <= nearest + 1e-5).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(0.0, -1, 1),
        lambda: Uniform(float("nan"), -1, 1),
        lambda: Uniform(0.1, -1, 1),  # not a float32
        lambda: Uniform(1.0, 1, 3),
        lambda: Odd(1.0, -3, -1),
        lambda: TwinUniform(1.0, 0, 3, 1, 4),  # the fine range reaches into the coarse one
        lambda: TwinUniform(1.0, 0, 3, 2, 0),
        lambda: Log2(0),
        lambda: Log2(23),
        lambda: LogRoot2(1.0, 3),
        lambda: LogRoot2(1.0, 30),
        lambda: from_settings({"kind": "cubic"}),
        lambda: from_settings({"kind": "uniform", "scale": 1.0}),
    ],
)
def test_what_is_no_quantiser_is_refused(make: object) -> None:
    with pytest.raises(QuantizationError):
        make()  # type: ignore[operator]
