"""The grid of discretisations and predictors: which points there are, and fitting them at one gate (design, section 9).

The unit of work is (gate, discretisation): its clusters and targets are made once and serve every predictor. The
test split is never seen here.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quee_core.archive import pack, unpack
from quee_core.clusters import Algorithm, cluster
from quee_core.config import SweepConfig
from quee_core.errors import ConfigError, NumericError, QueeError
from quee_core.fingerprints import canonical_json
from quee_core.paths import ROOT, Path, PathTree
from quee_core.policy import GatePolicy
from quee_core.predictors import PREDICTORS, Predictor, make_predictor, predictor_class
from quee_core.predictors.quality import brier, expected_calibration_error, rmse
from quee_core.tables import FeatureKind, Outcomes
from quee_core.targets import group_sums, targets_for

KIND = "gate-fits"
FEATURES: dict[str, tuple[FeatureKind, ...]] = {
    "uncertainty": ("uncertainty",),
    "embedding": ("embedding",),
    "both": ("uncertainty", "embedding"),
}


@dataclass(frozen=True)
class Discretisation:
    """How the feature space of a gate is cut into clusters; `clusters` None is K = ∞: labels are the targets."""

    clusters: int | None
    shrinkage: float
    features: str
    algorithm: Algorithm


@dataclass(frozen=True)
class GridPoint:
    """One member of the grid: targets, and the predictor fitted to them. `options` is canonical JSON."""

    discretisation: Discretisation
    predictor: str
    features: str
    options: str

    @property
    def shown_discretisation(self) -> Discretisation:
        """That of the targets, or the one that the predictor makes by itself, of the features it predicts from."""
        if not predictor_class(self.predictor).discretises:
            return self.discretisation
        made = make_predictor(self.predictor, _options(self)).options.model_dump()
        return Discretisation(made["clusters"], made["shrinkage"], self.features, made["algorithm"])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for reports and tracking; what does not apply where K is infinite is None."""
        shown = self.shown_discretisation
        finite = shown.clusters is not None
        return {
            "predictor": self.predictor,
            "features": self.features,
            "options": self.options,
            "clusters": shown.clusters,
            "shrinkage": shown.shrinkage if finite else None,
            "clustering_features": shown.features if finite else None,
            "algorithm": shown.algorithm if finite else None,
        }


@dataclass(frozen=True)
class Quality:
    """How a fitted predictor does on `select`: against targets (rmse) and against labels (the others)."""

    rmse: float
    brier: float
    ece: float


@dataclass(frozen=True, eq=False)
class GateFit:
    """A point fitted at one gate, or why it could not be."""

    point: GridPoint
    gate: Path
    predictor: Predictor | None
    quality: Quality | None
    seconds: float
    failure: str | None


def grid_points(config: SweepConfig) -> list[GridPoint]:
    """Every combination of targets and predictor that `config` asks for, without repeats.

    A predictor that makes clusters of its own meets only K = ∞. Raises ConfigError for an unknown predictor or
    option, and for a grid that is empty.
    """
    targets = config.targets
    discretisations = [
        Discretisation(k, n0 if k is not None else 1.0, targets.clustering_features, targets.algorithm)
        for k in targets.clusters
        for n0 in targets.shrinkage
    ]
    labels = Discretisation(None, 1.0, targets.clustering_features, targets.algorithm)
    points: dict[GridPoint, None] = {}
    for wanted in config.predictors:
        kind = predictor_class(wanted.name)
        make_predictor(wanted.name, wanted.options)  # refuses bad options before anything runs
        for own in (labels,) if kind.discretises else discretisations:
            points[GridPoint(own, wanted.name, wanted.features, canonical_json(wanted.options))] = None
    if not points:
        raise ConfigError("predictors: the grid is empty; name at least one predictor")
    return list(points)


def check_clusters(config: SweepConfig, images: int) -> None:
    """Raises ConfigError that names the field if it asks for more clusters than `images`, those of `target`."""
    advice = f"than the {images} images of the split target; lower it, or raise dataset.target or dataset.limit"
    for k in config.targets.clusters:
        if k is not None and k > images:
            raise ConfigError(f"targets.clusters: {k} is more clusters {advice}")
    for number, wanted in enumerate(config.predictors):
        if (k := make_predictor(wanted.name, wanted.options).least_images) > images:
            raise ConfigError(f"predictors.{number}: {wanted.name} makes {k} clusters, more {advice}")


def fit_gate(
    gate: Path, points: Sequence[GridPoint], tree: PathTree, target: Outcomes, select: Outcomes, seed: int
) -> list[GateFit]:
    """Fit points that share one discretisation at `gate`, on `target`, validated on `select`.

    Clusters are fitted once. A point that fails (NaN, options the data cannot meet) is returned with its failure
    and does not end the others. The root has no features, so its predictor is the paths' mean error.
    """
    columns = [tree.index[path] for path in tree.extensions(gate)]
    errors, seen = target.errors[:, columns], select.errors[:, columns]
    if gate == ROOT:
        return [_fit_root(point, errors, seen, target, select, seed) for point in points]
    own = points[0].discretisation
    try:
        targets, wanted = _targets(own, gate, errors, seen, target, select, seed)
    except QueeError as error:
        return [GateFit(point, gate, None, None, 0.0, str(error)) for point in points]
    return [
        _fit(point, gate, targets, wanted, errors=seen, target=target, select=select, seed=seed) for point in points
    ]


