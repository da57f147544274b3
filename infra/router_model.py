"""The router as an MLflow model that is code: the server imports this file out of the model's folder, with quee_core.

One row an image: column `image`, an encoded image (PNG, JPEG, …) as base64 text, or as bytes where the model is called
in Python. Parameters: `price`, λ, or `budget`, a mean relative cost not to exceed; below 0 or NaN it is not set.
"""

import base64
import binascii
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from quee_core.data.decoding import decode
from quee_core.deployment import DeployedRouter, load_router
from quee_core.devices import choose_device
from quee_core.errors import ConfigError, DataError
from quee_core.shipping import Rule

BATCH = 64


class RouterModel(PythonModel):
    """Answers images by the rule of a price or a budget."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the router that lies in the model's folder."""
        self._deployed: DeployedRouter = load_router(context.artifacts["router"], choose_device("auto"))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Class name, its index, all probabilities, the path taken and its relative cost, a row an image.

        Raises MlflowException (INVALID_PARAMETER_VALUE, over HTTP status 400) that names the row of an image that
        cannot be read, or says what is wrong with the parameters.
        """
        del context
        deployed = self._deployed
        try:
            rule = _rule(deployed, **(params or {}))
            images = [decode(_bytes(each, row), f"row {row}") for row, each in enumerate(model_input["image"])]
        except (ConfigError, DataError) as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        names = deployed.manifest.class_names
        rows = []
        for start in range(0, len(images), BATCH):
            batch = torch.stack([deployed.preprocess(image) for image in images[start : start + BATCH]])
            routed = deployed.router(batch, rule)
            rows += [
                {
                    "label": names[label], "index": label, "probabilities": probabilities,
                    "path": routed.journeys[path], "cost": cost,
                }
                for label, probabilities, path, cost in zip(
                    routed.label.tolist(), routed.probabilities.astype(float).tolist(), routed.path.tolist(),
                    routed.cost.tolist(), strict=True,
                )
            ]  # fmt: skip
        return pd.DataFrame(rows, columns=["label", "index", "probabilities", "path", "cost"])


def _rule(deployed: DeployedRouter, price: float = 0.0, budget: float = -1.0) -> Rule:
    if not budget >= 0:  # NaN too
        return deployed.point_at(price).as_rule()
    if price != 0:
        raise ConfigError(f"price {price:g} and budget {budget:g}: give one of the two")
    return deployed.point_within(budget).as_rule()


def _bytes(image: object, row: int) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str):
        try:
            return base64.b64decode("".join(image.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"row {row}: not base64 ({error}); encode the image file's bytes") from None
    raise DataError(f"row {row}: a {type(image).__name__} is no image; give base64 text, or bytes")


set_model(RouterModel())
