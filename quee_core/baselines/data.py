"""What a baseline is given, and what it gives back."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quee_core.errors import InvalidPathError, NumericError, ShapeMismatchError
from quee_core.fronts import Decisions
from quee_core.gates import check_prices
from quee_core.paths import PathTree
from quee_core.tables import Outcomes

MAX_PATHS = np.iinfo(np.int16).max  # choices are int16
MAX_PRICES = 60  # of the grid, evenly spread, at which gates are trained: as many as rules compete for to ship


@dataclass(frozen=True, eq=False)
class BaselineData:
    """Outcomes and costs that all methods share.

    final, every: relative costs float64 [paths], without and with the heads of the exits on the way.
    select: what may be fitted and tuned on: the images of `target` and `select`. classes: how many there are. parts:
    outcomes that `select` joins, in its order, with the embeddings that it may lack; none where it has them itself.
    Raises ShapeMismatchError unless costs and outcomes are aligned with the tree, NumericError for costs that are not
    finite, InvalidPathError for a tree of more than 32,767 paths.
    """

    tree: PathTree
    final: NDArray[np.float64]
    every: NDArray[np.float64]
    select: Outcomes
    test: Outcomes
    seed: int
    classes: int
    parts: tuple[Outcomes, ...] = ()

    def __post_init__(self) -> None:
        paths = len(self.tree.paths)
        if paths > MAX_PATHS:
            raise InvalidPathError(f"a tree of {paths} paths cannot be compared with baselines; at most {MAX_PATHS}")
        for name, costs in (("final", self.final), ("every", self.every)):
            if costs.shape != (paths,):
                raise ShapeMismatchError(
                    f"{name} costs {costs.shape}: the tree has {paths} paths; want one cost a path"
                )
            if not np.isfinite(costs).all():
                raise NumericError(f"{name} costs must be finite; found {costs[~np.isfinite(costs)][0]}")
        for name, outcomes in (("select", self.select), ("test", self.test)):
            if outcomes.paths != self.tree.paths:
                raise ShapeMismatchError(
                    f"{name}: its outcomes are of {len(outcomes.paths)} paths that are not the tree's"
                )
            if not outcomes.images:
                raise ShapeMismatchError(f"{name}: no images")
        if self.parts and sum(part.images for part in self.parts) != self.select.images:
            raise ShapeMismatchError(f"select: its {self.select.images} images are not those of its parts")

    def ladder(self, bits: int) -> list[int]:
        """Positions of the uniform paths at `bits`, exit 1 first. Raises InvalidPathError if the tree lacks one."""
        paths = self.tree.ladder(bits)
        if absent := [path for path in paths if path not in self.tree.index]:
            raise InvalidPathError(f"path {absent[0]}: baselines need every uniform path, and the tree lacks this one")
        return [self.tree.index[path] for path in paths]

    def embeddings(self, position: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """PCA components behind the answers of the path at `position`, of `select` and of `test`; float32 [n, d]."""
        own = [part.embedding[:, position].astype(np.float32) for part in self.parts or (self.select,)]
        return np.concatenate(own), self.test.embedding[:, position].astype(np.float32)


@dataclass(frozen=True, eq=False)
class PolicyPair:
    """A method's decisions on `select` and on `test`, setting by setting.

    costs: relative, float64 [paths], or [settings, paths] as `operating_points` takes them. errors: of answers that are
    the method's own and not the tables', on `select` and on `test`, bool [n, paths]. trainings: models or sets of
    gates that were trained, each for itself; tuning thresholds is no training. trained: what they are.
    Raises ShapeMismatchError unless both have the same settings.
    """

    select: Decisions
    test: Decisions
    costs: NDArray[np.float64]
    errors: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None
    trainings: int = 0
    trained: str = "nothing"

    def __post_init__(self) -> None:
        if self.select.settings != self.test.settings:
            raise ShapeMismatchError(
                f"{self.select.method}: {len(self.select.settings)} settings on select are not the "
                f"{len(self.test.settings)} on test; want the same, in the same order"
            )


def thinned(prices: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most `MAX_PRICES` of the prices λ, evenly spread over the grid. Raises ConfigError for bad prices."""
    grid = check_prices(prices)
    picked = np.unique(np.linspace(0, len(grid) - 1, min(MAX_PRICES, len(grid))).round().astype(int))
    kept: NDArray[np.float64] = grid[picked]
    return kept
