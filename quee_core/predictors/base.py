"""What every error predictor is: fitted at one gate, from features to a probability of error for each path."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from quee_core.errors import ConfigError, DamagedTableError, NumericError, ShapeMismatchError, did_you_mean
from quee_core.fixed_point import Standardizer, check_features

Validation = tuple[NDArray[np.floating], NDArray[np.bool_]]

OPTIONS_ARRAY = "options"  # options as JSON, in bytes: arrays are all that a stored predictor is made of


class Options(BaseModel):
    """Base of the predictors' hyper-parameters: immutable, with bounds, refusing unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Predictor(ABC):
    """p̂_e(π | x) of a gate's P considered paths from its f features (design, section 8).

    A row's prediction is the same bits whatever rows stand beside it, and whatever number of threads is at work.
    """

    name: ClassVar[str]
    options_model: ClassVar[type[Options]]
    discretises: ClassVar[bool] = False  # clusters by itself (options clusters, shrinkage, algorithm); targets: K = ∞

    options: Options
    standardizer: Standardizer
    paths: int  # P

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        """Raises ConfigError that names each option that is unknown or out of bounds."""
        self.options = parse_options(self.name, self.options_model, options or {})

    def fit(
        self, features: NDArray[np.floating], targets: NDArray[np.float64], *, validation: Validation, seed: int = 0
    ) -> Self:
        """Fit to `targets`, and return the predictor itself.

        features: float [n, f], n ≥ 1; f may be 0. targets: float [n, P] in [0, 1].
        validation: features [m, f] and errors bool [m, P] of rows of `select`. They decide when to stop, and are
        never fitted. seed: decides every random choice, modulo 2^32; no global generator is used or changed.
        Raises NumericError for NaN features or targets outside [0, 1], ShapeMismatchError where rows or columns
        disagree, ConfigError for options that the data cannot meet.
        """
        rows = check_features(features)
        goals = check_targets(targets, len(rows))
        seen = check_features(validation[0], rows.shape[1])
        observed = np.asarray(validation[1])
        if observed.shape != (len(seen), goals.shape[1]):
            raise ShapeMismatchError(
                f"validation: errors {observed.shape}; want [{len(seen)}, {goals.shape[1]}], a row for each of its "
                "features and a column for each path of the targets"
            )
        if not len(seen):
            raise ShapeMismatchError("validation: no rows; want some of the split select")
        self.standardizer = Standardizer.of(rows)
        self.paths = goals.shape[1]
        self._fit(self.standardizer(rows), goals, (self.standardizer(seen), observed.astype(np.float64)), seed % 2**32)
        return self

    def predict(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Probabilities of error, float64 [n, P] in [0, 1], of features [n, f].

        Raises ShapeMismatchError for another number of features than was fitted, NumericError for NaN.
        """
        return self._predict(self.standardizer(features))

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The fitted predictor as named arrays, the options among them; `from_arrays` reads them back."""
        options = np.frombuffer(self.options.model_dump_json().encode(), np.uint8)
        scaling = {"mean": self.standardizer.mean, "deviation": self.standardizer.deviation}
        return {OPTIONS_ARRAY: options, **scaling, "paths": np.array(self.paths), **self._arrays()}

    @property
    def features(self) -> int:
        """f, the number of features that it was fitted to."""
        return len(self.standardizer.mean)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The predictor that `to_arrays` wrote; it predicts the same bits.

        Raises DamagedTableError if an array is missing or does not fit the others.
        """
        try:
            predictor = cls(json.loads(arrays[OPTIONS_ARRAY].tobytes()))
            predictor.standardizer = Standardizer(arrays["mean"], arrays["deviation"])
            predictor.paths = int(arrays["paths"])
            predictor._restore(arrays)
            tried = predictor._predict(np.zeros((1, predictor.features)))
        except KeyError as error:
            raise DamagedTableError(f"predictor {cls.name}: array {error} is missing; fit it again") from None
        except (ValueError, IndexError, ConfigError) as error:
            raise DamagedTableError(f"predictor {cls.name}: arrays do not fit together ({error})") from None
        if tried.shape != (1, predictor.paths):
            raise DamagedTableError(f"predictor {cls.name}: predicts {tried.shape[1]} paths, not {predictor.paths}")
        return predictor

    @property
    def least_images(self) -> int:
        """Fewest images that it can be fitted to with its options."""
        return 1

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-accumulates of one image's prediction at full precision, one for the scaling of each feature."""

    @abstractmethod
    def _fit(
        self,
        rows: NDArray[np.float64],
        targets: NDArray[np.float64],
        validation: tuple[NDArray[np.float64], NDArray[np.float64]],
        seed: int,
        /,
    ) -> None:
        """Fit to standardised rows [n, f] and targets [n, P]; validation likewise, its errors as 0.0 and 1.0."""

    @abstractmethod
    def _predict(self, rows: NDArray[np.float64], /) -> NDArray[np.float64]:
        """Probabilities [n, P] of standardised rows [n, f], by arithmetic that is exact or element by element."""

    @abstractmethod
    def _arrays(self) -> dict[str, NDArray[Any]]:
        """What was fitted, besides the scaling."""

    @abstractmethod
    def _restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take back what `_arrays` gave."""


def check_targets(targets: NDArray[np.floating], rows: int) -> NDArray[np.float64]:
    """Targets as float64 [n, P].

    Raises ShapeMismatchError unless there are `rows` of at least one path, NumericError unless all are in [0, 1].
    """
    values = np.asarray(targets, np.float64)
    if values.ndim != 2 or len(values) != rows or not values.shape[1]:
        raise ShapeMismatchError(f"targets: shape {values.shape}; want [{rows}, paths], a row for each of the features")
    if not ((values >= 0) & (values <= 1)).all():  # NaN fails both
        row, path = np.argwhere(~((values >= 0) & (values <= 1)))[0]
        raise NumericError(f"targets: {values[row, path]} at row {row}, path {path}; want probabilities in [0, 1]")
    return values


def prior_logits(targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log odds of each path's mean target [n, P], half an image of each outcome added; float64 [P], always finite.

    Where predictors start from, so that a path that is always right or always wrong needs no infinite weight.
    """
    rate = (targets.sum(axis=0) + 0.5) / (len(targets) + 1)
    logits: NDArray[np.float64] = np.log(rate) - np.log1p(-rate)
    return logits


def parse_options(name: str, model: type[Options], given: Mapping[str, Any]) -> Options:
    """Checked options of predictor `name`. Raises ConfigError that names every unknown or faulty one."""
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        faults = []
        for fault in error.errors(include_url=False):
            option = ".".join(map(str, fault["loc"]))
            if fault["type"] == "extra_forbidden":
                known = did_you_mean(option, model.model_fields) if model.model_fields else "it has none"
                faults.append(f"unknown option {option!r}; {known}")
            else:
                faults.append(f"{option}: {fault['msg'].removeprefix('Value error, ')} (given: {fault['input']!r})")
        raise ConfigError(f"predictor {name}: " + "; ".join(faults)) from None
