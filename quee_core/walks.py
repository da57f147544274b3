"""One image's walk through the tree by the gates' rule: what each gate saw, foretold, chose and had cost (Fig. 2)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quee_core.gates import EXIT_NOW, GateTable, check_prices, gate_tables, next_actions
from quee_core.paths import ROOT, Path
from quee_core.policy import GatePolicy
from quee_core.router import Router, answer_table
from quee_core.tables import UNCERTAINTY, Outcomes

Look = Callable[[Path], Outcomes]  # of one image: what the exit at the end of a path says


@dataclass(frozen=True)
class ExitAnswer:
    """What an exit says of the image. features: p_max, entropy, margin, entropy_t2, by name."""

    label: int
    features: dict[str, float]


@dataclass(frozen=True)
class Option:
    """A considered extension of a gate: its predicted error, its cost, and the loss p̂ + λ c that they make."""

    path: Path
    error: float
    cost: float
    loss: float


@dataclass(frozen=True)
class Visit:
    """A gate that the image came to. seen: None at the root. options: in tree order. chosen: the one of least loss.
    action: `EXIT_NOW`, or the bit-width of the next segment. cost: relative, of all that had run by then.
    """

    gate: Path
    seen: ExitAnswer | None
    options: tuple[Option, ...]
    chosen: Path
    action: int
    cost: float


@dataclass(frozen=True)
class Walk:
    """Gates in the order of the visits; path, label and cost of the answer, costs relative to the full path."""

    price: float
    visits: tuple[Visit, ...]
    path: Path
    answer: ExitAnswer
    cost: float


def walk_of(policy: GatePolicy, costs: NDArray[np.float64], price: float, look: Look) -> Walk:
    """Walk one image through `policy`'s tree at the price λ, looking only where it comes by.

    costs: relative, float64 [paths], gates and heads on the way included. Decisions are those of `next_actions`, so of
    router and replay. Raises ConfigError for a price that is negative or not finite.
    """
    worth = float(check_prices(price)[0])
    tree, tables = policy.tree, gate_tables(policy.tree, costs)
    gate, visits = ROOT, list[Visit]()
    while gate in tables:
        outcomes = None if gate == ROOT else look(gate)
        features = np.zeros((1, 0)) if outcomes is None else outcomes.gate_features(gate, policy.kinds[gate])
        predicted = policy.predictors[gate].predict(features)
        action = int(next_actions(tables[gate], predicted, [worth])[0, 0])
        options, chosen = _options(tables[gate], predicted[0], worth)
        seen = None if outcomes is None else _answer(outcomes, gate)
        so_far = 0.0 if gate == ROOT else float(costs[tree.index[gate]])
        visits.append(Visit(gate, seen, options, chosen, action, so_far))
        if action == EXIT_NOW:
            break
        gate = gate.child(action)
    seen = visits[-1].seen if visits[-1].gate == gate else _answer(look(gate), gate)
    if seen is None:  # the root is no answer: EXIT_NOW is none of its actions
        raise AssertionError(f"the walk ends at {gate}")
    return Walk(worth, tuple(visits), gate, seen, float(costs[tree.index[gate]]))


def explain(router: Router, image: Tensor, price: float) -> Walk:
    """Walk a preprocessed image float [c, h, w] by the network itself, one segment at a time."""
    network, known = router.network, {ROOT: router.network.stem(image.unsqueeze(0).to(router.network.device))}

    def look(path: Path) -> Outcomes:
        known[path] = network.run(path.exit - 1, path.bits[-1], known[path.parent])
        return answer_table(path, network.answer(path.exit, known[path]))

    return walk_of(router.policy, router.costs, price, look)


def longest_walk(choice: NDArray[np.int16], paths: tuple[Path, ...]) -> int:
    """The first image, by position, among those whose path goes deepest and changes its bit-width most often.

    choice: int [n], positions in `paths`.
    """
    worth = [(path.exit, sum(a != b for a, b in zip(path.bits, path.bits[1:], strict=False))) for path in paths]
    order = sorted(range(len(paths)), key=lambda k: worth[k])
    rank = np.empty(len(paths), np.intp)
    rank[order] = np.arange(len(paths))
    return int(np.argmax(rank[choice]))


def _options(table: GateTable, predicted: NDArray[np.float64], price: float) -> tuple[tuple[Option, ...], Path]:
    losses = predicted + price * table.costs
    rows = zip(table.extensions, predicted.tolist(), table.costs.tolist(), losses.tolist(), strict=True)
    best = table.preference[np.argmin(losses[table.preference])]
    return tuple(Option(*row) for row in rows), table.extensions[int(best)]


def _answer(outcomes: Outcomes, path: Path) -> ExitAnswer:
    k = outcomes.position(path)
    values = map(float, outcomes.uncertainty[0, k])
    return ExitAnswer(int(outcomes.predicted[0, k]), dict(zip(UNCERTAINTY, values, strict=True)))
