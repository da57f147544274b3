"""The fitted exits of a backbone: a quantised head and an embedding for each (design, sections 4 and 5)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor, nn

from quee_core.archive import pack, unpack
from quee_core.config import HeadsConfig
from quee_core.errors import ConfigError
from quee_core.fingerprints import array_fingerprint
from quee_core.heads import ExitHead, train_head
from quee_core.network import PathNetwork, Projection
from quee_core.paths import FULL_PRECISION
from quee_core.quantize.calibration import QuantizedBackbone, linear_from_arrays, linear_to_arrays, quantize_linear
from quee_core.quantize.layers import QuantLinear

KIND = "exits"
HEAD_CALIBRATION_ROWS = 4096


@dataclass(frozen=True, eq=False)
class FittedExits:
    """Arrays of every exit, by name: a projection, and a head unless the backbone's own one serves.

    exits: one mapping per exit, 1 to L. own_last_head: whether the last exit answers by the backbone's own head.
    """

    exits: tuple[Mapping[str, NDArray[Any]], ...]
    own_last_head: bool

    def fingerprint_of(self, number: int) -> str:
        """sha256 over the head and embedding of exit `number` (from 1)."""
        return array_fingerprint(dict(self.exits[number - 1]))

    def network(self, quantized: QuantizedBackbone) -> PathNetwork:
        """The network that paths run through."""
        heads = [None if self._is_own(k) else _head_from_arrays(arrays) for k, arrays in enumerate(self.exits)]
        projections = [Projection(arrays["pca/mean"], arrays["pca/components"]) for arrays in self.exits]
        return PathNetwork(quantized, heads, projections)

    def head_macs(self) -> list[int | None]:
        """Multiply-accumulates of each exit's head; None where it is the backbone's own."""
        return [
            None if self._is_own(k) else int(arrays["head/float_weight"].size) for k, arrays in enumerate(self.exits)
        ]

    @property
    def projection_macs(self) -> int:
        """Multiply-accumulates of one embedding; the dearest exit stands for all."""
        return max(int(arrays["pca/components"].size) for arrays in self.exits)

    def to_bytes(self) -> bytes:
        """All exits as one archive, without pickle."""
        arrays = {f"{k}/{name}": a for k, exit_ in enumerate(self.exits) for name, a in exit_.items()}
        return pack(arrays, {"exits": len(self.exits), "own_last_head": self.own_last_head}, kind=KIND)

    @classmethod
    def from_bytes(cls, data: bytes) -> "FittedExits":
        """Read back what `to_bytes` wrote. Raises DamagedTableError for anything else."""
        arrays, settings = unpack(data, kind=KIND)
        exits = [
            {name.partition("/")[2]: a for name, a in arrays.items() if name.partition("/")[0] == str(k)}
            for k in range(settings["exits"])
        ]
        return cls(tuple(exits), settings["own_last_head"])

    def _is_own(self, index: int) -> bool:
        return self.own_last_head and index == len(self.exits) - 1


def fit_exits(
    pooled: Mapping[int, Sequence[Tensor]],
    labels: NDArray[np.int64],
    *,
    classes: int,
    own_last_head: bool,
    heads: HeadsConfig,
    dimensions: int,
    edge: int,
    method: str,
) -> FittedExits:
    """Fit every exit on the `fit` split.

    pooled: per precision, a float tensor [n, 2 d] for each exit, as `features.uniform_pooled_tokens` gives. labels:
    int64 [n]. edge: bit-width of the heads. Each exit is seeded by itself, so that it does not depend on the others.
    Raises ConfigError for more PCA dimensions than pooled features or images.
    """
    depth = len(next(iter(pooled.values())))
    widths = sorted(pooled)
    fitted = []
    for k in range(depth):
        features = [pooled[b][k] for b in widths]
        arrays = _fit_projection(torch.cat(features).numpy(), dimensions, heads.seed)
        if not (own_last_head and k == depth - 1):
            head = train_head(
                features,
                torch.from_numpy(labels),
                classes,
                epochs=heads.epochs,
                learning_rate=heads.learning_rate,
                weight_decay=heads.weight_decay,
                batch=heads.batch,
                seed=heads.seed,
            )
            arrays |= _head_to_arrays(head, torch.cat(features), edge, method)
        fitted.append(arrays)
    return FittedExits(tuple(fitted), own_last_head)


def _fit_projection(rows: NDArray[np.float32], dimensions: int, seed: int) -> dict[str, NDArray[Any]]:
    if dimensions > min(rows.shape):
        raise ConfigError(
            f"embedding.dimensions: {dimensions} is more than the {rows.shape[1]} pooled features "
            f"or the {rows.shape[0]} rows of the fit split; lower it"
        )
    pca = PCA(dimensions, svd_solver="covariance_eigh", random_state=seed).fit(rows.astype(np.float64))
    return {"pca/mean": pca.mean_, "pca/components": np.ascontiguousarray(pca.components_.T)}


def _head_to_arrays(head: ExitHead, rows: Tensor, edge: int, method: str) -> dict[str, NDArray[Any]]:
    arrays = {
        "head/norm_weight": head.norm.weight.numpy(),
        "head/norm_bias": head.norm.bias.numpy(),
        "head/float_weight": head.linear.weight.numpy(),
        "head/float_bias": head.linear.bias.numpy(),
    }
    if edge != FULL_PRECISION:
        step = max(1, len(rows) // HEAD_CALIBRATION_ROWS)
        layer = quantize_linear(head.linear, head.norm(rows[::step]), edge, method)
        assert isinstance(layer, QuantLinear)  # below full precision
        arrays |= {f"quantized/{name}": a for name, a in linear_to_arrays(layer).items()}
    return arrays


def _head_from_arrays(arrays: Mapping[str, NDArray[Any]]) -> nn.Module:
    classes, width = arrays["head/float_weight"].shape
    head = ExitHead(width, classes)
    with torch.no_grad():
        head.norm.weight.copy_(torch.from_numpy(arrays["head/norm_weight"]))
        head.norm.bias.copy_(torch.from_numpy(arrays["head/norm_bias"]))
        head.linear.weight.copy_(torch.from_numpy(arrays["head/float_weight"]))
        head.linear.bias.copy_(torch.from_numpy(arrays["head/float_bias"]))
    quantized = {name.partition("/")[2]: a for name, a in arrays.items() if name.startswith("quantized/")}
    if quantized:
        head.linear = linear_from_arrays(quantized)  # type: ignore[assignment]
    return head
