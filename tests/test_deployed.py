"""The deployments, on a real Prefect server with a real worker: `make deploy`, runs, the watch, announcements."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows import announcing
from flows.run_page import MLFLOW_PAGES
from quee_core.backbones.registry import ASSETS
from quee_core.config import SweepConfig
from quee_core.errors import ServerError
from tests.conftest import small_config
from tests.prefect_server import ROOT, PrefectServer, prefect_server, until
from tests.quee_command import only_error, write_sweep

pytestmark = pytest.mark.xdist_group("deployed")
POOL = "tests"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with prefect_server(tmp_path_factory.mktemp("prefect")) as running:
        yield running


@pytest.fixture(scope="module")
def deployed(server: PrefectServer) -> PrefectServer:
    for _ in range(2):  # what is there is brought up to date, not made twice
        done = server.do("python", "-m", "infra.deploy", "--pool", POOL, "--gpus", 1)
        assert done.returncode == 0, done.stdout + done.stderr
    return server


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> SweepConfig:
    folder = tmp_path_factory.mktemp("sweep")
    return small_config(folder, dataset={"limit": 60}, paths={"bits": [2, 4]}, prices={"count": 6})


@pytest.fixture(scope="module")
def swept(deployed: PrefectServer, sweep: SweepConfig) -> Iterator[dict[str, Any]]:
    """The run of `quee/full-sweep` by a worker, which stays for the tests that follow."""
    deployed.environment[MLFLOW_PAGES] = "http://someone:planted@mlflow.lab:5000/"
    with deployed.worker(POOL):
        done = deployed.do(
            "prefect", "deployment", "run", "quee/full-sweep", "--watch",
            "--param", "sweep=" + sweep.model_dump_json(exclude_unset=True),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr + (deployed.folder / "worker.log").read_text()
        [run] = deployed.runs("quee")
        yield run


def parameters_of(server: PrefectServer, name: str) -> dict[str, Any]:
    found: dict[str, Any] = server.ask(f"/deployments/name/{name}")["parameters"]
    return found


def test_the_deployed_sweep_is_that_of_the_configs(deployed: PrefectServer) -> None:
    quick = SweepConfig.model_validate(yaml.safe_load((ROOT / "configs" / "quick.yaml").read_text()))
    for name in ("quee/full-sweep", "quee-new-backbones/watch"):
        assert SweepConfig.model_validate(parameters_of(deployed, name)["sweep"]) == quick


def test_schedules_wait_to_be_started_and_what_a_deployment_leans_on_is_there_once(deployed: PrefectServer) -> None:
    for name in ("quee/full-sweep", "quee-new-backbones/watch"):
        [schedule] = deployed.ask(f"/deployments/name/{name}")["schedules"]
        assert schedule["slug"] == "nightly"
        assert not schedule["active"]
    limits = deployed.ask("/v2/concurrency_limits/filter", {})
    assert [limit["limit"] for limit in limits if limit["name"] == "tag:gpu"] == [1]
    automations = [automation["name"] for automation in deployed.ask("/automations/filter", {})]
    assert automations.count("quee: end silent runs") == 1
    assert len([name for name in automations if "announced" in name]) == 1


def test_the_form_of_a_run_shows_every_setting_with_its_sentence(deployed: PrefectServer) -> None:
    schema = json.dumps(deployed.ask("/deployments/name/quee/full-sweep")["parameter_openapi_schema"])
    for setting in SweepConfig.model_fields:
        assert f'"{setting}"' in schema
    assert "errors that one full path of compute is worth" in schema


def test_a_wrong_parameter_starts_no_run(deployed: PrefectServer) -> None:
    before = len(deployed.runs("quee"))
    done = deployed.do("prefect", "deployment", "run", "quee/full-sweep", "--param", 'sweep={"paths":{"bits":"many"}}')
    assert done.returncode != 0
    assert "bits" in done.stdout + done.stderr
    assert len(deployed.runs("quee")) == before


def test_a_run_shows_its_tasks_its_progress_and_its_front(swept: dict[str, Any], deployed: PrefectServer) -> None:
    assert swept["state_type"] == "COMPLETED"
    of_run = {"flow_runs": {"id": {"any_": [swept["id"]]}}}
    tasks = until(
        "the runs of tasks, which the server hears of late",
        lambda: (found := deployed.ask("/task_runs/filter", of_run)) and len(found) >= 13 and found,
    )
    gpu = {task["name"] for task in tasks if "gpu" in task["tags"]}
    assert {f"extract-{split}-0-first-{b}-bits" for split in ("target", "select", "test") for b in (2, 4)} <= gpu
    artifacts = {
        found["key"]: found
        for found in deployed.ask("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [swept["id"]]}}})
    }
    assert artifacts["cells"]["data"] == 100
    assert "18 of 18 cells" in artifacts["cells"]["description"]
    assert "images/s" in artifacts["extract"]["description"]
    link = r"\[run in MLflow\]\(http://mlflow\.lab:5000/#/experiments/\d+/runs/[0-9a-f]{32}\)"
    assert re.fullmatch(link, artifacts["small-mlflow"]["data"])
    front = json.loads(artifacts["small-front"]["data"])
    assert len(front) == 7
    assert all(" to " not in row["95 %"] and row["95 %"].startswith("[") for row in front)


def test_log_lines_of_the_core_name_their_cell(swept: dict[str, Any], deployed: PrefectServer) -> None:
    asked = {"logs": {"flow_run_id": {"any_": [swept["id"]]}}, "limit": 200}
    lines = until(
        "log lines",
        lambda: [
            line
            for line in deployed.ask("/logs/filter", asked)
            if line["name"] == "quee_core.stages" and "published" in line["message"]
        ],
    )
    assert len(lines) == 18
    for line in lines:
        assert line["task_run_id"] is not None
        assert "/split=" in line["message"]
        assert "/bits=" in line["message"]


@pytest.mark.usefixtures("swept")
def test_an_announced_backbone_is_swept_once(deployed: PrefectServer, sweep: SweepConfig, tmp_path: Path) -> None:
    shelf = tmp_path / "backbones"
    shelf.mkdir()
    shutil.copy(ASSETS / "micro_vit_fashion_mnist.safetensors", shelf / "micro_vit_fashion_mnist__second.safetensors")
    (shelf / "micro_vit_fashion_mnist__second.yaml").write_text("exits: [4, 8]\n")
    (shelf / "README.txt").write_text("weights go here")
    watch = deployed.ask("/deployments/name/quee-new-backbones/watch")
    deployed_with = watch["parameters"] | {"sweep": sweep.model_dump(mode="json"), "folder": str(shelf)}
    patched = deployed.do(
        "python", "-c",
        "import sys, json; from prefect.client.orchestration import get_client\n"
        "from prefect.client.schemas.actions import DeploymentUpdate\n"
        "with get_client(sync_client=True) as client:\n"
        "    client.update_deployment(sys.argv[1], DeploymentUpdate(parameters=json.loads(sys.argv[2])))",
        watch["id"], json.dumps(deployed_with),
    )  # fmt: skip
    assert patched.returncode == 0, patched.stderr
    told = deployed.do("quee", "backbones", "announce", "micro_vit_fashion_mnist__second")
    assert told.returncode == 0, told.stdout + told.stderr

    def second() -> dict[str, Any] | None:
        runs = [run for run in deployed.runs("quee") if run["name"] == "small-micro_vit_fashion_mnist__second"]
        return runs[0] if runs and runs[0]["state_type"] in ("COMPLETED", "FAILED", "CRASHED") else None

    run = until("the sweep of the announced backbone", second)
    assert run["state_type"] == "COMPLETED"
    record = sweep.run.runs / run["name"] / "record.json"
    assert json.loads(record.read_text())["backbone"] == "micro_vit_fashion_mnist"
    elsewhere = sweep.model_copy(update={"run": sweep.run.model_copy(update={"batch": 7})})  # which changes no result
    moved = json.dumps({"sweep": elsewhere.model_dump(mode="json")})
    for parameters in ((), ("--params", moved)):
        again = deployed.do("prefect", "deployment", "run", "quee-new-backbones/watch", "--watch", *parameters)
        assert again.returncode == 0, again.stdout + again.stderr
        assert len(deployed.runs("quee")) == 2


def test_make_deploy_says_what_would_keep_runs_waiting(server: PrefectServer) -> None:
    def deploy(pool: str) -> str:
        done = server.do("python", "-m", "infra.deploy", "--pool", pool)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    unserved = "note: no worker serves work pool idle yet; start one: .venv/bin/prefect worker start --pool idle"
    assert unserved in deploy("idle")
    assert server.do("prefect", "work-pool", "pause", "idle").returncode == 0
    with server.worker("idle"):
        until("a worker", lambda: server.ask("/work_pools/idle/workers/filter", {}))
        told = deploy("idle")
    assert "note: work pool idle is paused; resume it: .venv/bin/prefect work-pool resume idle" in told
    assert unserved not in told


def test_a_pool_that_cannot_be_used_is_named(server: PrefectServer) -> None:
    assert server.do("prefect", "work-pool", "create", "cloud", "--type", "ecs").returncode == 0
    for pool, told in (("cloud", "work pool cloud: it is of type ecs; name another"), ("a/b", "work pool a/b: name: ")):
        done = server.do("python", "-m", "infra.deploy", "--pool", pool)
        assert done.returncode == 2, done.stdout
        assert only_error(done.stderr).startswith(told)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ({"version": "9.1.0"}, "Found incompatible versions: client: 3.8.8, server: 9.1.0. Major versions must match"),
        ({"login": "quee:planted"}, "it wants a login, or another one; set PREFECT_API_AUTH_STRING to user:password"),
    ],
    ids=["version", "login"],
)
def test_a_server_that_is_of_another_version_or_wants_a_login_is_told_by_each_command(
    kind: dict[str, str], told: str, tmp_path: Path
) -> None:
    write_sweep(tmp_path)
    commands = (
        ["python", "-m", "infra.deploy"], ["quee", "backbones", "announce", "vit"],
        ["quee", "sweep", tmp_path / "sweep.yaml"],
    )  # fmt: skip
    with prefect_server(tmp_path / "prefect", **kind) as other:
        other.environment.pop("PREFECT_API_AUTH_STRING", None)
        for command in commands:
            done = other.do(*command)
            assert done.returncode == 2, done.stdout + done.stderr
            assert only_error(done.stdout + done.stderr).startswith(f"Prefect server at {other.url}: {told}")
        if "login" not in kind:
            return
        other.environment["PREFECT_API_AUTH_STRING"] = kind["login"]
        done = other.do("quee", "backbones", "announce", "vit")
        assert done.returncode == 0, done.stdout + done.stderr
        changed = {PREFECT_API_URL: other.url, PREFECT_API_AUTH_STRING: "quee:changed"}
        with temporary_settings(changed), pytest.MonkeyPatch.context() as patch:
            patch.setattr(announcing, "check_server", lambda: other.url)  # the login changes right after it
            with pytest.raises(ServerError) as refused:
                announcing.announce_backbone("vit")
        message = str(refused.value)
        assert message.startswith(f"Prefect server at {other.url}: it does not take events (Client error '401")
        assert "\n" not in message
        assert "changed" not in message


def test_without_a_server_each_command_says_so_in_a_line(server: PrefectServer) -> None:
    try:
        for address, told in (
            ("http://127.0.0.1:1/api", "it does not answer"),
            ("http://user:planted@127.0.0.1:1/api", "PREFECT_API_URL carries a login"),
        ):
            server.environment["PREFECT_API_URL"] = address
            for command in (["python", "-m", "infra.deploy"], ["quee", "backbones", "announce", "vit"]):
                done = server.do(*command)
                assert done.returncode == 2
                assert f"error: Prefect server at http://127.0.0.1:1/api: {told}" in done.stderr
                assert "Traceback" not in done.stderr
                assert "planted" not in done.stdout + done.stderr
    finally:
        server.environment["PREFECT_API_URL"] = server.url
