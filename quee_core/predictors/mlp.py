"""A small network for all paths of a gate: the default predictor (design, section 8)."""

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from quee_core.fixed_point import CLIP, ExactLinear, sigmoid, to_grid
from quee_core.predictors.base import Options, Predictor, prior_logits


class MLPOptions(Options):
    """Hyper-parameters of the network and its training."""

    hidden: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field((64,), description="Widths of hidden layers.")
    loss: Literal["bce", "squared"] = Field("bce", description="Cross-entropy, or squared error, against the targets.")
    epochs: int = Field(60, ge=1, description="At most this many passes; the learning rate falls to 0 over them.")
    patience: int = Field(12, ge=1, description="Passes without a better Brier score on `select` before stopping.")
    batch: int = Field(512, ge=1, description="Rows a step.")
    learning_rate: float = Field(5e-3, gt=0, description="Adam's, at the start.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled from the gradient (AdamW).")


class MLPPredictor(Predictor):
    """ReLU layers and sigmoid outputs, trained by AdamW; of all epochs the one with the best Brier score is kept.

    The first of these is the untrained network, which predicts the overall rates.
    """

    name: ClassVar[str] = "mlp"
    options_model: ClassVar[type[Options]] = MLPOptions

    options: MLPOptions
    layers: tuple[ExactLinear, ...]

    @property
    def macs(self) -> int:
        """Scaling, and a matrix product a layer."""
        return self.features + sum(layer.weight.size for layer in self.layers)

    def _fit(
        self,
        rows: NDArray[np.float64],
        targets: NDArray[np.float64],
        validation: tuple[NDArray[np.float64], NDArray[np.float64]],
        seed: int,
        /,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode(False), torch.enable_grad():
            parameters = initial_parameters((self.features, *self.options.hidden), prior_logits(targets), generator)
            best = train(
                parameters,
                (_float32(rows), _float32(targets)),
                (_float32(validation[0]), _float32(validation[1])),
                self.options,
                generator,
            )
        self._install([p.numpy() for p in best])

    def _install(self, parameters: list[NDArray[np.floating]]) -> None:
        layers: list[ExactLinear] = []
        bound = CLIP
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            layers.append(ExactLinear.of(weight, bias, bound))
            bound = float(layers[-1].limit.max(initial=0.0))
        self.layers = tuple(layers)

    def _predict(self, rows: NDArray[np.float64], /) -> NDArray[np.float64]:
        for layer in self.layers[:-1]:
            rows = to_grid(np.maximum(layer(rows), 0.0))
        return sigmoid(self.layers[-1](rows))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        named = {f"weight.{k}": layer.weight for k, layer in enumerate(self.layers)}
        return named | {f"bias.{k}": layer.bias for k, layer in enumerate(self.layers)}

    def _restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        count = len(self.options.hidden) + 1
        self._install([arrays[f"{kind}.{k}"] for k in range(count) for kind in ("weight", "bias")])


def initial_parameters(
    widths: tuple[int, ...], offset: NDArray[np.float64], generator: torch.Generator
) -> list[Tensor]:
    """Weights [in, out] and biases [out] of each layer, float32, in turn.

    widths: inputs, then hidden widths. offset: float64 [P], biases of the outputs, whose weights start at 0: the
    network begins as the overall rates. Hidden weights are He-normal.
    """
    parameters: list[Tensor] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        deviation = (2.0 / max(fan_in, 1)) ** 0.5
        parameters += [torch.randn(fan_in, fan_out, generator=generator) * deviation, torch.zeros(fan_out)]
    return [*parameters, torch.zeros(widths[-1], len(offset)), _float32(offset)]


def train(
    parameters: list[Tensor],
    data: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    options: MLPOptions,
    generator: torch.Generator,
) -> list[Tensor]:
    """The parameters, of all those after each epoch and before the first, with the least Brier score on `validation`.

    parameters: as `initial_parameters` makes them; left as the last epoch leaves them.
    data: rows float32 [n, f] and targets [n, P]. validation: rows [m, f] and errors [m, P]; only looked at.
    """
    rows, targets = data
    for parameter in parameters:
        parameter.requires_grad_(True)
    groups = [
        {"params": parameters[::2], "weight_decay": options.weight_decay},
        {"params": parameters[1::2], "weight_decay": 0.0},  # biases hold the overall rates
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    best, best_score, best_epoch = _copy(parameters), _brier(parameters, validation), 0
    for epoch in range(1, options.epochs + 1):
        order = torch.randperm(len(rows), generator=generator)
        for batch in torch.split(order, options.batch):
            optimizer.zero_grad()
            torch.autograd.backward(_loss(forward(parameters, rows[batch]), targets[batch], options.loss))
            optimizer.step()
        schedule.step()
        score = _brier(parameters, validation)
        if score < best_score:
            best, best_score, best_epoch = _copy(parameters), score, epoch
        elif epoch - best_epoch >= options.patience:
            break
    return best


def forward(parameters: list[Tensor], rows: Tensor) -> Tensor:
    """Logits [n, P] of rows [n, f]."""
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        rows = torch.relu(torch.addmm(bias, rows, weight))
    return torch.addmm(parameters[-1], rows, parameters[-2])


def _loss(logits: Tensor, targets: Tensor, kind: str) -> Tensor:
    if kind == "bce":
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    return torch.nn.functional.mse_loss(torch.sigmoid(logits), targets)


def _brier(parameters: list[Tensor], validation: tuple[Tensor, Tensor]) -> float:
    rows, errors = validation
    with torch.no_grad():
        return float((torch.sigmoid(forward(parameters, rows)) - errors).square().mean(dtype=torch.float64))


def _copy(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _float32(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
