"""Everything at once, as a team runs it: Prefect with a worker, Dask, MLflow and S3 as processes on loopback.

One sweep is deployed and run; what it found is looked up where others would: over MLflow's REST interface, in the
bucket, on Prefect's page of the run, and from the served champion.
"""

import base64
import io
import json
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import botocore.session
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from quee_core.cascades import OWN, SUMMED, SUMS, AnswerKind
from quee_core.data.datasets import load_dataset
from quee_core.paths import Path as BitPath
from quee_core.record import SweepRecord, images_key
from quee_core.revisions import Revisions
from quee_core.runs import REPORT, read_record
from quee_core.tables import UNCERTAINTY, Outcomes
from tests.dask_cluster import DaskCluster, dask_cluster
from tests.mlflow_server import MlflowServer, ModelServer, encoded
from tests.prefect_server import PrefectServer, prefect_server, until
from tests.quee_command import write_sweep
from tests.s3_server import BUCKET, SECRET_KEY, S3Server

pytestmark = pytest.mark.xdist_group("whole")
MODEL, POOL = "quee-router-fashion_mnist", "whole"
TRACKING_PASSWORD, LOGIN, TYPED = "planted-for-mlflow", "planted-for-prefect", "planted-in-a-form"
SPLITS = ("target", "select", "test")


@dataclass(frozen=True)
class Pipeline:
    """The five servers, and the one run of the deployed sweep. folder: of the sweep and its runs."""

    prefect: PrefectServer
    mlflow: MlflowServer
    s3: S3Server
    dask: DaskCluster
    folder: Path
    run: dict[str, Any]
    said: str  # by the command that watched it

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @cached_property
    def record(self) -> SweepRecord:
        return read_record(self.runs / "small" / "record.json")

    def rest(self, place: str, body: object = None, **query: str) -> Any:
        """MLflow's answer to a GET, or to a POST of `body`."""
        url = f"{self.mlflow.url}/api/2.0/mlflow/{place}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
            return json.load(answer)

    @cached_property
    def experiment(self) -> dict[str, Any]:
        name = f"{self.record.backbone} on {self.record.dataset}"
        found: dict[str, Any] = self.rest("experiments/get-by-name", experiment_name=name)["experiment"]
        return found

    def tracked(self, which: str) -> list[dict[str, Any]]:
        body = {"experiment_ids": [self.experiment["experiment_id"]], "filter": which, "max_results": 1000}
        found: list[dict[str, Any]] = self.rest("runs/search", body).get("runs", [])
        return found

    @cached_property
    def parent(self) -> dict[str, Any]:
        [run] = self.tracked("tags.`quee.record` LIKE '%'")
        return run

    @cached_property
    def objects(self) -> dict[str, bytes]:
        """Everything in the bucket by its key."""
        client = botocore.session.Session().create_client("s3")
        try:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
            keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
            return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
        finally:
            client.close()

    def artifact(self, uri: str) -> bytes:
        return self.objects[uri.removeprefix(f"s3://{BUCKET}/")]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_"))]:
            patch.delenv(name)
        s3 = stack.enter_context(S3Server(folder / "s3"))
        planted = {"MLFLOW_TRACKING_USERNAME": "quee", "MLFLOW_TRACKING_PASSWORD": TRACKING_PASSWORD}
        for name, value in {**s3.environment, **planted}.items():
            patch.setenv(name, value)
        dask = stack.enter_context(dask_cluster(folder / "dask"))
        (folder / "mlflow").mkdir()
        mlflow = MlflowServer(folder / "mlflow")
        stack.callback(mlflow.kill)
        mlflow.launch()
        (folder / "prefect").mkdir()
        prefect = stack.enter_context(prefect_server(folder / "prefect", login=f"quee:{LOGIN}"))
        mlflow.ready()
        (folder / "sweep").mkdir()
        config = write_sweep(
            folder / "sweep", dataset={"limit": 200}, quantization={"edge_bits": 6, "stem_bits": 4},
            heads={"epochs": 20}, run={"artifacts": f"s3://{BUCKET}/mlflow", "pictures": True},
        )  # fmt: skip
        deployed = prefect.do(
            "python", "-m", "infra.deploy", "--pool", POOL, "--config", config, "--store", f"s3://{BUCKET}/store",
            "--mlflow", mlflow.url, "--dask", dask.address,
        )  # fmt: skip
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        with pytest.MonkeyPatch.context() as careless:  # nothing of quee's can keep a worker from being started so
            careless.setitem(prefect.environment, "PREFECT_API_URL", prefect.url.replace("://", f"://quee:{LOGIN}@"))
            stack.enter_context(prefect.worker(POOL))
        done = prefect.do("prefect", "deployment", "run", "quee/full-sweep", "--watch")
        said = deployed.stdout + deployed.stderr + done.stdout + done.stderr
        assert done.returncode == 0, said + (prefect.folder / "worker.log").read_text()
        [run] = prefect.runs("quee")
        yield Pipeline(prefect, mlflow, s3, dask, folder / "sweep", run, said)


