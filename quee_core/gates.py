"""The gates' rule, and its replay over tables: which path each image takes at each price (design, section 9)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quee_core.errors import ConfigError, InvalidPathError, NumericError, ShapeMismatchError
from quee_core.paths import ROOT, Path, PathTree

EXIT_NOW = 0  # an action; any other action is the bit-width of the next segment
BLOCK_SCORES = 1 << 16  # scores held at once: half a MiB, so that they stay in the cache
MAX_REPLAY_PATHS = np.iinfo(np.int16).max


@dataclass(frozen=True, eq=False)
class GateTable:
    """What one gate chooses between.

    extensions: the E considered paths in tree order, so the gate itself first (the root is not one of them).
    costs: float64 [E], cost of each, in the unit that prices are per.
    Raises ShapeMismatchError if the two disagree, NumericError for costs that are not finite.
    """

    gate: Path
    extensions: tuple[Path, ...]
    costs: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.costs.shape != (len(self.extensions),) or not self.extensions:
            raise ShapeMismatchError(
                f"gate {self.gate}: costs {self.costs.shape} for {len(self.extensions)} paths; want one cost a path"
            )
        if strangers := [path for path in self.extensions if not path.extends(self.gate) or path.exit == 0]:
            raise InvalidPathError(f"gate {self.gate}: path {strangers[0]} does not pass through it")
        if not np.isfinite(self.costs).all():
            raise NumericError(f"gate {self.gate}: costs must be finite, found {self.costs.tolist()}")

    @cached_property
    def actions(self) -> NDArray[np.int16]:
        """What taking each extension means at this gate: `EXIT_NOW`, or the next segment's bit-width; int16 [E]."""
        depth = self.gate.exit
        return np.array([p.bits[depth] if p.exit > depth else EXIT_NOW for p in self.extensions], np.int16)

    @cached_property
    def preference(self) -> NDArray[np.intp]:
        """Extensions by ascending cost, then tree order: which of several equally good ones is taken; intp [E]."""
        return np.argsort(self.costs, kind="stable")


def gate_tables(tree: PathTree, costs: NDArray[np.float64]) -> dict[Path, GateTable]:
    """The table of every gate of `tree`, in tree order.

    costs: float64 [paths], aligned with `tree.paths`. Raises ShapeMismatchError if it is not.
    """
    costs = np.asarray(costs, np.float64)
    if costs.shape != (len(tree.paths),):
        raise ShapeMismatchError(f"costs {costs.shape}: the tree has {len(tree.paths)} paths; want one cost a path")
    return {gate: _table(tree, gate, costs) for gate in tree.gates}


def _table(tree: PathTree, gate: Path, costs: NDArray[np.float64]) -> GateTable:
    extensions = tree.extensions(gate)
    return GateTable(gate, extensions, costs[[tree.index[path] for path in extensions]])


def check_prices(prices: ArrayLike) -> NDArray[np.float64]:
    """The λ grid as float64 [Λ], order kept. Raises ConfigError if empty, or if any λ is NaN, infinite or below 0."""
    grid = np.atleast_1d(np.asarray(prices, np.float64))
    if grid.ndim != 1 or grid.size == 0:
        raise ConfigError(f"prices: a λ grid of shape {grid.shape}; want at least one price in a row")
    if (bad := grid[~(np.isfinite(grid) & (grid >= 0))]).size:
        raise ConfigError(f"prices: λ = {bad[0]}; want finite prices of 0 or more")
    return grid


def next_actions(table: GateTable, predicted_errors: NDArray[np.float64], prices: ArrayLike) -> NDArray[np.int16]:
    """What the gate does with each image at each price: the first step towards argmin p̂_e + λ c.

    table: the gate's paths and costs. predicted_errors: float [n, E], aligned with `table.extensions`.
    prices: λ ≥ 0, [Λ]. Returns int16 [Λ, n]: `EXIT_NOW`, or the bit-width at which the next segment runs.
    Scores are p̂ + (λ · c) in float64. Of equal scores the cheaper path wins, then the earlier in tree order.
    Raises ShapeMismatchError, NumericError for predictions that are not finite, ConfigError for bad prices.
    """
    grid = check_prices(prices)
    preferred = _preferred(table, _checked(table, predicted_errors))
    costs, actions = table.costs[table.preference], table.actions[table.preference]
    chosen = np.empty((len(grid), len(preferred)), np.int16)
    for k, price in enumerate(grid):
        chosen[k] = actions[_best(preferred, price * costs)]
    return chosen


