"""Products on bytes against products on float32: the fast path gives the same bits as the plain one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quee_core.quantize.layers import QuantLinear, has_byte_products
from quee_core.quantize.quantizers import ActivationQuantizer, Odd, TwinUniform, Uniform


@st.composite
def input_quantizers(draw: st.DrawFn) -> ActivationQuantizer:
    bits = draw(st.integers(2, 8))
    low, high = draw(st.floats(0, 4)), draw(st.floats(0.125, 4))
    if draw(st.booleans()):
        half = 2 ** (bits - 1)
        return TwinUniform(0.0625, -half, 0, draw(st.integers(1, 5)), max(half - 1, 1))
    return draw(st.sampled_from([Uniform, Odd])).over(-low, high, bits)


@given(input_quantizers(), st.integers(1, 600), st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_bytes_give_the_same_bits_as_float32(
    inputs: ActivationQuantizer, width: int, out: int, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (out, width), generator=generator).to(torch.int8)
    scale, bias = torch.rand(out, generator=generator) + 0.1, torch.randn(out, generator=generator)
    layer = QuantLinear(weight, scale, bias, inputs)
    x = torch.randn((2, rows, width), generator=generator) * 4
    sums = inputs.integers(x).to(torch.int64) @ weight.to(torch.int64).T
    wanted = torch.addcmul(bias, sums.to(torch.float32), scale * inputs.scale)
    assert torch.equal(layer(x), wanted)
    layer.shift = None  # what a device without fast bytes does
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("low", [-255, -128, -100, 0])
def test_the_largest_sums_do_not_overflow(low: int) -> None:
    inputs = Uniform(1.0, low, low + 255)
    weight = torch.full((3, 8192), 127, dtype=torch.int8)
    weight[1] *= -1
    layer = QuantLinear(weight, torch.ones(3), torch.zeros(3), inputs)
    x = torch.stack([torch.full((8192,), float(end)) for end in (low, low + 255)])
    sums = x.to(torch.int64) @ weight.to(torch.int64).T
    assert torch.equal(layer(x), sums.to(torch.float32))
    assert layer.shift is not None
    assert layer._multiplies_bytes(x.device) == has_byte_products(x.device)


@pytest.mark.parametrize(("low", "fits"), [(-100, True), (-101, False)])
def test_integers_that_fit_a_byte_are_multiplied_as_bytes_where_that_is_fast(
    low: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, product, seen = has_byte_products(torch.device("cpu")), torch._int_mm, []
    monkeypatch.setattr(torch, "_int_mm", lambda rows, columns: seen.append(rows.dtype) or product(rows, columns))
    layer = QuantLinear(torch.ones(8, 16, dtype=torch.int8), torch.ones(8), torch.zeros(8), Uniform(1.0, low, 155))
    layer(torch.zeros(20, 16))
    assert seen == ([torch.int8] if fits and fast else [])


@pytest.mark.parametrize("strides", [(64, 1), (0, 1), (1, 1), (7, 1)])
@pytest.mark.parametrize("out", [1, 2])
def test_one_row_of_any_stride(strides: tuple[int, int], out: int) -> None:
    weight = torch.arange(-64, -64 + 64 * out).clamp(max=127).to(torch.int8).reshape(out, 64)
    layer = QuantLinear(weight, torch.ones(out), torch.zeros(out), Uniform(0.0625, -100, 155))
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).as_strided((1, 64), strides)
    sums = layer.inputs.integers(x.clone()).to(torch.int64) @ weight.to(torch.int64).T
    assert torch.equal(layer(x), torch.addcmul(layer.bias, sums.to(torch.float32), layer.scale))