def test_the_tables_lie_in_the_bucket_and_nowhere_else(pipeline: Pipeline) -> None:
    tables = {key for key in pipeline.objects if key.startswith("store/backbone=") and key.endswith(".parquet")}
    paths = sum(len(pipeline.record.bits) ** exit_ for exit_ in range(1, len(pipeline.record.exits) + 1))
    for split in SPLITS:
        assert sum(f"/split={split}/" in key for key in tables) == paths
    assert sorted(path.name for path in pipeline.folder.iterdir()) == ["runs", "sweep.yaml"]


def test_the_grid_was_fitted_by_the_dask_workers(pipeline: Pipeline) -> None:
    [fitted] = [timing for timing in pipeline.record.timings if timing.stage == "fit the grid"]
    units = pipeline.dask.computed()
    points = [re.search(r"(\d+) points", unit) for unit in units]
    assert sum(int(found[1]) for found in points if found) == fitted.computed > 0


def test_mlflow_has_the_front_of_the_record(pipeline: Pipeline) -> None:
    run, record = pipeline.parent, pipeline.record
    assert run["info"]["status"] == "FINISHED"
    for front in record.fronts:
        history = pipeline.rest(
            "metrics/get-history", run_id=run["info"]["run_id"], metric_key=f"front_{front.method}"
        )["metrics"]
        wanted: dict[int, float] = {}
        for point in front.points:
            step = round(1000 * point.cost)
            wanted[step] = max(point.accuracy, wanted.get(step, 0.0))
        assert {int(each["step"]): each["value"] for each in history} == wanted
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert tags["quee.backbone"] == "micro_vit_fashion_mnist"
    assert tags["quee.dataset"] == "fashion_mnist"
    assert tags["quee.bits"] == "2-4"
    params = {param["key"]: param["value"] for param in run["data"]["params"]}
    assert params["run.dask"] == pipeline.dask.address
    inputs = {each["tags"][0]["value"]: each["dataset"] for each in run["inputs"]["dataset_inputs"]}
    assert set(inputs) == {"fit", *SPLITS}
    for split, given in inputs.items():
        assert given["digest"] == record.fingerprints[images_key(split)][:16]
        assert json.loads(given["profile"])["num_rows"] == record.splits[split]
    children = pipeline.tracked(f"tags.`mlflow.parentRunId` = '{run['info']['run_id']}'")
    assert len(children) == len(record.grid)


def test_figures_and_tables_of_the_run_are_artifacts_in_the_bucket(pipeline: Pipeline) -> None:
    place = pipeline.parent["info"]["artifact_uri"]
    assert place.startswith(f"s3://{BUCKET}/mlflow/")
    stored = json.loads(pipeline.artifact(f"{place}/record.json"))
    assert stored["fronts"] == json.loads(pipeline.record.model_dump_json())["fronts"]
    assert b"Plotly.newPlot" in pipeline.artifact(f"{place}/figures/front.html")
    listed = pipeline.rest("artifacts/list", run_id=pipeline.parent["info"]["run_id"], path="figures")["files"]
    assert {"figures/front.html", "figures/front.png"} <= {file["path"] for file in listed}
    with Image.open(io.BytesIO(pipeline.artifact(f"{place}/figures/front.png"))) as image:
        assert image.width > 1000


@pytest.fixture(scope="module")
def champion(pipeline: Pipeline) -> dict[str, Any]:
    found: dict[str, Any] = pipeline.rest("registered-models/alias", name=MODEL, alias="champion")["model_version"]
    return found