def assemble(point: GridPoint, tree: PathTree, fits: Iterable[GateFit]) -> GatePolicy | str:
    """The policy of one point out of its fits at all gates, or the first failure as text."""
    predictors: dict[Path, Predictor] = {}
    for fit in fits:
        if fit.point != point:
            continue
        if fit.predictor is None:
            return f"gate {fit.gate}: {fit.failure}"
        predictors[fit.gate] = fit.predictor
    kinds: dict[Path, tuple[FeatureKind, ...]] = {
        gate: () if gate == ROOT else FEATURES[point.features] for gate in predictors
    }
    return GatePolicy(tree, kinds, predictors)


def mean_quality(fits: Iterable[GateFit]) -> Quality:
    """Quality averaged over gates that have features. Raises NumericError if there is none."""
    found = [fit.quality for fit in fits if fit.quality is not None and fit.gate != ROOT]
    if not found:
        raise NumericError("no gate with features was fitted")
    return Quality(*(float(np.mean([getattr(q, name) for q in found])) for name in ("rmse", "brier", "ece")))


def fits_to_bytes(fits: Sequence[GateFit]) -> bytes:
    """Fits as one archive without pickle, in order."""
    arrays: dict[str, NDArray[Any]] = {}
    rows = []
    for k, fit in enumerate(fits):
        if fit.predictor is not None:
            arrays |= {f"{k}/{name}": array for name, array in fit.predictor.to_arrays().items()}
        rows.append(
            {
                "point": asdict(fit.point),
                "gate": str(fit.gate),
                "fitted": None if fit.predictor is None else fit.predictor.name,
                "quality": None if fit.quality is None else asdict(fit.quality),
                "seconds": fit.seconds,
                "failure": fit.failure,
            }
        )
    return pack(arrays, {"fits": rows}, kind=KIND)


def fits_from_bytes(data: bytes) -> list[GateFit]:
    """Read back what `fits_to_bytes` wrote. Raises DamagedTableError for anything else."""
    arrays, settings = unpack(data, kind=KIND)
    return [_read_fit(row, _below(arrays, str(k))) for k, row in enumerate(settings["fits"])]


def _read_fit(row: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> GateFit:
    made = row["point"]
    point = GridPoint(
        Discretisation(**made["discretisation"]), made["predictor"], made["features"], made["options"]
    )  # fmt: skip
    predictor = None if row["fitted"] is None else PREDICTORS[row["fitted"]].from_arrays(arrays)
    quality = None if row["quality"] is None else Quality(**row["quality"])
    return GateFit(point, Path.parse(row["gate"]), predictor, quality, row["seconds"], row["failure"])


def _below(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.partition("/")[2]: array for name, array in arrays.items() if name.partition("/")[0] == prefix}


def targets_of(
    point: GridPoint, gate: Path, tree: PathTree, target: Outcomes, others: Outcomes, seed: int
) -> NDArray[np.float64]:
    """What equation 3 says of images outside `target`: rates of their clusters, fitted on `target`; float64 [n, E]."""
    columns = [tree.index[path] for path in tree.extensions(gate)]
    _, wanted = _targets(
        point.discretisation, gate, target.errors[:, columns], others.errors[:, columns], target, others, seed
    )
    return wanted


def _targets(
    own: Discretisation,
    gate: Path,
    errors: NDArray[np.bool_],
    seen: NDArray[np.bool_],
    target: Outcomes,
    others: Outcomes,
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Targets of the `target` rows (own label left out) and what those clusters say of the `others`' rows."""
    if own.clusters is None:
        return targets_for(errors, None, own.shrinkage), seen.astype(np.float64)
    kinds = FEATURES[own.features]
    features = target.gate_features(gate, kinds)
    found = cluster(features, own.clusters, own.algorithm, seed)
    assignment = found.assign(features)
    sizes = np.bincount(assignment, minlength=found.k)
    sums = group_sums(errors.astype(np.float64), assignment, found.k)
    rates = (sums + own.shrinkage * errors.mean(axis=0)) / (sizes[:, None] + own.shrinkage)
    wanted = rates[found.assign(others.gate_features(gate, kinds))]
    return targets_for(errors, assignment, own.shrinkage), wanted


def _fit(
    point: GridPoint,
    gate: Path,
    targets: NDArray[np.float64],
    wanted: NDArray[np.float64],
    *,
    errors: NDArray[np.bool_],
    target: Outcomes,
    select: Outcomes,
    seed: int,
) -> GateFit:
    started = time.perf_counter()
    kinds = FEATURES[point.features]
    seen = select.gate_features(gate, kinds)
    predictor = make_predictor(point.predictor, _options(point))
    try:
        predictor.fit(target.gate_features(gate, kinds), targets, validation=(seen, errors), seed=seed)
        quality = _quality(predictor.predict(seen), wanted, errors)
    except QueeError as error:
        return GateFit(point, gate, None, None, time.perf_counter() - started, str(error))
    return GateFit(point, gate, predictor, quality, time.perf_counter() - started, None)


def _fit_root(
    point: GridPoint,
    errors: NDArray[np.bool_],
    seen: NDArray[np.bool_],
    target: Outcomes,
    select: Outcomes,
    seed: int,
) -> GateFit:
    nothing, unseen = target.gate_features(ROOT, ()), select.gate_features(ROOT, ())
    predictor = make_predictor("constant").fit(nothing, errors.astype(np.float64), validation=(unseen, seen), seed=seed)
    return GateFit(point, ROOT, predictor, None, 0.0, None)


def _quality(predicted: NDArray[np.float64], wanted: NDArray[np.float64], errors: NDArray[np.bool_]) -> Quality:
    return Quality(rmse(predicted, wanted), brier(predicted, errors), expected_calibration_error(predicted, errors))


def _options(point: GridPoint) -> dict[str, Any]:
    options: dict[str, Any] = json.loads(point.options)
    return options
