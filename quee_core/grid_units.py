"""The grid in units of work, and what a machine must have to fit them (design, section 9).

A unit is a gate, a discretisation and some predictors on it. Its key names it in the store, and depends on neither
the number of workers nor who fits it.
"""

import itertools
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from quee_core import __version__
from quee_core.errors import QueeError
from quee_core.fingerprints import code_version, fingerprint, library_versions
from quee_core.grid import Discretisation, GateFit, GridPoint, fit_gate, fits_from_bytes, fits_to_bytes
from quee_core.paths import Path, PathTree
from quee_core.store import Store
from quee_core.tables import Outcomes

logger = logging.getLogger(__name__)

POINTS_A_UNIT = 8  # at most: what a crash can lose, and how evenly workers end; each unit clusters anew
KIND = "gate-fits"
GRID_CODE = (
    "quee_core.grid", "quee_core.clusters", "quee_core.targets", "quee_core.fixed_point", "quee_core.predictors.base",
    "quee_core.predictors.mlp", "quee_core.predictors.logistic", "quee_core.predictors.boosted_trees",
    "quee_core.predictors.nearest_cluster", "quee_core.predictors.constant", "quee_core.predictors.quality",
)  # fmt: skip
_WORKER_CODE = (
    *GRID_CODE, "quee_core.grid_units", "quee_core.shared_outcomes", "quee_core.tables", "quee_core.store",
    "quee_core.entries", "quee_core.places", "quee_core.s3_place",
    "quee_core.archive", "quee_core.paths", "quee_core.policy", "quee_core.predictors",
)  # fmt: skip
_FITTING = ("torch", "numpy", "scipy", "scikit-learn", "dask")


@dataclass(frozen=True)
class GridUnit:
    """Work of the grid that shares clusters and targets: one gate, one discretisation, some predictors on it."""

    gate: Path
    points: tuple[GridPoint, ...]

    @property
    def alone(self) -> list["GridUnit"]:
        """Each point as a unit by itself."""
        return [replace(self, points=(point,)) for point in self.points]


@dataclass(frozen=True, eq=False)
class UnitFits:
    """The fits of a unit, in the order of its points; how many were computed, and how many the store had."""

    fits: list[GateFit]
    computed: int
    reused: int

    @classmethod
    def together(cls, parts: Sequence["UnitFits"]) -> "UnitFits":
        """Those of a unit whose points were fitted in parts."""
        fits = [fit for part in parts for fit in part.fits]
        return cls(fits, sum(part.computed for part in parts), sum(part.reused for part in parts))


def grid_units(points: Sequence[GridPoint], tree: PathTree) -> list[GridUnit]:
    """The grid cut into units of `POINTS_A_UNIT` points or fewer, the long ones first: then all workers end together.

    A unit's length grows with its points, and with the paths that they predict; the root's are constants.
    """
    grouped: dict[Discretisation, list[GridPoint]] = {}
    for point in points:
        grouped.setdefault(point.discretisation, []).append(point)
    chunks = [chunk for group in grouped.values() for chunk in _evenly(group)]
    sizes = {gate: len(tree.extensions(gate)) if gate.exit else 0 for gate in tree.gates}
    units = [GridUnit(gate, chunk) for gate in tree.gates for chunk in chunks]
    return sorted(units, key=lambda unit: -sizes[unit.gate] * len(unit.points))


def grid_inputs_key(outcomes_key: str) -> str:
    """Fingerprint of the outcomes and of the code that fits them.

    Taken once, before units go out to threads: CPython 3.11's parser, which reads the code, fails in several at once.
    """
    return fingerprint([outcomes_key, code_version(GRID_CODE)])


def unit_key(unit: GridUnit, seed: int, inputs_key: str) -> str:
    """What a unit's fits are called in the store. inputs_key: what `grid_inputs_key` gives for the outcomes."""
    return fingerprint(
        {
            "inputs": inputs_key,
            "gate": str(unit.gate),
            "points": [asdict(point) for point in unit.points],
            "seed": seed,
        }
    )


def fit_unit(
    unit: GridUnit, tree: PathTree, target: Outcomes, select: Outcomes, seed: int, store: Store, inputs_key: str
) -> UnitFits:
    """Fit a unit, or find its fits in the store; what was fitted is persisted at once (design, section 9).

    A point that ends in an exception of a library is returned with its failure, and so are the others of its unit,
    fitted. That failure is not persisted: it may come of the machine, and the next sweep tries the point again.
    inputs_key: what `grid_inputs_key` gives for the outcomes.
    """
    key = unit_key(unit, seed, inputs_key)
    data = store.get_artefact(KIND, key)
    if data is not None:
        return UnitFits(fits_from_bytes(data), 0, len(unit.points))
    try:
        fits = fit_gate(unit.gate, unit.points, tree, target, select, seed)
    except QueeError:
        raise
    except Exception as error:
        if len(unit.points) == 1:
            logger.info("gate %s, %s", unit.gate, unit.points[0], exc_info=True)
            return UnitFits([failed(unit, in_one_line(error))], 1, 0)
        return UnitFits.together([fit_unit(one, tree, target, select, seed, store, inputs_key) for one in unit.alone])
    keep_unit(unit, fits, seed, store, inputs_key)
    return UnitFits(fits, len(unit.points), 0)


def keep_unit(unit: GridUnit, fits: Sequence[GateFit], seed: int, store: Store, inputs_key: str) -> None:
    """Persist a unit's fits, in the order of its points. Raises StoreError."""
    store.put_artefact(KIND, unit_key(unit, seed, inputs_key), fits_to_bytes(fits))


def failed(unit: GridUnit, reason: str) -> GateFit:
    """The fit of a unit of one point that could not be made, for a reason that lies outside it."""
    [point] = unit.points
    return GateFit(point, unit.gate, None, None, 0.0, reason)


def failures_key(fits: Sequence[GateFit]) -> str:
    """Fingerprint of which fits failed; empty if none did: a failure may be gone in the next sweep."""
    lost = [[str(fit.gate), asdict(fit.point), fit.failure] for fit in fits if fit.predictor is None]
    return fingerprint(lost) if lost else ""


def in_one_line(error: BaseException) -> str:
    """A library's exception as a reason: its kind, and what it says, shortened to a line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__


def grid_build() -> dict[str, str]:
    """What decides the bits of a fit on a machine: versions of quee, of its code, of Python and of the libraries."""
    versions = library_versions()
    return {
        "quee": __version__,
        "quee's code": code_version(_WORKER_CODE)[:12],
        "python": platform.python_version(),
        **{name: versions.get(name, "none") for name in _FITTING},
    }


def build_differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Where two builds differ, as a clause; empty where they don't."""
    return ", ".join(
        f"{name} is {theirs.get(name, 'unknown')} there and {ours[name]} here"
        for name in ours
        if theirs.get(name) != ours[name]
    )


def _evenly(points: Sequence[GridPoint]) -> list[tuple[GridPoint, ...]]:
    count = -(-len(points) // POINTS_A_UNIT)
    ends = [len(points) * k // count for k in range(count + 1)]
    return [tuple(points[start:end]) for start, end in itertools.pairwise(ends)]