@pytest.fixture(scope="module")
def serving(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    with ModelServer(f"models:/{MODEL}@champion", pipeline.mlflow.url, tmp_path_factory.mktemp("serve")) as server:
        yield server


def test_the_served_champion_answers_as_the_tables_and_its_rules_say(
    pipeline: Pipeline, champion: dict[str, Any], serving: ModelServer
) -> None:
    """By the tables in the bucket, and the rules and revisions in the model: neither network nor router is asked."""
    assert champion["run_id"] == pipeline.parent["info"]["run_id"]
    router = f"{champion['source']}/artifacts/router"
    manifest = json.loads(pipeline.artifact(f"{router}/router.json"))
    kinds = {point["rule"].get("answers", OWN) for point in manifest["points"]} - {OWN}
    revisions = Revisions.from_bytes(pipeline.artifact(f"{router}/revisions.safetensors")) if kinds else None
    tables = tables_by_path(pipeline.objects, manifest["architecture"]["exits"])
    ids = tables[str(max(manifest["bits"]))]["sample_id"].to_pylist()
    dataset = load_dataset("fashion_mnist", None)
    positions = [dataset.sample_ids("test").tolist().index(sample) for sample in ids]
    images = [dataset.image("test", position) for position in positions]
    truth = dataset.labels("test")[positions]
    front = {point.setting: point for point in pipeline.record.fronts[0].points}
    assert pipeline.record.fronts[0].method == "quee"
    assert len(manifest["points"]) == len(front)
    looks = []
    for point in manifest["points"]:
        rows = served(serving, images, point["cost"])
        right = np.array([row["index"] for row in rows]) == truth
        recorded = min(front.values(), key=lambda each: abs(each.cost - point["cost"]))
        assert right.mean() == pytest.approx(recorded.accuracy, abs=1e-12)
        assert np.mean([row["cost"] for row in rows]) == pytest.approx(recorded.cost, rel=1e-9)
        if point["rule"]["kind"] == "cascade":
            looks.append(len(point["rule"]["looks"]))
            seen, costs, kind = tables, manifest["costs"], point["rule"]["answers"]
            if revisions is not None and kind != OWN:
                seen = revised(revisions, kind, tables)
                extra = (kind in SUMS) * 2 * len(manifest["class_names"]) * 32**2 + (kind != SUMMED) * revisions.bitops
                costs = costs | {"heads": [head + extra for head in costs["heads"]]}
            expected = answers(point["rule"], seen, costs)
            assert [(row["index"], row["path"]) for row in rows] == [(label, path) for label, path, _ in expected]
            assert [row["label"] for row in rows] == [manifest["class_names"][label] for label, _, _ in expected]
            assert [row["cost"] for row in rows] == pytest.approx(
                [cost / manifest["full_cost"] for _, _, cost in expected], rel=1e-12
            )
    assert max(looks) > 1  # images take different paths


def served(serving: ModelServer, images: list[Image.Image], budget: float) -> list[dict[str, Any]]:
    body = {"dataframe_split": {"columns": ["image"], "data": [[each] for each in encoded(images)]}}
    status, answer = serving.ask({**body, "params": {"budget": budget}})
    assert status == 200, answer
    rows: list[dict[str, Any]] = answer["predictions"]
    return rows


def tables_by_path(objects: dict[str, bytes], exits: list[int]) -> dict[str, pa.Table]:
    """The tables of the test split; their folders name the bit-widths of all blocks, a path those of its segments."""
    tables = {}
    for key, data in objects.items():
        found = re.search(r"/split=test/exit=\d+/bits=([\d-]+)/part-.*\.parquet$", key)
        if found:
            blocks = found[1].split("-")
            path = "-".join(blocks[exit_ - 1] for exit_ in exits if exit_ <= len(blocks))
            tables[path] = pq.read_table(io.BytesIO(data))
    return tables


def revised(revisions: Revisions, kind: AnswerKind, tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """What uniform paths answer once their answers are revised."""
    found = Outcomes.from_tables([(BitPath.parse(path), table) for path, table in tables.items()])
    made, answered = revisions.answers(kind, found), {}
    for k, path in enumerate(made.paths):
        measures = {name: made.uncertainty[:, k, i] for i, name in enumerate(UNCERTAINTY)}
        answered[str(path)] = pa.table({"predicted": made.predicted[:, k], **measures})
    return answered


def answers(rule: dict[str, Any], tables: dict[str, pa.Table], costs: dict[str, Any]) -> list[tuple[int, str, float]]:
    """Label, path and cost in BitOps of each image by a cascade, look after look."""
    answered: dict[int, tuple[int, str, float]] = {}
    cost, ran = costs["stem"], set[tuple[str, ...]]()
    for k, (look, threshold) in enumerate(zip(rule["looks"], [*rule["thresholds"], -np.inf], strict=True)):
        bits = tuple(look.split("-"))
        for depth in range(1, len(bits) + 1):
            if bits[:depth] not in ran:
                cost += costs["segments"][bits[depth - 1]][depth - 1]
                ran.add(bits[:depth])
        cost += costs["heads"][len(bits) - 1]
        made = rule["looks"][: k + 1]
        journey = " > ".join(a for n, a in enumerate(made) if not any(b.startswith(a) for b in made[n + 1 :]))
        sign = -1 if rule["measure"] == "entropy" else 1
        for row, (label, confidence) in enumerate(
            zip(tables[look]["predicted"].to_pylist(), sign * tables[look][rule["measure"]].to_numpy(), strict=True)
        ):
            if row not in answered and confidence >= threshold:
                answered[row] = int(label), journey, cost
    return [answered[row] for row in sorted(answered)]


def test_the_page_of_the_run_leads_to_the_report_and_to_mlflow(pipeline: Pipeline) -> None:
    asked = {"artifacts": {"flow_run_id": {"any_": [pipeline.run["id"]]}}}
    artifacts = {found["key"]: found for found in pipeline.prefect.ask("/artifacts/filter", asked)}
    data = (pipeline.runs / "small" / "figures" / "front.png").read_bytes()
    assert artifacts["small-picture"]["data"] == f"data:image/png;base64,{base64.b64encode(data).decode()}"
    assert artifacts["small-picture"]["type"] == "image"
    report = link_of(artifacts["small-report"])
    with urllib.request.urlopen(report) as page:
        assert b"<title>small " in page.read()
    assert report == (pipeline.runs / "small" / REPORT).as_uri()
    run = link_of(artifacts["small-mlflow"])
    with urllib.request.urlopen(run) as page:
        assert page.status == 200
    assert run.startswith(pipeline.mlflow.url)
    assert run.endswith(
        f"/#/experiments/{pipeline.experiment['experiment_id']}/runs/{pipeline.parent['info']['run_id']}"
    )


def link_of(artifact: dict[str, Any]) -> str:
    found = re.search(r"\]\(([^)]+)\)", artifact["data"])
    assert found, artifact
    return found[1]


def test_a_login_that_is_typed_into_the_form_is_refused_before_it_is_stored(pipeline: Pipeline) -> None:
    before = len(pipeline.prefect.runs("quee"))
    for setting in ("mlflow_uri", "store", "artifacts"):
        asked = json.dumps({"run": {setting: f"http://quee:{TYPED}@mlflow.lab:5000"}})
        done = pipeline.prefect.do("prefect", "deployment", "run", "quee/full-sweep", "--param", f"sweep={asked}")
        assert done.returncode != 0
        assert setting in done.stdout + done.stderr
    assert len(pipeline.prefect.runs("quee")) == before


def test_no_secret_is_stored_anywhere(pipeline: Pipeline) -> None:
    """In databases, logs, parameters, objects of the bucket, folders of runs; nor said to whoever deploys and runs."""
    prefect, run = pipeline.prefect, {"id": {"any_": [pipeline.run["id"]]}}
    until("the last log line", lambda: "Finished in state Completed" in json.dumps(logs(prefect)))
    stored = pipeline.objects | {
        "said": pipeline.said.encode(),
        "logs": json.dumps(logs(prefect)).encode(),
        "runs": json.dumps(prefect.ask("/flow_runs/filter", {"flow_runs": run})).encode(),
        "deployments": json.dumps(prefect.ask("/deployments/filter", {})).encode(),
    }
    for folder in (prefect.folder, pipeline.mlflow.folder, pipeline.dask.folder, pipeline.folder):
        stored |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("prefect.db", "mlflow.db", "worker.log", "worker-0.log", "server.log", "record.json", "report.html"):
        assert any(place.endswith(f"/{name}") for place in stored), name
    for secret in (SECRET_KEY, TRACKING_PASSWORD, LOGIN, TYPED):
        basic = base64.b64encode(f"quee:{secret}".encode()).decode()
        forms = [form.encode() for form in (secret, urllib.parse.quote(secret, safe=""), basic)]
        assert [place for place, data in stored.items() if any(form in data for form in forms)] == []


def logs(prefect: PrefectServer) -> list[dict[str, Any]]:
    """The latest log lines that the server keeps."""
    found: list[dict[str, Any]] = prefect.ask("/logs/filter", {"limit": 200, "sort": "TIMESTAMP_DESC"})
    return found
