"""A finished run of the small sweep: record, tables, router and report in a folder, made without Prefect's server."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from quee_core.config import SweepConfig
from quee_core.grid import fit_gate, grid_points
from quee_core.record import SweepRecord
from quee_core.runs import REPORT, ROUTER_MANIFEST, router_folder, write_record
from tasks.assemble import assemble_outcomes
from tasks.evaluate import evaluate
from tests.conftest import SmallSweep


@dataclass(frozen=True)
class FinishedRun:
    """sweep: what was asked for; record: what came out; folder: of the run."""

    sweep: SweepConfig
    record: SweepRecord
    folder: Path

    @property
    def report(self) -> Path:
        return self.folder / REPORT

    def tracked_at(self, uri: str, **run: object) -> SweepConfig:
        """The sweep with MLflow at `uri`."""
        return self.sweep.model_copy(update={"run": self.sweep.run.model_copy(update={"mlflow_uri": uri, **run})})

    def copy(self, name: str, points: slice, to: Path) -> "FinishedRun":
        """Another run whose router offers some of this one's operating points alone."""
        shutil.copytree(self.folder, to)
        path = router_folder(to) / ROUTER_MANIFEST
        manifest = json.loads(path.read_text())
        manifest["points"] = manifest["points"][points]
        path.write_text(json.dumps(manifest))
        record = self.record.model_copy(update={"name": name})
        return replace(self, record=record, folder=to)


@pytest.fixture(scope="session")
def finished_run(small_sweep: SmallSweep, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("finished") / "small"
    sweep, tree = small_sweep.plan.config, small_sweep.plan.tree
    assembled, _ = assemble_outcomes.fn(sweep, folder / "outcomes")
    fits = [
        fit
        for gate in tree.gates
        for fit in fit_gate(gate, grid_points(sweep), tree, small_sweep.target, small_sweep.select, sweep.seed)
    ]
    record = evaluate.fn(sweep, assembled, fits, [], folder)
    write_record(record, folder)
    (folder / REPORT).write_text("<p>the report</p>")
    return FinishedRun(sweep, record, folder)
