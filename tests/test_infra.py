"""The files that run quee elsewhere, by the validators of those who read them, and against the code that they start."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from flows.run_page import MLFLOW_PAGES
from infra import deploy
from quee_core.config import load_config
from tests.prefect_server import ROOT

INFRA = ROOT / "infra"
COMPOSE = INFRA / "compose" / "compose.yaml"
KUBERNETES = "1.34"


def documents(file: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(file.read_text()) if document is not None]


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text()))


def test_the_compose_file_is_one() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_published_beyond_loopback_and_no_secret_is_written_down() -> None:
    for name, service in compose()["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port}"
        for variable, value in service.get("environment", {}).items():
            if "SECRET" in variable or "PASSWORD" in variable:
                assert value.startswith("${"), f"{name}: {variable}"


def test_services_wait_for_services_that_there_are() -> None:
    services = compose()["services"]
    for service in services.values():
        for other, wait in service.get("depends_on", {}).items():
            assert other in services
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in services[other]
            if wait["condition"] == "service_completed_successfully":
                assert services[other]["restart"] == "no"


def test_the_deployed_places_are_services_of_the_compose_file(monkeypatch: pytest.MonkeyPatch) -> None:
    services = compose()["services"]
    monkeypatch.setattr(sys, "argv", services["deploy"]["command"].split()[2:])
    asked = deploy.arguments()
    sweep = deploy.sweep_with(asked.config, deploy.places_of(asked))
    assert sweep is not None
    assert sweep.model_copy(update={"run": load_config(deploy.DEFAULT_SWEEP).run}) == load_config(deploy.DEFAULT_SWEEP)
    assert sweep.run.store == "s3://quee/store"
    for address in (sweep.run.mlflow_uri, sweep.run.dask):
        assert address is not None
        host, _, port = address.partition("://")[2].partition(":")
        assert port in services[host]["command"]


def test_links_to_mlflow_lead_to_the_port_that_its_service_publishes() -> None:
    services = compose()["services"]
    pages = services["worker"]["environment"][MLFLOW_PAGES].removeprefix("http://")
    assert f"{pages}:5000" in services["mlflow"]["ports"]
    assert pages in services["mlflow"]["command"].partition("--allowed-hosts ")[2].split()[0].split(",")


@pytest.mark.parametrize("file", sorted((INFRA / "kubernetes").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_manifests_are_what_kubernetes_reads(file: Path) -> None:
    for document in documents(file):
        if document["kind"] == "DaskCluster":  # the operator's own kind: its parts are Kubernetes'
            for part in ("worker", "scheduler"):
                _valid({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": part}, **_only_spec(document, part)})
            service = document["spec"]["scheduler"]["service"]
            _valid({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "scheduler"}, "spec": service})
        else:
            _valid(document)


def test_jobs_of_the_template_ask_for_gpus() -> None:
    template = json.loads((INFRA / "kubernetes" / "job-template.json").read_text())
    values = {name: said.get("default") for name, said in template["variables"]["properties"].items()}
    values |= {"command": ["python", "-m", "prefect.flow_engine"], "env": [], "labels": {"app": "quee"}}
    job = _filled(template["job_configuration"]["job_manifest"], values)
    _valid(job)
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["requests"]["nvidia.com/gpu"] == "1"


def _valid(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def _only_spec(document: dict[str, Any], part: str) -> dict[str, Any]:
    return {"spec": document["spec"][part]["spec"]}


def _filled(template: Any, values: dict[str, Any]) -> Any:
    """`template` with what stands in braces replaced as Prefect's worker does: whole values keep their type."""
    if isinstance(template, dict):
        return {key: _filled(value, values) for key, value in template.items()}
    if isinstance(template, list):
        return [_filled(value, values) for value in template]
    if not isinstance(template, str) or "{{" not in template:
        return template
    for name, value in values.items():
        if template == "{{ " + name + " }}":
            return str(value) if name == "gpus" else value
        template = template.replace("{{ " + name + " }}", str(value))
    return template
