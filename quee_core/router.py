"""The deployable network: it takes the gates' decisions itself, and computes only what they ask for (design, 9)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quee_core.errors import ShapeMismatchError
from quee_core.gates import EXIT_NOW, GateTable, gate_tables, next_actions
from quee_core.network import Answer, PathNetwork
from quee_core.paths import ROOT, Path
from quee_core.policy import GatePolicy
from quee_core.tables import Outcomes, feature_table, softmax


@dataclass(frozen=True, eq=False)
class Routed:
    """What the router answers for n images.

    label: int64 [n], position among the classes. probabilities: float32 [n, classes], of the exit that answered.
    path: int16 [n], position in the tree's paths. cost: float64 [n], relative to the full path at the highest
    bit-width, heads and gates on the way included.
    """

    label: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    path: NDArray[np.int16]
    cost: NDArray[np.float64]


class Router(nn.Module):
    """Sends every image of a batch along its own path, regrouping the survivors at each gate.

    network: runs segments and heads. policy: predicts errors at every gate. costs: relative cost of every path of
    `policy.tree`, float64 [paths], gates and heads on the way included. Decisions are those of `gates.replay` on
    the tables, image by image, whatever the batch.
    """

    def __init__(self, network: PathNetwork, policy: GatePolicy, costs: NDArray[np.float64]) -> None:
        super().__init__()
        self.network = network
        self.policy = policy
        self.costs = costs
        self._tables: Mapping[Path, GateTable] = gate_tables(policy.tree, costs)

    def forward(self, images: Tensor, price: float) -> Routed:
        """Route preprocessed images float [n, c, h, w] at the price λ (errors that one full path is worth).

        Raises ConfigError for a price that is negative or not finite, ShapeMismatchError for no images.
        """
        if images.ndim != 4 or len(images) == 0:
            raise ShapeMismatchError(f"images: shape {tuple(images.shape)}; want [n, channels, height, width], n >= 1")
        state = _Answers(len(images), self.policy.tree.index)
        stem = self.network.stem(images.to(self.network.device))
        root = np.repeat(self.policy.predictors[ROOT].predict(np.zeros((1, 0))), len(images), axis=0)
        pending = self._continued(ROOT, stem, np.arange(len(images)), root, price)
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
        return Routed(state.probabilities.argmax(1), state.probabilities, chosen, self.costs[chosen])

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
        # through a table, so that the features are rounded as those that the predictors were fitted to
        n = len(answer.logits)
        table = feature_table(np.arange(n), np.zeros(n, np.int16), answer.logits, answer.embedding)
        return Outcomes.from_tables([(gate, table)]).gate_features(gate, self.policy.kinds[gate])


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
