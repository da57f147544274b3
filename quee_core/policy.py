"""A fitted predictor at every gate of a tree: what decides, in replay and in the router (design, sections 8 and 9)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quee_core.archive import pack, unpack
from quee_core.errors import ShapeMismatchError
from quee_core.paths import Path, PathTree
from quee_core.predictors import PREDICTORS, Predictor
from quee_core.tables import FeatureKind, Outcomes

KIND = "gate-policy"


@dataclass(frozen=True, eq=False)
class GatePolicy:
    """Predictors p̂_e for every gate of `tree`.

    kinds: which columns of the tables each gate's features are made of, in this order.
    predictors: by gate; the root's is `constant`, for the root has no features.
    Raises ShapeMismatchError if a gate of the tree has no predictor.
    """

    tree: PathTree
    kinds: Mapping[Path, tuple[FeatureKind, ...]]
    predictors: Mapping[Path, Predictor]

    def __post_init__(self) -> None:
        if absent := [str(gate) for gate in self.tree.gates if gate not in self.predictors]:
            raise ShapeMismatchError(f"no predictor for gate {absent[0]} ({len(absent)} gates without)")

    def predict(self, gate: Path, outcomes: Outcomes) -> NDArray[np.float64]:
        """p̂_e of the gate's extensions for all images, float64 [n, E]."""
        return self.predictors[gate].predict(outcomes.gate_features(gate, self.kinds[gate]))

    def predictions(self, outcomes: Outcomes) -> dict[Path, NDArray[np.float64]]:
        """p̂_e at every gate, as `gates.replay` takes them; images that would never reach a gate included."""
        return {gate: self.predict(gate, outcomes) for gate in self.tree.gates}

    def macs(self, depth: int, *, projection_macs: int) -> tuple[int, ...]:
        """Multiply-accumulates of one decision at exits 0 (the root) to `depth` - 1, of whatever precision.

        The dearest gate of an exit stands for all of it; `projection_macs` are added where a gate uses the
        embedding.
        """
        dearest = [0] * depth
        for gate, predictor in self.predictors.items():
            embedding = projection_macs if "embedding" in self.kinds[gate] else 0
            dearest[gate.exit] = max(dearest[gate.exit], predictor.macs + embedding)
        return tuple(dearest)


def policy_to_bytes(policy: GatePolicy) -> bytes:
    """The policy as one archive, no pickle: the predictors' arrays by gate, the tree and kinds as settings."""
    tree = policy.tree
    settings = {
        "bits": list(tree.bits),
        "depth": tree.depth,
        "paths": [str(path) for path in tree.paths],
        "gates": {
            str(gate): {"predictor": predictor.name, "kinds": list(policy.kinds[gate])}
            for gate, predictor in policy.predictors.items()
        },
    }
    arrays = {
        f"{gate}/{field}": array
        for gate, predictor in policy.predictors.items()
        for field, array in predictor.to_arrays().items()
    }
    return pack(arrays, settings, kind=KIND)


def policy_from_bytes(data: bytes) -> GatePolicy:
    """Read back what `policy_to_bytes` wrote. Raises DamagedTableError if it is something else."""
    arrays, settings = unpack(data, kind=KIND)
    tree = PathTree(tuple(settings["bits"]), settings["depth"], tuple(map(Path.parse, settings["paths"])))
    predictors, kinds = {}, {}
    for text, made in settings["gates"].items():
        fields = {name.partition("/")[2]: a for name, a in arrays.items() if name.partition("/")[0] == text}
        predictors[Path.parse(text)] = PREDICTORS[made["predictor"]].from_arrays(fields)
        kinds[Path.parse(text)] = tuple(made["kinds"])
    return GatePolicy(tree, kinds, predictors)
