"""One small sweep's network and tables on bundled images, shared by the tests of a process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from quee_core.config import SweepConfig, parse_config
from quee_core.exits import FittedExits
from quee_core.network import PathNetwork
from quee_core.plan import WALKED, SweepPlan, resolve
from quee_core.quantize.calibration import Calibration
from quee_core.stages import branches_of, cells_of, extract_branch, network_of, outcomes_of
from quee_core.store import Store
from quee_core.tables import Outcomes
from tests.mlflow_server import mlflow_server  # noqa: F401 (a fixture)
from tests.s3_gate import s3_gate  # noqa: F401 (a fixture)
from tests.s3_server import s3_environment, s3_server  # noqa: F401 (fixtures)

settings.register_profile("quee", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("quee")


LONGEST = (
    "test_chaos", "test_retries", "test_store_s3", "test_bad_places", "test_deployed", "test_silent_runs",
    "test_whole_pipeline",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process is still at one of them when the others are done."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def small_config(folder: Path, **sections: dict | list) -> SweepConfig:
    """A sweep of seconds: 120 images a split, two bit-widths, two exits, the cheapest calibration."""
    raw = {
        "name": "small",
        "dataset": {"limit": 120},
        "backbone": {"exits": [4, 8]},
        "paths": {"bits": [2, 8], "policy": "full"},
        "quantization": {"method": "minmax", "images": 32},
        "heads": {"epochs": 3},
        "embedding": {"dimensions": 8},
        "targets": {"clusters": [None, 5]},
        "predictors": [{"name": "logistic"}, {"name": "nearest_cluster", "options": {"clusters": 5}}],
        "prices": {"count": 12},
        "cost": {"batch": 16, "repeats": 1},
        "evaluation": {"resamples": 100},
        "run": {"store": str(folder / "store"), "runs": str(folder / "runs"), "device": "cpu", "pictures": False},
    }
    for name, fields in sections.items():
        raw[name] = {**raw.get(name, {}), **fields} if isinstance(fields, dict) else fields
    return parse_config(raw, source="tests")


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One folder for Prefect in all tests of a module, whose database takes seconds to make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        yield


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads, for the test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@dataclass(frozen=True)
class SmallSweep:
    plan: SweepPlan
    store: Store
    network: PathNetwork
    exits: FittedExits
    calibration: Calibration
    target: Outcomes
    select: Outcomes
    test: Outcomes


@pytest.fixture(scope="session")
def small_sweep(tmp_path_factory: pytest.TempPathFactory) -> SmallSweep:
    config = small_config(tmp_path_factory.mktemp("small"))
    plan, store = resolve(config), Store.open(config.run.store)
    network, exits, calibration = network_of(plan, store, torch.device("cpu"))
    for split, shard, bits in branches_of(plan):
        cells = cells_of(plan, exits, calibration, split, shard, plan.tree.branch(bits))
        extract_branch(plan, store, network, cells, split, shard)
    outcomes = [outcomes_of(plan, store, exits, calibration, split)[0] for split in WALKED]
    return SmallSweep(plan, store, network, exits, calibration, *outcomes)
