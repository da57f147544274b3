"""What the gates themselves cost: BitOps at full precision, or time measured on this device."""

import statistics
import time

import numpy as np

from quee_core.paths import FULL_PRECISION, ROOT, Path
from quee_core.policy import GatePolicy
from quee_core.tables import Outcomes


def gate_bitops(policy: GatePolicy, *, projection_macs: int) -> tuple[float, ...]:
    """BitOps of one decision at each exit, root first; gates run at full precision, and are not free."""
    macs = policy.macs(policy.tree.depth, projection_macs=projection_macs)
    return tuple(float(m) * FULL_PRECISION**2 for m in macs)


def gate_milliseconds(policy: GatePolicy, outcomes: Outcomes, *, batch: int, repeats: int) -> tuple[float, ...]:
    """Measured milliseconds per image of one decision at each exit, root first, at `batch` images at a time.

    The dearest gate of an exit stands for all of it; the median of `repeats` runs counts. The root decides once for
    all images, and costs nothing.
    """
    rows = np.arange(min(batch, outcomes.images))
    few = outcomes.take(rows)
    dearest = [0.0] * policy.tree.depth
    for gate in policy.tree.gates:
        if gate != ROOT:
            dearest[gate.exit] = max(dearest[gate.exit], _timed(policy, gate, few, repeats) * 1e3 / len(rows))
    return tuple(dearest)


def _timed(policy: GatePolicy, gate: Path, outcomes: Outcomes, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        policy.predict(gate, outcomes)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
