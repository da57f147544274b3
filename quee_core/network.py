"""The network that a path runs through: quantised segments, exit heads and embeddings, one step at a time.

The walk (features.py) and the router (router.py) both run on it, so that what a table says of a path is what
the deployed network does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quee_core.quantize.calibration import QuantizedBackbone
from quee_core.quantize.layers import QuantLinear


@dataclass(frozen=True)
class Answer:
    """What an exit says of n images: logits float32 [n, classes], embedding float32 [n, k]."""

    logits: NDArray[np.float32]
    embedding: NDArray[np.float32]


class PathNetwork(nn.Module):
    """Runs any path of a segmented, quantised backbone, segment by segment.

    quantized: the backbone with its quantised segments. heads: one module per exit, pooled tokens to
    logits; None for the last exit stands for the backbone's own head. projections: one per exit, the first pooled
    features to an embedding, on integers: the batch that an image comes in never shows.
    """

    def __init__(
        self, quantized: QuantizedBackbone, heads: Sequence[nn.Module | None], projections: Sequence[QuantLinear]
    ) -> None:
        super().__init__()
        self.quantized = quantized
        self.heads = nn.ModuleList([nn.Identity() if head is None else head for head in heads])
        self.own_head = tuple(head is None for head in heads)
        self.projections = nn.ModuleList(projections)
        self.eval().requires_grad_(False)

    @property
    def depth(self) -> int:
        """L, the number of exits."""
        return len(self.own_head)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.quantized.backbone.parameters()).device

    @torch.inference_mode()
    def stem(self, images: Tensor) -> Tensor:
        """Tokens float [n, t, d] of images float [n, c, h, w]."""
        tokens: Tensor = self.quantized.stem(images)
        return tokens

    @torch.inference_mode()
    def run(self, index: int, bits: int, tokens: Tensor) -> Tensor:
        """Tokens behind segment `index` (from 0) at `bits`; the given tokens are left as they were."""
        behind: Tensor = self.quantized.segments(index, bits)(tokens)
        return behind

    @torch.inference_mode()
    def answer(self, number: int, tokens: Tensor) -> Answer:
        """Logits and embedding at exit `number` (from 1)."""
        pooled = self.quantized.backbone.pooled(tokens)
        logits = self._logits(number, tokens, pooled)
        return Answer(logits.float().cpu().numpy(), self.embedding(number, pooled))

    def projection(self, number: int) -> QuantLinear:
        """What makes embeddings of pooled tokens at exit `number` (from 1)."""
        projection = self.projections[number - 1]
        assert isinstance(projection, QuantLinear)  # as they were given
        return projection

    @torch.inference_mode()
    def embedding(self, number: int, pooled: Tensor) -> NDArray[np.float32]:
        """Embedding float32 [n, k] of pooled tokens float [n, f] at exit `number` (from 1)."""
        projection = self.projection(number)
        embedding: NDArray[np.float32] = projection(pooled[:, : projection.in_features].float()).cpu().numpy()
        return embedding

    @torch.inference_mode()
    def logits(self, number: int, tokens: Tensor) -> Tensor:
        """Logits alone, float [n, classes]: what the head of exit `number` costs is the time of this."""
        return self._logits(number, tokens, self.quantized.backbone.pooled(tokens))

    def _logits(self, number: int, tokens: Tensor, pooled: Tensor) -> Tensor:
        own = self.quantized.final if self.own_head[number - 1] else None
        logits: Tensor = self.heads[number - 1](pooled) if own is None else own(tokens)
        return logits
