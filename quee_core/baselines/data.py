"""What a baseline is given, and what it gives back."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quee_core.errors import InvalidPathError, NumericError, ShapeMismatchError
from quee_core.fronts import Decisions
from quee_core.paths import PathTree
from quee_core.tables import Outcomes

MAX_PATHS = np.iinfo(np.int16).max  # choices are int16


@dataclass(frozen=True, eq=False)
class BaselineData:
    """Outcomes and costs that all methods share.

    final, every: relative costs float64 [paths], without and with the heads of the exits on the way.
    select: what may be tuned on: the images of `select`, and those of `target` too, for no baseline is fitted to them.
    Raises ShapeMismatchError unless costs and outcomes are aligned with the tree, NumericError for costs that are not
    finite, InvalidPathError for a tree of more than 32,767 paths.
    """

    tree: PathTree
    final: NDArray[np.float64]
    every: NDArray[np.float64]
    select: Outcomes
    test: Outcomes
    seed: int

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

    def ladder(self, bits: int) -> list[int]:
        """Positions of the uniform paths at `bits`, exit 1 first. Raises InvalidPathError if the tree lacks one."""
        paths = self.tree.ladder(bits)
        if absent := [path for path in paths if path not in self.tree.index]:
            raise InvalidPathError(f"path {absent[0]}: baselines need every uniform path, and the tree lacks this one")
        return [self.tree.index[path] for path in paths]


@dataclass(frozen=True, eq=False)
class PolicyPair:
    """A method's decisions on `select` and on `test`, setting by setting.

    costs: relative, float64 [paths], or [settings, paths] as `operating_points` takes them.
    Raises ShapeMismatchError unless both have the same settings.
    """

    select: Decisions
    test: Decisions
    costs: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.select.settings != self.test.settings:
            raise ShapeMismatchError(
                f"{self.select.method}: {len(self.select.settings)} settings on select are not the "
                f"{len(self.test.settings)} on test; want the same, in the same order"
            )
