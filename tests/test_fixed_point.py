"""Sums on fixed-point grids are exact, so no order of adding can change them."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quee_core.errors import NumericError, ShapeMismatchError
from quee_core.fixed_point import CLIP, FRACTION_BITS, ExactLinear, Standardizer, sigmoid, to_grid

Case = tuple[ExactLinear, NDArray[np.float64], NDArray[np.float64]]


@st.composite
def layers(draw: st.DrawFn) -> Case:
    """A layer, the weights that it was made of, and inputs that it takes, extreme ones among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inputs, outputs, bound = draw(st.integers(0, 200)), draw(st.integers(1, 8)), draw(st.sampled_from([1.0, CLIP, 5e3]))
    weight = rng.normal(0, draw(st.sampled_from([1e-6, 0.1, 30.0])), (inputs, outputs))
    layer = ExactLinear.of(weight, rng.normal(0, 3, outputs), bound)
    rows = to_grid(rng.uniform(-bound, bound, (5, inputs)))
    rows[0] = np.where(weight[:, 0] > 0, bound, -bound)
    return layer, weight, rows


@given(layers())
def test_every_output_is_the_exact_sum(case: Case) -> None:
    layer, _, rows = case
    for row, outputs in zip(rows, layer(rows), strict=True):
        for column, output in enumerate(outputs):
            terms = (Fraction(x) * Fraction(w) for x, w in zip(row, layer.weight[:, column], strict=True))
            assert sum(terms, Fraction(layer.bias[column])) == Fraction(output)
            assert abs(output) <= layer.limit[column]


@given(layers(), st.integers(0, 2**32 - 1))
def test_the_order_of_inputs_changes_no_bit(case: Case, seed: int) -> None:
    layer, _, rows = case
    order = np.random.default_rng(seed).permutation(rows.shape[1])
    shuffled = ExactLinear(layer.weight[order], layer.bias, layer.limit)
    np.testing.assert_array_equal(layer(rows), shuffled(rows[:, order]))


@given(layers())
def test_weights_move_by_little(case: Case) -> None:
    layer, weight, _ = case
    largest = max(np.abs(layer.limit).max(), 1e-30)
    np.testing.assert_allclose(layer.weight, weight, atol=largest * 2.0 ** (FRACTION_BITS - 50))


def test_layers_are_made_again_from_their_own_weights() -> None:
    rng = np.random.default_rng(0)
    layer = ExactLinear.of(rng.normal(size=(46, 34)), rng.normal(size=34))
    again = ExactLinear.of(layer.weight, layer.bias)
    np.testing.assert_array_equal(layer.weight, again.weight)
    np.testing.assert_array_equal(layer.bias, again.bias)


@pytest.mark.parametrize("weight", [np.nan, np.inf, 1e12])
def test_weights_without_a_grid_are_refused(weight: float) -> None:
    with pytest.raises(NumericError, match="weights that"):
        ExactLinear.of(np.array([[weight]]), np.zeros(1))


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_standardised_features_lie_on_the_grid_and_within_the_clip(seed: int, n: int) -> None:
    features = np.random.default_rng(seed).standard_cauchy((n, 4)).astype(np.float32)
    rows = Standardizer.of(features)(np.vstack([features, 1e30 * features[:1]]))
    assert np.abs(rows).max() <= CLIP
    np.testing.assert_array_equal(rows * 2**FRACTION_BITS, np.rint(rows * 2**FRACTION_BITS))
    np.testing.assert_array_equal(Standardizer.identity(4)(rows), rows)


def test_standardising_gives_mean_0_and_deviation_1_and_keeps_constant_columns_finite() -> None:
    rng = np.random.default_rng(0)
    features = np.column_stack([rng.normal(5, 3, 1000), np.full(1000, 0.1), np.zeros(1000)]).astype(np.float32)
    rows = Standardizer.of(features)(features)
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(rows.std(axis=0), [1, 0, 0], atol=1e-4)


def test_features_that_are_no_numbers_or_no_matrix_are_refused() -> None:
    standardizer = Standardizer.of(np.ones((3, 2)))
    with pytest.raises(NumericError, match="nan at row 1, column 0"):
        standardizer(np.array([[0.0, 0.0], [np.nan, 0.0]]))
    with pytest.raises(ShapeMismatchError, match=r"want \[n, 2\]"):
        standardizer(np.ones((3, 3)))
    with pytest.raises(ShapeMismatchError, match="no rows"):
        Standardizer.of(np.ones((0, 2)))


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(0, 69))
def test_a_sigmoid_does_not_depend_on_its_neighbours(seed: int, n: int, start: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 8, (n, 7))
    part = logits[start % n :]
    np.testing.assert_array_equal(sigmoid(part), sigmoid(logits)[start % n :])
    np.testing.assert_array_equal(sigmoid(logits.T).T, sigmoid(logits))


def test_a_sigmoid_reaches_its_ends_without_overflow() -> None:
    values = sigmoid(np.array([-1e4, -30.0, 0.0, 30.0, 1e4]))
    np.testing.assert_allclose(values, [0.0, 9.357622968839e-14, 0.5, 1 - 9.357622968839e-14, 1.0], rtol=1e-12)
