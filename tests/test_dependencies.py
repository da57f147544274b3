"""What the packages import is declared, not left to what some other dependency happens to bring along."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = ("quee_core", "tasks", "flows", "infra")


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imported(package: str) -> Iterator[str]:
    """Top-level names of every import in a package, also of those inside functions."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                yield from (name.name.partition(".")[0] for name in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", OWN)
def test_every_library_that_is_imported_is_declared(package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {normalised(re.split(r"[^\w.-]", wanted)[0]) for wanted in project["dependencies"]}
    foreign = set(imported(package)) - {*OWN, *sys.stdlib_module_names}
    assert foreign
    installed = packages_distributions()
    providers = {name: {normalised(found) for found in installed[name]} for name in foreign}
    assert {name: found for name, found in providers.items() if not found & declared} == {}


def test_every_dependency_is_pinned_by_the_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = re.findall(r"^(\S+)==\S+\n((?:    #.*\n)+)", (ROOT / "requirements.lock").read_text("utf-8"), re.MULTILINE)
    direct = {name for name, via in pins if "quee (pyproject.toml)" in via}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert direct == {normalised(re.split(r"[^\w.-]", each)[0]) for each in wanted}
