"""The command: a whole sweep through a real Prefect server, and one clear line for whatever is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image
from plotly.io.json import to_json_plotly
from safetensors.torch import save_file
from typer.main import get_command
from typer.testing import CliRunner

from flows.cli import app
from quee_core.backbones.micro_vit import micro_vit
from quee_core.baselines import BASELINES
from quee_core.record import SweepRecord
from quee_core.report.figures import all_figures
from tests.conftest import small_config
from tests.quee_command import QUEE, quee, refused, write_config

ALL: Any = get_command(app)
COMMANDS: dict[tuple[str, ...], Any] = {(): ALL} | {(name,): command for name, command in ALL.commands.items()}
COMMANDS |= {("champion", name): command for name, command in ALL.commands["champion"].commands.items()}


def run(*arguments: object, folder: Path, timeout: float = 420) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "MLFLOW"))}
    return subprocess.run(
        [QUEE, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )


def written(folder: Path, **sections: Any) -> Path:
    return write_config(folder, small_config(folder), **sections)


def tracked_runs(folder: Path, record: SweepRecord) -> tuple[MlflowClient, list[Run]]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(f"{record.backbone} on {record.dataset}")
    assert experiment is not None
    return client, list(client.search_runs([experiment.experiment_id]))


def check_tracked(folder: Path, record: SweepRecord) -> set[str]:
    """MLflow's parent run holds the record, the report and its figures; its children are the grid. Returns all ids."""
    client, tracked = tracked_runs(folder, record)
    [parent] = [run for run in tracked if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in tracked if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert parent.info.run_name == record.name
    assert {run.info.status for run in tracked} == {"FINISHED"}

    figures = all_figures(record)
    own = parent.info.run_id
    logged = {file.path for file in client.list_artifacts(own, "figures")}
    assert logged == {"figures/front.png", *(f"figures/{name}.html" for name in figures)}
    for name, figure in figures.items():
        page = Path(client.download_artifacts(own, f"figures/{name}.html", str(folder))).read_text("utf-8")
        assert to_json_plotly(figure.to_plotly_json()["data"]) in page, name
    report = Path(client.download_artifacts(own, "report.html", str(folder)))
    assert report.read_bytes() == (folder / "runs" / record.name / "report.html").read_bytes()
    written = Path(client.download_artifacts(own, "record.json", str(folder)))
    assert SweepRecord.model_validate_json(written.read_text("utf-8")).fronts == record.fronts

    assert len(children) == len(record.grid)
    points = [{name: str(value) for name, value in row.point.items()} for row in record.grid]
    assert sorted(map(str, points)) == sorted(str({k: run.data.params[k] for k in points[0]}) for run in children)
    return {run.info.run_id for run in tracked}


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's own query
@pytest.mark.xdist_group("sweep")
def test_a_sweep_runs_reports_and_continues_where_it_ended(tmp_path: Path) -> None:
    config = written(tmp_path, run={"pictures": True})
    first = run("sweep", config, "--json", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    record = SweepRecord.model_validate_json(first.stdout)
    assert {front.method for front in record.fronts} == {"quee", "gates", *BASELINES}
    assert all(row.low <= row.accuracy <= row.high for row in record.budgets)
    assert (tmp_path / "runs" / "small" / "report.html").stat().st_size > 1_000_000
    assert not any(row.failure for row in record.grid)
    tracked = check_tracked(tmp_path, record)
    routed = "router: quee-router-fashion_mnist version 1 (champion): the first router of its data set"
    assert routed in first.stderr

    second = run("sweep", config, "--json", folder=tmp_path)
    assert second.returncode == 0, second.stderr
    again = SweepRecord.model_validate_json(second.stdout)
    computed = {timing.stage: timing.computed for timing in again.timings}
    assert computed["calibrate"] == computed["train heads"] == computed["extract"] == computed["fit the grid"] == 0
    assert again.fronts == record.fronts
    assert again.budgets == record.budgets
    assert routed in second.stderr
    assert {r.info.run_id for r in tracked_runs(tmp_path, record)[1]} == tracked, "a rerun is not tracked again"

    compared = json.loads(quee(tmp_path, "compare", "small", "--against", "small", "--json").stdout)
    assert [(one["n"], one["runs"]) for one in compared] == [(record.splits["test"], ["small"])]
    for front in record.fronts:  # measured anew from tables and router, and the same
        assert compared[0]["hypervolumes"][front.method] == pytest.approx(front.hypervolume, abs=1e-12)
    assert compared[0]["saving"] == compared[0]["saving_against"]
    assert "did you mean 'small'" in refused(tmp_path, "compare", "smal")

    shown = quee(tmp_path, "report", "small")
    assert shown.exit_code == 0
    assert "budget" in shown.stdout
    assert "did you mean 'small'" in refused(tmp_path, "report", "smal")

    planned = json.loads(quee(tmp_path, "plan", config, "--json").stdout)
    assert planned["cells_missing"] == 0
    assert planned["cells"] == planned["paths"] * 3


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "3000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_threads_wait_without_spinning_for_long_where_nobody_says_how(given: dict[str, str], spins: str | None) -> None:
    own = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    asked = "import os, sys; from flows.cli import quiet_surroundings; quiet_surroundings(False); "
    asked += "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"  # which reads it when it is imported
    done = subprocess.run([sys.executable, "-c", asked], env=own | given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(spins), "False"]


def test_lists_and_version(tmp_path: Path) -> None:
    assert run("--version", folder=tmp_path).stdout.startswith("quee ")
    assert "micro_vit_fashion_mnist" in quee(tmp_path, "backbones", "list").stdout
    assert {"fashion_mnist", "folder"} <= {
        row["name"] for row in json.loads(quee(tmp_path, "datasets", "--json").stdout)
    }


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(("quee", *words)))
def test_every_command_option_and_argument_has_help(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = COMMANDS[words]
    assert command.help
    assert [p.name for p in command.params if not (getattr(p, "help", None) or "").strip()] == []
    shown = CliRunner().invoke(app, [*words, "--help"]).stdout.split()
    names = [name for p in command.params for name in (*p.opts, *p.secondary_opts)]
    assert [name for name in names if name.startswith("-") and name not in shown] == []
    if not words:
        assert {"sweep", "plan", "report", "route", "champion", "backbones", "datasets"} <= set(shown)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"backbone": {"name": "micro_vit_fashion_mnits"}}, "did you mean 'micro_vit_fashion_mnist'"),
        ({"backbone": {"exits": [4, 9]}}, "beyond the backbone's depth"),
        ({"backbone": {"exits": [8, 4]}}, "out of order"),
        ({"dataset": {"name": "fashion_mnits"}}, "did you mean 'fashion_mnist'"),
        ({"dataset": {"name": "folder", "root": "nowhere"}}, "nowhere"),
        ({"run": {"device": "cuda:7"}}, "CUDA devices"),
        ({"run": {"device": "tpu"}}, "tpu"),
        ({"quantization": {"method": "mes"}}, "did you mean"),
        ({"predictors": [{"name": "mpl"}]}, "did you mean 'mlp'"),
        ({"quantization": {"images": 500}}, "the fit split has 120; set it to 120 or fewer"),
    ],
)
def test_impossible_requests_end_in_one_line(tmp_path: Path, sections: dict, message: str) -> None:
    config = written(tmp_path, **sections)
    assert message in refused(tmp_path, "plan" if "method" not in str(sections) else "sweep", config)


