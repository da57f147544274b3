"""How quantisers are chosen: the search beats the full range, rounding in turn beats rounding to nearest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quee_core.errors import QuantizationError
from quee_core.quantize.methods import (
    QUANT_METHODS,
    AttentionQuantizers,
    AttentionSamples,
    LinearSamples,
    quant_method,
    round_in_turn,
)
from quee_core.quantize.quantizers import Log2, TwinUniform, WeightGrid, real

WIDTHS = [2, 3, 4, 6, 8]


def samples_of(rows: Tensor) -> LinearSamples:
    return LinearSamples(rows, float(rows.min()), float(rows.max()))


def with_outliers(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(rows, width, generator=generator) @ mixing
    return x * torch.linspace(0.3, 3.0, width)


def linear_error(method: str, weight: Tensor, rows: Tensor, fresh: Tensor, bits: int) -> float:
    found = quant_method(method).linear(weight, samples_of(rows), bits)
    got = real(found.inputs, fresh) @ (found.integers * found.scale[:, None]).T + found.correction
    return float((got - fresh @ weight.T).square().mean())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("gelu", [False, True])
def test_mse_errs_less_than_minmax_on_new_inputs(bits: int, gelu: bool) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)) / 6
    rows = with_outliers(3000, 32, 2)
    rows[7] *= 4  # a rare large input
    rows = torch.nn.functional.gelu(rows) if gelu else rows
    seen, fresh = rows[:2000], rows[2000:]
    assert linear_error("mse", weight, seen, fresh, bits) < linear_error("minmax", weight, seen, fresh, bits)


@pytest.mark.parametrize("method", sorted(QUANT_METHODS))
def test_more_bits_err_less(method: str) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)) / 6
    rows = with_outliers(1500, 32, 3)
    errors = [linear_error(method, weight, rows, rows, bits) for bits in WIDTHS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * float((rows @ weight.T).square().mean())


@pytest.mark.parametrize("method", sorted(QUANT_METHODS))
@pytest.mark.parametrize("bits", WIDTHS)
def test_integers_have_as_many_levels_as_their_bits_allow(method: str, bits: int) -> None:
    weight, rows = torch.randn(50, 16), with_outliers(500, 16, 0)
    found = quant_method(method).linear(weight, samples_of(rows), bits)
    assert found.integers.dtype == torch.int8
    assert len(found.integers.unique()) <= 2**bits
    assert len(real(found.inputs, torch.linspace(-100, 100, 5001)).unique()) <= 2**bits


def attention_samples(seed: int, sharpness: float, tokens: int = 20) -> AttentionSamples:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(6, tokens, 8, generator=generator) for _ in range(3))
    q, k = q * sharpness, k + 0.5
    ranges = {name: (float(x.min()), float(x.max())) for name, x in (("query", q), ("key", k), ("value", v))}
    return AttentionSamples(q, k, v, 8**-0.5, ranges)


def attention_error(found: AttentionQuantizers, given_: AttentionSamples) -> float:
    def attend(q: Tensor, k: Tensor, v: Tensor, quantise: bool) -> Tensor:
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * given_.scale, dim=-1)
        return torch.bmm(real(found.weights, weights) if quantise else weights, v)

    operands = given_.query, given_.key, given_.value
    seen = (real(of, x) for of, x in zip((found.query, found.key, found.value), operands, strict=True))
    return float((attend(*seen, quantise=True) - attend(*operands, quantise=False)).square().mean())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
def test_attention_by_mse_errs_less_than_by_minmax(bits: int, sharpness: float) -> None:
    samples = attention_samples(bits, sharpness)
    by_range = quant_method("minmax").attention(samples, bits)
    by_error = quant_method("mse").attention(samples, bits)
    assert attention_error(by_error, samples) <= attention_error(by_range, samples)
    assert bits == 8 or by_error != by_range


def test_attention_to_many_tokens_gets_levels_of_unequal_steps() -> None:
    found = quant_method("mse").attention(attention_samples(0, 1.5, tokens=80), 4)
    assert isinstance(found.weights, Log2 | TwinUniform)


@given(st.integers(0, 1000), st.sampled_from([2, 3, 4]), st.integers(2, 90))
def test_rounding_in_turn_errs_no_more_than_rounding_to_nearest(seed: int, bits: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, width, generator=generator)
    rows = torch.randn(400, width, generator=generator) + 0.7 * torch.randn(400, 1, generator=generator)
    grid = WeightGrid(weight.abs().amax(dim=1) / (2 ** (bits - 1) - 1), bits, odd=False)
    moment = rows.T @ rows / len(rows)

    def error(integers: Tensor) -> float:
        wrong = integers * grid.scale[:, None] - weight
        return float(((wrong @ moment) * wrong).sum())

    assert error(round_in_turn(weight, grid, moment)) <= (1 + 1e-5) * error(grid.integers(weight))


def test_rounding_in_turn_is_the_plain_algorithm() -> None:
    """Against the textbook form: after each input, re-solve for all remaining weights by least squares."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(3, 70, generator=generator)
    rows = torch.randn(900, 70, generator=generator) * torch.linspace(2.0, 0.5, 70)  # in falling order already
    moment = rows.T @ rows / len(rows)
    grid = WeightGrid(weight.abs().amax(dim=1) / 3, 3, odd=False)
    damped = (moment + 0.01 * moment.diagonal().mean() * torch.eye(70)).double()
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    left, damped = weight.double()[:, order], damped[order][:, order]
    wanted = torch.empty_like(left)
    for k in range(70):
        wanted[:, k] = grid.integers(left[:, k : k + 1].float())[:, 0]
        miss = left[:, k] - wanted[:, k] * grid.scale
        shift = torch.linalg.solve(damped[k + 1 :, k + 1 :], damped[k + 1 :, k]) if k < 69 else torch.empty(0)
        left[:, k + 1 :] += miss[:, None] * shift
    got = round_in_turn(weight, grid, moment)[:, order]
    assert float((got == wanted).float().mean()) > 0.98  # float32 against float64: a few ties fall the other way


@pytest.mark.parametrize("method", sorted(QUANT_METHODS))
def test_inputs_and_weights_that_are_nothing_but_zeros(method: str) -> None:
    found = quant_method(method).linear(torch.zeros(3, 4), samples_of(torch.zeros(10, 4)), 4)
    got = real(found.inputs, torch.zeros(2, 4)) @ (found.integers * found.scale[:, None]).T + found.correction
    torch.testing.assert_close(got, torch.zeros(2, 3), rtol=0, atol=1e-20)


def test_an_unknown_method_gets_its_near_names() -> None:
    with pytest.raises(QuantizationError, match="did you mean 'minmax'"):
        quant_method("minmaks")
