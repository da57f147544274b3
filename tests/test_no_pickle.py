"""No pickle out of a store, a run's folder, the registry or a checkpoint is ever loaded: it would run what it says."""

import ast
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quee_core.archive import unpack
from quee_core.champion import ServedFront
from quee_core.errors import DamagedTableError
from quee_core.exits import FittedExits
from quee_core.grid import fits_from_bytes
from quee_core.policy import policy_from_bytes
from quee_core.quantize.calibration import Calibration
from quee_core.tables import Outcomes
from tests.conftest import SmallSweep

ROOT = Path(__file__).parents[1]
PACKAGES = ("quee_core", "tasks", "flows", "infra")
LOADERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# for the name of what torch raises; and for CIFAR's own files, by an unpickler that knows plain types alone
KNOWN = {
    "quee_core/backbones/checkpoints.py", "quee_core/data/imagenet_archives.py", "quee_core/data/torchvision_sets.py",
}  # fmt: skip


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {name.name.partition(".")[0] for name in node.names}
    return {str(node.module).partition(".")[0]} if isinstance(node, ast.ImportFrom) and not node.level else set()


def test_what_can_unpickle_is_imported_where_it_is_known_to_be_safe_alone() -> None:
    found = {name for name, module in modules() for node in ast.walk(module) if imported(node) & LOADERS}
    assert found == KNOWN


def test_numpy_and_torch_are_asked_for_plain_data_alone() -> None:
    wanted = {("np", "load"): ("allow_pickle", False), ("torch", "load"): ("weights_only", True)}
    calls = 0
    for name, module in modules():
        for node in ast.walk(module):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=attribute)) if (
                    owner, attribute,
                ) in wanted:  # fmt: skip
                    calls += 1
                    keyword, value = wanted[owner, attribute]
                    given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                    assert given.get(keyword) is value, f"{name}:{node.lineno}"
    assert calls == 3


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._mark),)


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[Evil]:
    mark = tmp_path / "unpickled"
    yield Evil(mark)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))  # it would have told
    assert mark.exists()


READERS = (
    Calibration.from_bytes, FittedExits.from_bytes, policy_from_bytes, fits_from_bytes, ServedFront.from_bytes,
    lambda data: unpack(data, kind="anything"),
)  # fmt: skip


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__qualname__)
def test_a_pickle_in_the_place_of_something_stored_is_damage_and_not_run(evil: Evil, read: Any) -> None:
    with pytest.raises(DamagedTableError):
        read(pickle.dumps(evil))


def test_a_pickle_among_saved_outcomes_is_damage_and_not_run(
    evil: Evil, small_sweep: SmallSweep, tmp_path: Path
) -> None:
    folder = tmp_path / "outcomes"
    small_sweep.select.save(folder)
    np.save(folder / "errors.npy", np.array([evil], object), allow_pickle=True)
    with pytest.raises(DamagedTableError, match="not outcomes that quee saved"):
        Outcomes.load(folder)
