"""What a baseline is given, and what it gives back."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quee_core.fronts import Decisions
from quee_core.paths import Path, PathTree
from quee_core.tables import Outcomes


@dataclass(frozen=True, eq=False)
class BaselineData:
    """Outcomes and costs that all methods share.

    final, every: relative costs float64 [paths], without and with the heads of the exits on the way.
    """

    tree: PathTree
    final: NDArray[np.float64]
    every: NDArray[np.float64]
    select: Outcomes
    test: Outcomes
    seed: int

    def ladder(self, bits: int) -> list[int]:
        """Positions of the uniform paths at `bits`, exit 1 first."""
        return [self.tree.index[Path((bits,) * exit_)] for exit_ in range(1, self.tree.depth + 1)]


@dataclass(frozen=True, eq=False)
class PolicyPair:
    """A method's decisions on `select` and on `test`, setting by setting; costs: relative, float64 [paths]."""

    select: Decisions
    test: Decisions
    costs: NDArray[np.float64]
