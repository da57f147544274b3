"""Arithmetic on fixed-point grids, so that a row's result doesn't depend on the batch, the BLAS or its threads.

A float64 holds every integer up to 2^53. If inputs are multiples of one power of two, weights of another, and no sum
of products can pass 2^53 of their common unit, then every product and every partial sum is exact, whatever the order
in which it is taken. Gates decide by comparing predictions; with exact sums the router and the replay compare the
same bits, though the one sees a regrouped batch and the other the whole table.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quee_core.errors import NumericError, ShapeMismatchError

FRACTION_BITS = 16  # features arrive as float16 or float32; 2^-16 of a standard deviation is below their noise
CLIP = 16.0  # standard deviations; rarer values say nothing more, and unbounded ones could not be summed exactly
EXACT_BITS = 52  # one below float64's 53, for the bias
MAX_WEIGHT_BITS = 60


def to_grid(values: NDArray[np.float64], fraction_bits: int = FRACTION_BITS) -> NDArray[np.float64]:
    """`values`, any shape, rounded to multiples of 2^-fraction_bits, halves to even; float64, same shape."""
    rounded: NDArray[np.float64] = np.rint(np.ldexp(np.asarray(values, np.float64), fraction_bits))
    return np.ldexp(rounded, -fraction_bits, out=rounded)


def check_features(features: NDArray[np.floating], columns: int | None = None) -> NDArray[np.float64]:
    """Features as float64 [n, f].

    Raises ShapeMismatchError unless they are a matrix (of `columns` columns, if given), NumericError if any is NaN or
    infinite, with its row and column.
    """
    values = np.asarray(features, np.float64)
    if values.ndim != 2 or (columns is not None and values.shape[1] != columns):
        wanted = "n, f" if columns is None else f"n, {columns}"
        raise ShapeMismatchError(f"features: shape {values.shape}; want [{wanted}]")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise NumericError(f"features: {values[row, column]} at row {row}, column {column}; want finite numbers")
    return values


@dataclass(frozen=True, eq=False)
class Standardizer:
    """Features minus `mean`, over `deviation` (both float64 [f]), within ±`CLIP`, on the grid of 2^-`FRACTION_BITS`."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> "Standardizer":
        """Means and standard deviations of features [n, f], n ≥ 1; a constant column keeps its unit.

        Raises ShapeMismatchError for no rows, and what `check_features` raises.
        """
        values = check_features(features)
        if not len(values):
            raise ShapeMismatchError("features: no rows; want at least one image")
        deviation = values.std(axis=0)
        floor = 1e-7 * np.abs(values).max(axis=0)  # float32 features that differ by rounding alone are constant
        return cls(values.mean(axis=0), np.where(deviation > floor, deviation, 1.0))

    @classmethod
    def identity(cls, columns: int) -> "Standardizer":
        """What leaves features that are standardised already as they are, bit for bit."""
        return cls(np.zeros(columns), np.ones(columns))

    def __call__(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Standardised features, float64 [n, f]; raises what `check_features` raises."""
        values = check_features(features, len(self.mean))
        return to_grid(np.clip((values - self.mean) / self.deviation, -CLIP, CLIP))


@dataclass(frozen=True, eq=False)
class ExactLinear:
    """x @ weight + bias without rounding, for inputs on the grid of 2^-`FRACTION_BITS` within ±bound.

    weight: float64 [f, h], bias: float64 [h], rounded by `of` to what makes every sum exact. limit: float64 [h],
    the largest magnitude that each output can have.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    limit: NDArray[np.float64]

    @classmethod
    def of(cls, weight: NDArray[np.floating], bias: NDArray[np.floating], bound: float = CLIP) -> "ExactLinear":
        """Round weight [f, h] and bias [h] to the finest grids whose sums stay exact for inputs within ±bound.

        A weight matrix of magnitudes near 0.1 and 50 inputs keeps some 28 bits after the point, more than float32.
        Raises NumericError if any is NaN or infinite, or too large for any grid.
        """
        exact, offset = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
        if not (np.isfinite(exact).all() and np.isfinite(offset).all()):
            raise NumericError("weights that are not finite; lower the learning rate, or look for huge features")
        largest = (bound * np.abs(exact).sum(axis=0) + np.abs(offset)).max(initial=0.0)
        # rounding can add half a unit to each weight; twice the sum leaves ample room for that
        spare = EXACT_BITS - FRACTION_BITS - np.frexp(2 * largest)[1]
        weight_bits = int(min(MAX_WEIGHT_BITS, spare))
        if weight_bits < 0:
            raise NumericError(f"weights that add up to {largest:.3g} leave no bits after the point; regularise more")
        exact, offset = to_grid(exact, weight_bits), to_grid(offset, weight_bits + FRACTION_BITS)
        return cls(exact, offset, bound * np.abs(exact).sum(axis=0) + np.abs(offset))

    def __call__(self, inputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Outputs [n, h], float64, each exact."""
        product: NDArray[np.float64] = inputs @ self.weight
        product += self.bias
        return product


def sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + e^-logit) in [0, 1], float64, element by element: no element's value depends on its neighbours."""
    # the exponential of a contiguous array takes the same code for every element, its last few included
    odds = np.exp(-np.abs(np.ascontiguousarray(logits)))
    return np.where(logits >= 0, 1.0, odds) / (1.0 + odds)