def test_checkpoints_that_do_not_fit_are_named(tmp_path: Path) -> None:
    config = written(tmp_path)
    weights = micro_vit(num_classes=7).state_dict()
    save_file(weights, tmp_path / "seven.safetensors")
    told = refused(tmp_path, "plan", config, "--checkpoint", tmp_path / "seven.safetensors")
    assert told.endswith(
        "seven.safetensors: has a head of 7 classes, and the model one of 10: set num_classes to 7 if those are the "
        "images' classes, or fine-tune it to the 10 first (`quee finetune`, configs/finetune)"
    ), told
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "seven.safetensors").read_bytes()[:5000])
    assert "cut.safetensors: damaged, cut short, or not a safetensors file" in refused(
        tmp_path, "plan", config, "--checkpoint", tmp_path / "cut.safetensors"
    )
    torch.save({"state_dict": os.system}, tmp_path / "evil.pt")
    assert "evil.pt: refused: a pickle that holds more than plain tensors could run code" in refused(
        tmp_path, "plan", config, "--checkpoint", tmp_path / "evil.pt"
    )
    weights = micro_vit().state_dict()
    weights["head.bias"] = torch.full((10,), float("nan"))
    save_file(weights, tmp_path / "nan.safetensors")
    assert "not finite" in refused(tmp_path, "sweep", config, "--checkpoint", tmp_path / "nan.safetensors")


def test_a_class_count_that_does_not_fit_the_head_is_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("cat", "dog", "owl"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for k in range(40):
            pixels = rng.integers(0, 255, (28, 28), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{k}.png")
    shares = {"name": "folder", "root": "images", "limit": None, "fit": 0.4, "target": 0.2, "select": 0.2, "test": 0.2}
    config = written(tmp_path, dataset=shares)
    told = refused(tmp_path, "plan", config)
    assert "its head has 10 classes, data set folder has 3; fine-tune it to them first (`quee finetune`" in told


def test_a_pattern_that_no_backbone_matches_is_told(tmp_path: Path) -> None:
    assert "no backbone matches 'vit_tinny'" in refused(tmp_path, "backbones", "list", "vit_tinny")
