"""The fitted exits of a backbone: a quantised head and an embedding for each (design, sections 4 and 5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor, nn

from quee_core.archive import pack, unpack
from quee_core.config import HeadsConfig
from quee_core.errors import ConfigError
from quee_core.features import HeadViews
from quee_core.fingerprints import array_fingerprint
from quee_core.heads import ExitHead, train_head
from quee_core.network import PathNetwork
from quee_core.paths import EMBEDDING_BITS, FULL_PRECISION
from quee_core.quantize.calibration import QuantizedBackbone, linear_from_arrays, linear_to_arrays, quantize_linear
from quee_core.quantize.layers import QuantLinear

KIND = "exits"
FITTED_ROWS = 40_000  # that a PCA is fitted to
HEAD_CALIBRATION_ROWS = 4096
HEAD_LAYERS = ("linear", "inner", "outer")
_HEAD_WEIGHTS = tuple(f"head/{name}_weight" for name in HEAD_LAYERS)


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
        projections = [linear_from_arrays(_fields_of("embedding", arrays)) for arrays in self.exits]
        return PathNetwork(quantized, heads, projections)

    def head_macs(self) -> list[int | None]:
        """Multiply-accumulates of each exit's head; None where it is the backbone's own."""
        return [
            None if self._is_own(k) else sum(int(a.size) for name, a in arrays.items() if name in _HEAD_WEIGHTS)
            for k, arrays in enumerate(self.exits)
        ]

    @property
    def projection_macs(self) -> int:
        """Multiply-accumulates of one embedding; the dearest exit stands for all."""
        return max(int(arrays["embedding/weight"].size) for arrays in self.exits)

    def to_bytes(self) -> bytes:
        """All exits as one archive, without pickle."""
        arrays = {f"{k}/{name}": a for k, exit_ in enumerate(self.exits) for name, a in exit_.items()}
        return pack(arrays, {"exits": len(self.exits), "own_last_head": self.own_last_head}, kind=KIND)

    @classmethod
    def from_bytes(cls, data: bytes) -> "FittedExits":
        """Read back what `to_bytes` wrote. Raises DamagedTableError for anything else."""
        arrays, settings = unpack(data, kind=KIND)
        exits = [_fields_of(str(k), arrays) for k in range(settings["exits"])]
        return cls(tuple(exits), settings["own_last_head"])

    def _is_own(self, index: int) -> bool:
        return self.own_last_head and index == len(self.exits) - 1


def fit_exits(
    views: HeadViews,
    *,
    classes: int,
    own_last_head: bool,
    heads: HeadsConfig,
    dimensions: int,
    embed_dim: int,
    edge: int,
    method: str,
) -> FittedExits:
    """Fit every exit on the `fit` split.

    views: as `features.head_views` gives. dimensions: PCA components kept, of the first two statistics of
    `embed_dim` features. edge: bit-width of the heads. Each exit is seeded by itself: it does not depend on the others.
    Raises ConfigError for more PCA dimensions than features or images.
    """
    fitted = []
    width = heads.statistics * embed_dim
    plain = int((views.shown == 0).sum())  # the images as they are, which come first
    for index, pooled in enumerate(views.pooled):
        rows = _spread_rows(pooled[:plain], FITTED_ROWS, 2 * embed_dim)
        arrays = _fit_projection(rows, dimensions, heads.seed, method)
        if not (own_last_head and index == len(views.pooled) - 1):
            rows = _spread_rows(pooled[:plain], HEAD_CALIBRATION_ROWS, width)
            arrays |= _head_to_arrays(train_head(views, index, classes, heads, width), rows, edge, method)
        fitted.append(arrays)
    return FittedExits(tuple(fitted), own_last_head)


def _spread_rows(pooled: Tensor, count: int, width: int) -> Tensor:
    """About `count` rows of views [views, n, f], every so many, or all; their first features, float32 [rows, width]."""
    views, images, _ = pooled.shape
    step = max(1, views * images // count)
    # a step that the images are a multiple of would take the same ones of every view
    step += step > 1 and images % step == 0
    picked = torch.arange(0, views * images, step)
    return pooled[picked // images, picked % images, :width]


def _fit_projection(rows: Tensor, dimensions: int, seed: int, method: str) -> dict[str, NDArray[Any]]:
    """PCA of rows float32 [n, f] as a layer on integers, which takes the mean off by its bias."""
    if dimensions > min(rows.shape):
        raise ConfigError(
            f"embedding.dimensions: {dimensions} is more than the {rows.shape[1]} pooled features "
            f"or the {rows.shape[0]} rows of the fit split; lower it"
        )
    pca = PCA(dimensions, svd_solver="covariance_eigh", random_state=seed).fit(rows.double().numpy())
    layer = nn.Linear(rows.shape[1], dimensions)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(pca.components_))
        layer.bias.copy_(torch.from_numpy(-pca.components_ @ pca.mean_))
    made = quantize_linear(layer, rows, EMBEDDING_BITS, method)
    assert isinstance(made, QuantLinear)  # below full precision
    return {f"embedding/{field}": array for field, array in linear_to_arrays(made).items()}


def _head_to_arrays(head: ExitHead, rows: Tensor, edge: int, method: str) -> dict[str, NDArray[Any]]:
    """Weights of the head's norm and layers, each layer in float, and quantised on what `rows` make its inputs."""
    arrays = {"head/norm_weight": head.norm.weight.numpy(), "head/norm_bias": head.norm.bias.numpy()}
    normed = head.normed(rows)
    inputs = {"linear": normed}
    if head.inner is not None:
        inputs |= {"inner": normed, "outer": head.hidden(normed)}
    for name, seen in inputs.items():
        layer = head.get_submodule(name)
        assert isinstance(layer, nn.Linear)  # until it is quantised
        arrays |= {f"head/{name}_weight": layer.weight.numpy(), f"head/{name}_bias": layer.bias.numpy()}
        if edge != FULL_PRECISION:
            made = quantize_linear(layer, seen, edge, method)
            assert isinstance(made, QuantLinear)  # below full precision
            arrays |= {f"{name}/{field}": array for field, array in linear_to_arrays(made).items()}
    return arrays


def _fields_of(name: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {field.partition("/")[2]: a for field, a in arrays.items() if field.partition("/")[0] == name}


def _head_from_arrays(arrays: Mapping[str, NDArray[Any]]) -> nn.Module:
    classes, width = arrays["head/linear_weight"].shape
    head = ExitHead(width, classes, len(arrays["head/inner_bias"]) if "head/inner_bias" in arrays else 0)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[f"head/{name.replace('.', '_')}"]))
    for name in HEAD_LAYERS:
        if quantized := _fields_of(name, arrays):
            setattr(head, name, linear_from_arrays(quantized))
    return head
