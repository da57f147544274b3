"""Fingerprints: of values, of arrays, and of the code that computes from them (design, section 5)."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quee_core.errors import ConfigError

LIBRARIES = (
    "torch", "torchvision", "timm", "numpy", "scikit-learn", "scipy", "pyarrow", "pillow", "matplotlib",
    "prefect", "dask", "mlflow", "quee",
)  # fmt: skip
COMPUTING = ("torch", "torchvision", "timm", "pillow")


def canonical_json(value: Any) -> str:
    """The one JSON text of a plain value: sorted keys, no spaces, ASCII; a tuple reads as a list.

    Raises ValueError for NaN and infinities, TypeError for objects that JSON lacks and for keys that are no text:
    JSON would write 8 and "8" alike, and two values would share a fingerprint. 1 and 1.0 stay distinct.
    """
    _refuse_other_keys(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """sha256, in hex, of the canonical JSON of `value`. Raises as `canonical_json` does."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def array_fingerprint(arrays: Mapping[str, NDArray[Any]]) -> str:
    """sha256, in hex, of names, dtypes, shapes and contents; neither the mapping's nor the memory's order matters.

    Raises TypeError for arrays of Python objects or records, whose bytes are not their contents.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.hasobject or array.dtype.names is not None:
            raise TypeError(f"array {name!r}: no fingerprint of dtype {array.dtype}; want numbers, booleans or text")
        digest.update(canonical_json([name, array.dtype.str, list(array.shape)]).encode())
        digest.update(array.tobytes())  # in C order
    return digest.hexdigest()


def code_version(modules: Sequence[str | ModuleType]) -> str:
    """sha256, in hex, of the syntax trees of `modules`, docstrings and comments left out (design, section 5).

    A reworded comment keeps the version, a changed statement changes it. A package stands for itself and all modules
    in it. Neither the order of `modules` nor repetition matters. A module's imports count only if they are named too.
    Raises ConfigError for a module without source.
    """
    trees: dict[str, str] = {}
    for module in modules:
        trees |= _trees_of(module if isinstance(module, str) else module.__name__)
    return fingerprint(trees)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that figures depend on; those that are not installed are left out."""
    return {"python": platform.python_version(), **_versions(LIBRARIES)}


def environment_versions() -> dict[str, str]:
    """Versions of the libraries that decode images and run networks: part of the key of all that comes out of one."""
    return _versions(COMPUTING)


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def syntax_digest(source: str) -> str:
    """sha256, in hex, of the syntax tree of Python `source` without docstrings, comments and positions.

    Raises SyntaxError if it is not Python.
    """
    tree = _WithoutText().visit(ast.parse(source))
    return hashlib.sha256(ast.dump(tree, include_attributes=False).encode()).hexdigest()


class _WithoutText(ast.NodeTransformer):
    """Drops statements that are nothing but a text: docstrings, of attributes too. They compute nothing."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node


@lru_cache(maxsize=256)
def _trees_of(module: str) -> dict[str, str]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(f"module {module}: no Python source to take a code version from; install quee from source")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = {module: Path(spec.origin)} | {
        f"{module}/{file.relative_to(folder).as_posix()}": file for folder in folders for file in folder.rglob("*.py")
    }
    return {name: syntax_digest(file.read_text("utf-8")) for name, file in files.items()}


def _refuse_other_keys(value: Any) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"key {key!r}: no canonical JSON of a mapping whose keys are not text")
            _refuse_other_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_other_keys(inner)
