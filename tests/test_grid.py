"""The grid: which points there are, and what reports and tracking are told of each."""

import itertools
from pathlib import Path

import pytest

from quee_core.config import SweepConfig
from quee_core.grid import GridPoint, grid_points
from quee_core.predictors import PREDICTORS
from quee_core.predictors.nearest_cluster import NearestClusterOptions
from tests.conftest import small_config

DEFAULTS = NearestClusterOptions()


def points_of(folder: Path, predictor: dict, **targets: object) -> list[GridPoint]:
    raw = small_config(folder).model_dump(exclude_unset=True) | {"targets": targets, "predictors": [predictor]}
    return grid_points(SweepConfig.model_validate(raw))


def test_a_point_tells_the_clusters_that_its_targets_are_counted_in(tmp_path: Path) -> None:
    targets = {"clusters": [None, 7], "shrinkage": [2.0, 3.0], "clustering_features": "embedding"}
    told = [p.as_dict() for p in points_of(tmp_path, {"name": "mlp"}, **targets, algorithm="minibatch")]
    own = {"predictor": "mlp", "features": "both", "options": "{}"}
    infinite = {"clusters": None, "shrinkage": None, "clustering_features": None, "algorithm": None}
    finite = {"clusters": 7, "clustering_features": "embedding", "algorithm": "minibatch"}
    assert told == [own | infinite, own | finite | {"shrinkage": 2.0}, own | finite | {"shrinkage": 3.0}]


@pytest.mark.parametrize(
    ("options", "clusters", "shrinkage", "algorithm"),
    [
        ({}, DEFAULTS.clusters, DEFAULTS.shrinkage, DEFAULTS.algorithm),
        ({"clusters": 3, "shrinkage": 1.5, "algorithm": "minibatch"}, 3, 1.5, "minibatch"),
    ],
)
def test_a_predictor_that_makes_clusters_of_its_own_tells_those(
    tmp_path: Path, options: dict, clusters: int, shrinkage: float, algorithm: str
) -> None:
    predictor = {"name": "nearest_cluster", "features": "uncertainty", "options": options}
    [point] = points_of(tmp_path, predictor, clusters=[None, 7, 11], clustering_features="embedding")
    assert point.discretisation.clusters is None, "its targets are the labels"
    told = point.as_dict()
    assert (told["clusters"], told["shrinkage"], told["algorithm"]) == (clusters, shrinkage, algorithm)
    assert told["clustering_features"] == "uncertainty", "it clusters what it predicts from"


def test_no_two_points_of_a_grid_are_told_alike(tmp_path: Path) -> None:
    raw = small_config(tmp_path).model_dump(exclude_unset=True)
    raw["targets"] = {"clusters": [None, 20, 100], "shrinkage": [1.0, 5.0]}
    raw["predictors"] = [
        {"name": name, "features": features}
        for name, features in itertools.product(PREDICTORS, ("uncertainty", "embedding", "both"))
    ] + [{"name": "nearest_cluster", "options": {"clusters": 7}}]
    points = grid_points(SweepConfig.model_validate(raw))
    told = [tuple(point.as_dict().values()) for point in points]
    assert len(set(told)) == len(points) == len(set(points))
