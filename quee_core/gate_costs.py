"""What the gates themselves cost: BitOps, or time measured on this device."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from quee_core.network import PathNetwork
from quee_core.paths import EMBEDDING_BITS, FULL_PRECISION, ROOT, Path
from quee_core.policy import GatePolicy
from quee_core.tables import Outcomes, feature_table


def gate_bitops(policy: GatePolicy, *, projection_macs: int) -> tuple[float, ...]:
    """BitOps of one decision at each exit, root first: gates are not free.

    Predictors run at full precision, an embedding of `projection_macs` in `EMBEDDING_BITS`; it counts where a gate uses
    it. The dearest gate of an exit stands for all of it.
    """
    dearest = [0.0] * policy.tree.depth
    for gate, predictor in policy.predictors.items():
        embedding = projection_macs * EMBEDDING_BITS**2 if "embedding" in policy.kinds[gate] else 0
        dearest[gate.exit] = max(dearest[gate.exit], float(predictor.macs * FULL_PRECISION**2 + embedding))
    return tuple(dearest)


def gate_milliseconds(
    policy: GatePolicy, network: PathNetwork, outcomes: Outcomes, *, batch: int, repeats: int
) -> tuple[float, ...]:
    """Measured milliseconds per image of one decision at each exit, root first, at `batch` images at a time.

    A decision is what the router does there: project pooled tokens, if the gate uses the embedding; make features out
    of logits; predict. The dearest gate of an exit stands for all of it; the median of `repeats` runs counts. The
    root decides once for all images, and costs nothing.
    """
    rows = np.arange(min(batch, outcomes.images))
    few = outcomes.take(rows)
    dearest = [0.0] * policy.tree.depth
    for gate in policy.tree.gates:
        if gate == ROOT:
            continue
        run = _decision(policy, network, gate, few)
        dearest[gate.exit] = max(dearest[gate.exit], _timed(run, repeats) * 1e3 / len(rows))
    return tuple(dearest)


def _decision(policy: GatePolicy, network: PathNetwork, gate: Path, outcomes: Outcomes) -> Callable[[], object]:
    """One decision on stand-ins for logits and pooled tokens: what is in them costs no time."""
    rng = np.random.default_rng(0)
    n, classes = outcomes.images, max(2, outcomes.top_p.shape[-1], int(outcomes.labels.max()) + 1)
    logits = rng.standard_normal((n, classes), np.float32)
    embedding = np.zeros((n, outcomes.embedding.shape[-1]), np.float32)
    pooled = torch.zeros(n, network.projection(gate.exit).in_features, device=network.device)

    def decide() -> object:
        seen = network.embedding(gate.exit, pooled) if "embedding" in policy.kinds[gate] else embedding
        feature_table(outcomes.sample_ids, outcomes.labels, logits, seen)
        return policy.predict(gate, outcomes)

    return decide


def _timed(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
