"""Error predictors by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quee_core.errors import ConfigError, did_you_mean
from quee_core.predictors.base import Predictor, Validation
from quee_core.predictors.boosted_trees import BoostedTreesPredictor
from quee_core.predictors.constant import ConstantPredictor
from quee_core.predictors.logistic import LogisticPredictor
from quee_core.predictors.mlp import MLPPredictor
from quee_core.predictors.nearest_cluster import NearestClusterPredictor

__all__ = ["PREDICTORS", "Predictor", "Validation", "make_predictor", "predictor_class"]

_PREDICTORS: tuple[type[Predictor], ...] = (
    MLPPredictor,
    LogisticPredictor,
    BoostedTreesPredictor,
    NearestClusterPredictor,
    ConstantPredictor,
)

PREDICTORS: Mapping[str, type[Predictor]] = MappingProxyType({predictor.name: predictor for predictor in _PREDICTORS})


def predictor_class(name: str) -> type[Predictor]:
    """The registered class. Raises ConfigError with near names for one that is unknown."""
    if name not in PREDICTORS:
        raise ConfigError(f"predictor {name!r}: unknown; {did_you_mean(name, PREDICTORS)}")
    return PREDICTORS[name]


def make_predictor(name: str, options: Mapping[str, Any] | None = None) -> Predictor:
    """An unfitted predictor.

    options: hyper-parameters; `PREDICTORS[name].options_model` declares their names, bounds and defaults.
    Raises ConfigError for an unknown name or option, or one out of bounds.
    """
    return predictor_class(name)(options)
