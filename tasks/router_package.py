"""The router as an MLflow model folder: code and safetensors, no pickle, and nothing of quee to install for serving."""

import base64
import importlib.metadata
import io
import shutil
from importlib.util import find_spec
from pathlib import Path as FilePath

import mlflow.pyfunc
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array
from PIL import Image

from quee_core.deployment import read_manifest

MODEL_CODE = "infra.router_model"
FRONT = "front.safetensors"
FRONT_ARTIFACT = f"artifacts/{FRONT}"
# what serving imports; a test compares it with what is loaded then
SERVING = (
    "mlflow", "torch", "torchvision", "timm", "huggingface-hub", "safetensors", "numpy", "pandas", "scipy",
    "scikit-learn", "threadpoolctl", "pyarrow", "pydantic", "pyyaml", "pillow",
)  # fmt: skip
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "image")]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "label"),
            ColSpec(DataType.long, "index"),
            ColSpec(Array(DataType.double), "probabilities"),
            ColSpec(DataType.string, "path"),
            ColSpec(DataType.double, "cost"),
        ]
    ),
    params=ParamSchema([ParamSpec("price", DataType.double, 0.0), ParamSpec("budget", DataType.double, -1.0)]),
)


def package_router(router: FilePath, front: FilePath, folder: FilePath, model: Model) -> FilePath:
    """Write the model into a new `folder` below which nothing is pickled; returns it.

    router: a router folder. front: its front on the test images, `ServedFront.to_bytes`. The quee_core that runs now
    goes along as code, without its assets, so that `mlflow models serve` needs the libraries alone.
    """
    spec = find_spec(MODEL_CODE)
    assert spec is not None  # they come with quee
    assert spec.origin is not None
    code = folder.with_name("code")
    _copy_core(code / "quee_core")
    mlflow.pyfunc.save_model(
        folder,
        mlflow_model=model,
        python_model=spec.origin,
        artifacts={"router": str(router), "front": str(front)},
        code_paths=[str(code / "quee_core")],
        signature=SIGNATURE,
        input_example={"image": [example_image(router)]},
        pip_requirements=serving_requirements(),
    )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)
    return folder


def serving_requirements() -> list[str]:
    """The libraries that serving imports, pinned to the versions that run now (without local parts such as +cpu)."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in SERVING]


def example_image(router: FilePath) -> str:
    """A grey ramp of the router's size as base64 text of a PNG: it shows the format, and has no class."""
    height, width = read_manifest(router).architecture.image_size
    ramp = np.linspace(0, 255, height * width).astype(np.uint8).reshape(height, width)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def _copy_core(to: FilePath) -> None:
    import quee_core

    source = FilePath(quee_core.__file__).parent
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("assets", "__pycache__"))
