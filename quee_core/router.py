"""The deployable network: it takes the gates' decisions itself, and computes only what they ask for (design, 9)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quee_core.cascades import OWN, SUMMED, AnswerKind, Cascade, look_costs
from quee_core.costs import CostTable, path_costs, relative
from quee_core.errors import InvalidPathError, ShapeMismatchError
from quee_core.gates import EXIT_NOW, GateTable, check_prices, gate_tables, next_actions
from quee_core.network import Answer, PathNetwork
from quee_core.paths import ROOT, Path
from quee_core.policy import GatePolicy
from quee_core.revisions import Revisions
from quee_core.shipping import GateRule, Rule
from quee_core.tables import Outcomes, feature_table, softmax
from quee_core.thresholds import confidence_of


@dataclass(frozen=True, eq=False)
class Routed:
    """What the router answers for n images.

    label: int64 [n], position among the classes. probabilities: float32 [n, classes], of the exit that answered.
    path: int16 [n], position in the tree's paths, of the answer. cost: float64 [n], relative to the full path at the
    highest bit-width, all that ran included: heads, gates, and looks that were not sure. journeys: by position of a
    path, what has run when it answers, "2 > 4-4" where it was a second look.
    """

    label: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    path: NDArray[np.int16]
    cost: NDArray[np.float64]
    journeys: Mapping[int, str]


class Router(nn.Module):
    """Sends every image of a batch along its own path, regrouping the survivors at each gate.

    network: runs segments and heads. policy: predicts errors at every gate. table: cost of every piece, the policy's
    gates included. revisions: of the answers of cascades that ask for it. Decisions are those of `gates.replay` and
    `Cascade.decide` on the tables, image by image, whatever the batch.
    """

    def __init__(
        self, network: PathNetwork, policy: GatePolicy, table: CostTable, revisions: Revisions | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.policy = policy
        self.table = table
        self.revisions = revisions
        tree = policy.tree
        self.costs = relative(path_costs(table, tree.paths, evaluated="every"), table, tree)
        self._tables: Mapping[Path, GateTable] = gate_tables(tree, self.costs)
        self._gated_journeys = {k: str(path) for k, path in enumerate(tree.paths)}

    def forward(self, images: Tensor, rule: Rule) -> Routed:
        """Route preprocessed images float [n, c, h, w] by the gates at a price, or by a cascade.

        Raises ConfigError for a price that is negative or not finite, ShapeMismatchError for no images,
        InvalidPathError for a cascade that looks along a path that is not in the tree, or asks for revisions that the
        router does not have.
        """
        if images.ndim != 4 or len(images) == 0:
            raise ShapeMismatchError(f"images: shape {tuple(images.shape)}; want [n, channels, height, width], n >= 1")
        stem = self.network.stem(images.to(self.network.device))
        return self._cascaded(stem, rule) if isinstance(rule, Cascade) else self._gated(stem, rule)

    def _cascaded(self, stem: Tensor, cascade: Cascade) -> Routed:
        """Look after look, over the images that are not answered yet."""
        index = self.policy.tree.index
        if absent := [str(look) for look in cascade.looks if look not in index]:
            raise InvalidPathError(f"look {absent[0]}: not a path of the router's tree")
        state = _Answers(len(stem), index)
        costs = relative(look_costs(self._look_table(cascade), cascade.looks), self.table, self.policy.tree)
        taken, rows, known = np.zeros(len(stem), np.intp), np.arange(len(stem)), {ROOT: stem}
        before: NDArray[np.float32] | None = None  # what the last look said of the images that are left
        for k, look in enumerate(cascade.looks):
            tokens = self._tokens(look, known, cascade.looks[k + 1 :])
            logits = self._logits(look, tokens, cascade.answers, before)
            sure = np.ones(len(rows), bool)
            if k < len(cascade.thresholds):
                seen = answer_table(look, Answer(logits, np.zeros((len(logits), 1), np.float32)))
                sure = confidence_of(seen, [0], cascade.measure)[:, 0] >= cascade.thresholds[k]
            state.take(look, rows[sure], logits[sure])
            taken[rows[sure]] = k
            if sure.all():
                break
            left = torch.from_numpy(np.flatnonzero(~sure)).to(stem.device)
            rows, known = rows[~sure], {path: kept[left] for path, kept in known.items()}
            before = logits[~sure]
        journeys = {index[look]: cascade.journey(k) for k, look in enumerate(cascade.looks)}
        return Routed(state.probabilities.argmax(1), state.probabilities, state.path, costs[taken], journeys)

    def _look_table(self, cascade: Cascade) -> CostTable:
        if cascade.answers == OWN:
            return self.table
        if self.revisions is None:
            raise InvalidPathError(f"{cascade}: the router has no revisions of answers")
        return self.revisions.dearer(cascade.answers, self.table)

    def _logits(
        self, look: Path, tokens: Tensor, answers: AnswerKind, before: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        if answers == OWN or self.revisions is None:
            logits: NDArray[np.float32] = self.network.logits(look.exit, tokens).float().cpu().numpy()
            return logits
        # of what a table would hold, to which revisions were fitted
        if answers == SUMMED:  # which no embedding counts in
            logits = self.network.logits(look.exit, tokens).float().cpu().numpy()
            answer = Answer(logits, np.zeros((len(logits), 1), np.float32))
        else:
            answer = self.network.answer(look.exit, tokens)
        table = answer_table(look, answer)
        return self.revisions.logits(answers, look, table, before)

    def _tokens(self, look: Path, known: dict[Path, Tensor], later: Sequence[Path]) -> Tensor:
        """Tokens behind `look`, from the longest known beginning on; `known` is left with what `later` looks share."""
        start = max((path for path in known if look.extends(path)), key=lambda path: path.exit)
        tokens = known[start]
        for path in [path for path in look.prefixes() if path.exit > start.exit]:
            tokens = self.network.run(path.exit - 1, path.bits[-1], tokens)
            if any(other.extends(path) for other in later):
                known[path] = tokens
        for path in [path for path in known if not any(other.extends(path) for other in later)]:
            del known[path]
        return tokens

    def _gated(self, stem: Tensor, rule: GateRule) -> Routed:
        price = float(check_prices(rule.price)[0])
        state = _Answers(len(stem), self.policy.tree.index)
        root = np.repeat(self.policy.predictors[ROOT].predict(np.zeros((1, 0))), len(stem), axis=0)
        pending = self._continued(ROOT, stem, np.arange(len(stem)), root, price)
        while pending:
            path, tokens, rows = pending.pop()
            answer = self.network.answer(path.exit, tokens)
            if path not in self._tables:
                state.take(path, rows, answer.logits)
                continue
            predicted = self.policy.predictors[path].predict(self._features(path, answer))
            actions = next_actions(self._tables[path], predicted, [price])[0]
            stay = actions == EXIT_NOW
            state.take(path, rows[stay], answer.logits[stay])
            pending += self._split(path, tokens, rows, actions)
        chosen = state.path
        return Routed(
            state.probabilities.argmax(1), state.probabilities, chosen, self.costs[chosen], self._gated_journeys
        )

    def _continued(
        self, gate: Path, tokens: Tensor, rows: NDArray[np.intp], predicted: NDArray[np.float64], price: float
    ) -> list[tuple[Path, Tensor, NDArray[np.intp]]]:
        return self._split(gate, tokens, rows, next_actions(self._tables[gate], predicted, [price])[0])

    def _split(
        self, gate: Path, tokens: Tensor, rows: NDArray[np.intp], actions: NDArray[np.int16]
    ) -> list[tuple[Path, Tensor, NDArray[np.intp]]]:
        """Run the survivors' next segments, one group for each bit-width that some image asked for."""
        groups = []
        for bits in np.unique(actions[actions != EXIT_NOW]).tolist():
            picked = np.flatnonzero(actions == bits)
            kept = tokens if len(picked) == len(rows) else tokens[torch.from_numpy(picked).to(tokens.device)]
            groups.append((gate.child(bits), self.network.run(gate.exit, bits, kept), rows[picked]))
        return groups

    def _features(self, gate: Path, answer: Answer) -> NDArray[np.float32]:
        return answer_table(gate, answer).gate_features(gate, self.policy.kinds[gate])


def answer_table(path: Path, answer: Answer) -> Outcomes:
    """An answer at the end of `path` as a table, so that features are rounded as those that predictors were fitted to.

    Labels, which nobody knows, are 0.
    """
    n = len(answer.logits)
    table = feature_table(np.arange(n), np.zeros(n, np.int16), answer.logits, answer.embedding)
    return Outcomes.from_tables([(path, table)])


class _Answers:
    """Answers of a batch as they come in, exit by exit."""

    def __init__(self, images: int, index: Mapping[Path, int]) -> None:
        self.path = np.full(images, -1, np.int16)
        self._index = index
        self._probabilities: NDArray[np.float32] | None = None

    def take(self, path: Path, rows: NDArray[np.intp], logits: NDArray[np.float32]) -> None:
        if self._probabilities is None:
            self._probabilities = np.zeros((len(self.path), logits.shape[1]), np.float32)
        self.path[rows] = self._index[path]
        self._probabilities[rows] = softmax(logits)

    @property
    def probabilities(self) -> NDArray[np.float32]:
        assert self._probabilities is not None  # every image exits somewhere
        return self._probabilities