def replay(
    tree: PathTree,
    predictions: Mapping[Path, NDArray[np.float64]],
    costs: NDArray[np.float64],
    prices: ArrayLike,
    *,
    images: int | None = None,
) -> NDArray[np.int16]:
    """The path that every image takes at every price, all gates' decisions played through without the network.

    predictions: p̂_e at every gate of `tree`, float [n, E], row i being image i, columns as `tree.extensions(gate)`;
      float [E] where a gate says the same of all images, as the root does. Rows that do not reach a gate don't count.
    costs: float64 [paths], aligned with `tree.paths`. prices: λ ≥ 0, [Λ].
    images: n; needed only when every gate's prediction is [E].
    Returns int16 [Λ, n], positions in `tree.paths`. Each image's row depends on its own predictions alone, and the
    decisions are those of `next_actions`, so a network that asks it at each gate takes the same paths.
    Raises ShapeMismatchError for a missing gate or disagreeing shapes, NumericError for predictions that are not
    finite, ConfigError for bad prices, InvalidPathError for a tree of more than 32,767 paths.
    """
    if len(tree.paths) > MAX_REPLAY_PATHS:
        raise InvalidPathError(f"a tree of {len(tree.paths)} paths cannot be replayed; at most {MAX_REPLAY_PATHS}")
    grid = check_prices(prices)
    tables = gate_tables(tree, costs)
    if absent := [str(gate) for gate in tables if gate not in predictions]:
        raise ShapeMismatchError(f"predictions: none for gate {absent[0]} ({len(absent)} of {len(tables)} missing)")
    checked = {gate: _checked(table, predictions[gate]) for gate, table in tables.items()}
    n = _image_count({gate: len(p) for gate, p in checked.items() if np.ndim(predictions[gate]) == 2}, images)
    stations = {gate: _Station.at(tree, tables[gate], checked[gate]) for gate in tables}
    choice = np.empty((len(grid), n), np.int16)
    for k, price in enumerate(grid):
        _play(stations, price, choice[k])
    return choice


@dataclass(frozen=True, eq=False)
class _Station:
    """A gate made ready for many prices; columns stand in order of preference."""

    preferred: NDArray[np.float64]  # [n, E], or [1, E] where all images are alike
    costs: NDArray[np.float64]  # [E]
    steps: NDArray[np.intp]  # [E], which of `outcomes` each extension begins with
    outcomes: tuple[tuple[Path, int], ...]  # where a step leads, and the position of that path in tree.paths

    @classmethod
    def at(cls, tree: PathTree, table: GateTable, predicted: NDArray[np.float64]) -> "_Station":
        preferred = _preferred(table, predicted)
        if (preferred == preferred[:1]).all():
            preferred = preferred[:1]
        actions, steps = np.unique(table.actions[table.preference], return_inverse=True)
        leads = [table.gate if action == EXIT_NOW else table.gate.child(int(action)) for action in actions]
        return cls(preferred, table.costs[table.preference], steps, tuple((p, tree.index[p]) for p in leads))


def _play(stations: Mapping[Path, _Station], price: float, choice: NDArray[np.int16]) -> None:
    """Fill `choice` [n] with the paths taken at one price; `stations` in tree order, the root first."""
    arrived = {ROOT: np.arange(len(choice))}
    for gate, station in stations.items():
        rows = arrived.pop(gate, None)
        if rows is None or not rows.size:
            continue
        alike = len(station.preferred) == 1
        everyone = alike or len(rows) == len(station.preferred)
        preferred = station.preferred if everyone else station.preferred[rows]
        steps = station.steps[_best(preferred, price * station.costs)]
        for step, (path, position) in enumerate(station.outcomes):
            taken = rows[np.broadcast_to(steps == step, rows.shape)]
            if path in stations and path != gate:
                arrived[path] = taken
            else:
                choice[taken] = position


def _best(preferred: NDArray[np.float64], priced: NDArray[np.float64]) -> NDArray[np.intp]:
    """Column of the least score in each row. The first of equals, so columns must stand in order of preference."""
    rows, columns = preferred.shape
    best = np.empty(rows, np.intp)
    block = max(1, BLOCK_SCORES // columns)
    for start in range(0, rows, block):
        piece = slice(start, start + block)
        np.argmin(preferred[piece] + priced, axis=1, out=best[piece])
    return best


def _preferred(table: GateTable, predicted: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.take(predicted, table.preference, axis=1)  # rows contiguous, unlike predicted[:, preference]


def _checked(table: GateTable, predicted: NDArray[np.float64]) -> NDArray[np.float64]:
    values = np.atleast_2d(np.asarray(predicted, np.float64))
    if values.ndim != 2 or values.shape[1] != len(table.extensions):
        raise ShapeMismatchError(
            f"gate {table.gate}: predictions {np.shape(predicted)} for {len(table.extensions)} paths; want [n, paths]"
        )
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise NumericError(
            f"gate {table.gate}: predicted error {values[row, column]} at row {row}, path {table.extensions[column]}"
        )
    return values


def _image_count(rows: Mapping[Path, int], images: int | None) -> int:
    counts = set(rows.values()) | ({images} if images is not None else set())
    if len(counts) != 1:
        told = ", ".join(f"{gate}: {count}" for gate, count in rows.items()) or "none"
        raise ShapeMismatchError(f"predictions: numbers of images disagree or are unknown ({told}; images: {images})")
    return counts.pop()
