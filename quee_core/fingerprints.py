"""Fingerprints: of values, of arrays, and of the code that computes from them."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quee_core.errors import ConfigError

LIBRARIES = (
    "torch", "torchvision", "timm", "numpy", "scikit-learn", "pyarrow", "prefect", "dask", "mlflow", "quee",
)  # fmt: skip


def canonical_json(value: Any) -> str:
    """`value` as the one JSON text of it: sorted keys, no spaces. Raises ValueError for NaN, TypeError for objects."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """sha256, in hex, of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def array_fingerprint(arrays: dict[str, NDArray[Any]]) -> str:
    """sha256, in hex, of names, dtypes, shapes and contents; the order of the mapping does not matter."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(canonical_json([name, array.dtype.str, list(array.shape)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def code_version(modules: Sequence[str]) -> str:
    """sha256, in hex, of the syntax trees of `modules`, docstrings and comments left out (design, section 5).

    A reworded comment keeps the version, a changed statement changes it. Raises ConfigError for a module without source.
    """
    return fingerprint([[name, _tree_of(name)] for name in modules])


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that figures depend on; those that are not installed are left out."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=256)
def _tree_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(f"module {module}: no source to take a code version from")
    return syntax_digest(Path(spec.origin).read_text("utf-8"))


def syntax_digest(source: str) -> str:
    """sha256, in hex, of the syntax tree of Python `source` without docstrings, comments and positions."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree, include_attributes=False).encode()).hexdigest()
