"""A sweep's router is registered once, served as it answers in process, and champion only while it deserves to be."""

import ast
import base64
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.tracking import MlflowClient
from PIL import Image

from quee_core.data.datasets import load_dataset
from quee_core.deployment import load_router
from quee_core.errors import ConfigError, ServerError
from quee_core.record import Registration, images_key
from quee_core.runs import read_registration, record_digest, router_folder
from tasks.register import VERDICT_TAG, register
from tasks.registry import CHAMPION, HISTORY_TAG, PROMOTED_TAG, Reign, RouterRegistry, history
from tasks.router_package import SERVING
from tasks.track import track
from tests.finished_run import FinishedRun, finished_run  # noqa: F401 (a fixture)
from tests.mlflow_server import DEADLINE, MlflowServer, ModelServer, encoded
from tests.processes import free_ports
from tests.quee_command import quee, refused

pytestmark = pytest.mark.xdist_group("mlflow")
MODEL = "quee-router-fashion_mnist"


@dataclass(frozen=True)
class Registered:
    """Three sweeps of the same images in the order in which they were registered: a weak, a good, a weaker router."""

    client: MlflowClient
    server: MlflowServer
    runs: tuple[FinishedRun, ...]
    outcomes: tuple[Registration, ...]

    def again(self, k: int) -> Registration:
        return registered(self.server, self.runs[k])

    def champion(self) -> str:
        return str(self.client.get_model_version_by_alias(MODEL, CHAMPION).version)

    def versions(self) -> list[ModelVersion]:
        return sorted(self.client.search_model_versions(f"name = '{MODEL}'"), key=lambda each: int(each.version))


def registered(server: MlflowServer, run: FinishedRun) -> Registration:
    sweep = run.tracked_at(server.url)
    parent, _ = track.fn(sweep, run.record, run.folder, run.report)
    return register.fn(sweep, run.record, run.folder, run.report, parent)[0]


@pytest.fixture(scope="module")
def three(
    finished_run: FinishedRun,  # noqa: F811
    mlflow_server: MlflowServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Registered]:
    folder = tmp_path_factory.mktemp("three")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        runs = (
            finished_run.copy("cheap", slice(0, 1), folder / "cheap"),
            finished_run,
            finished_run.copy("middle", slice(0, 2), folder / "middle"),
        )
        outcomes = tuple(registered(mlflow_server, run) for run in runs)
        yield Registered(MlflowClient(tracking_uri=mlflow_server.url), mlflow_server, runs, outcomes)


def test_the_champion_is_the_one_with_the_better_front(three: Registered) -> None:
    first, better, worse = three.outcomes
    assert (first.version, better.version, worse.version) == (1, 2, 3)
    assert (first.champion, better.champion, worse.champion) == (True, True, False)
    assert "better than version 1: mean accuracy from" in better.line
    assert "not clearly better than version 2" in worse.line
    assert "the interval must lie above 0, and misses by" in worse.line
    assert "`quee champion promote fashion_mnist 3` overrules this" in worse.line
    assert three.champion() == "2"
    versions = three.versions()
    assert all(outcome.line.endswith(v.tags[VERDICT_TAG]) for outcome, v in zip(three.outcomes, versions, strict=True))
    assert read_registration(three.runs[2].folder) == worse


def test_the_same_record_is_registered_once(three: Registered) -> None:
    assert three.again(2) == three.outcomes[2]
    assert len(three.versions()) == 3
    assert three.champion() == "2"


def test_registration_goes_on_where_a_killed_process_ended(three: Registered) -> None:
    def models() -> int:
        experiment = three.client.get_experiment_by_name("micro_vit_fashion_mnist on fashion_mnist")
        assert experiment is not None
        return len(three.client.search_logged_models([experiment.experiment_id]))

    before = models()
    three.client.delete_model_version_tag(MODEL, "3", VERDICT_TAG)  # killed before the verdict
    assert three.again(2) == three.outcomes[2]
    three.client.delete_model_version(MODEL, "3")  # killed before the version, the model being logged
    again = three.again(2)
    assert (again.version, again.champion) in ((3, False), (4, False))
    assert models() == before
    assert len(three.versions()) == 3

    three.client.delete_model_version_tag(MODEL, "2", VERDICT_TAG)  # killed between the alias and the verdict
    assert "better than version 1" in three.again(1).line
    assert three.champion() == "2"


def test_processes_that_register_the_same_at_once_leave_one_version(three: Registered, tmp_path: Path) -> None:
    run = three.runs[1].copy("at once", slice(0, 1), tmp_path / "at-once")
    sweep = run.tracked_at(three.server.url)
    parent, _ = track.fn(sweep, run.record, run.folder, run.report)
    at_once = 4
    together = Barrier(at_once)

    def one() -> Registration:
        folder = tmp_path / f"process-{together.wait()}"  # as on a host of its own: no lock keeps the others off
        shutil.copytree(run.folder, folder)
        return register.fn(sweep, run.record, folder, run.report, parent)[0]

    with ThreadPoolExecutor(at_once) as threads:
        found = {done.result().version for done in [threads.submit(one) for _ in range(at_once)]}
    assert len(found) == 1
    digest = record_digest(run.record)
    assert [int(each.version) for each in three.versions() if each.tags["quee.record"] == digest] == list(found)
    three.client.delete_model_version(MODEL, str(*found))  # the other tests count them


def test_other_test_images_move_no_alias(three: Registered) -> None:
    run = three.runs[1]
    prints = {**run.record.fingerprints, images_key("test"): "0" * 64}
    record = run.record.model_copy(update={"name": "relabelled", "fingerprints": prints})
    found = registered(three.server, FinishedRun(run.sweep, record, run.folder))
    assert not found.champion
    assert "its test images have the same ids as the champion's, but other labels or contents" in found.line
    assert three.champion() == "2"


@dataclass(frozen=True)
class Raced:
    """A champion of one operating point, and two sweeps that both beat it: one of two points, one of all."""

    model: str
    dataset: str
    runs: tuple[FinishedRun, ...]
    versions: tuple[str, str]

    def verdict(self, client: MlflowClient, version: str) -> str:
        return str(client.get_model_version(self.model, version).tags[VERDICT_TAG])


@pytest.fixture
def raced(three: Registered) -> Raced:
    """As they stand before the two are judged."""
    dataset = f"raced-{uuid.uuid4().hex[:8]}"
    named = tuple(
        FinishedRun(run.sweep, run.record.model_copy(update={"dataset": dataset}), run.folder)
        for run in (three.runs[0], three.runs[2], three.runs[1])
    )
    first, *others = (registered(three.server, run) for run in named)
    model = first.model
    for each in others:
        for tag in (VERDICT_TAG, PROMOTED_TAG):
            three.client.delete_model_version_tag(model, str(each.version), tag)
    three.client.set_registered_model_alias(model, CHAMPION, str(first.version))
    return Raced(model, dataset, named[1:], (str(others[0].version), str(others[1].version)))


def at_once(three: Registered, raced: Raced) -> None:
    """Register both, each in a thread."""
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(registered, three.server, run) for run in raced.runs]:
            done.result()


@pytest.mark.parametrize("last", [0, 1], ids=["worse", "better"])
def test_of_two_that_move_the_alias_at_once_the_better_one_is_champion(
    three: Registered, raced: Raced, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    judged, moved, move = Barrier(2), Event(), RouterRegistry._move
    waits = set(raced.versions)

    def held(self: RouterRegistry, model: RegisteredModel, version: str, how: str, before: list[Reign]) -> Reign:
        if version not in waits:
            return move(self, model, version, how, before)
        waits.discard(version)
        judged.wait(DEADLINE)  # both have found the old champion in service
        if version == raced.versions[last]:
            moved.wait(DEADLINE)
        reign = move(self, model, version, how, before)
        moved.set()
        return reign

    monkeypatch.setattr(RouterRegistry, "_move", held)
    at_once(three, raced)
    worse, better = raced.versions
    assert three.client.get_model_version_by_alias(raced.model, CHAMPION).version == better
    assert raced.verdict(three.client, better).startswith("better than version 1: ")
    assert "; but version" not in raced.verdict(three.client, better)
    if last == 0:
        told = raced.verdict(three.client, worse)
        assert f"; but version {better}, promoted at the same time, stays: mean accuracy from" in told


@pytest.mark.parametrize("again", [0, 1], ids=["worse", "better"])
def test_of_two_that_were_killed_right_after_they_moved_the_alias_a_rerun_finds_the_better_one(
    three: Registered, raced: Raced, again: int
) -> None:
    registry, (worse, better) = RouterRegistry(three.client), raced.versions
    before = registry.model(raced.dataset)
    registry.promote(raced.dataset, better, "better than version 1")
    registry._move(before, worse, "better than version 1", history(before))
    assert three.client.get_model_version_by_alias(raced.model, CHAMPION).version == worse
    registered(three.server, raced.runs[again])
    assert three.client.get_model_version_by_alias(raced.model, CHAMPION).version == better


def test_a_challenger_is_judged_anew_where_another_was_faster(
    three: Registered, raced: Raced, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged, moved = Barrier(2), Event()
    worse, better = raced.versions
    found: list[str] = []

    def promote(self: RouterRegistry, dataset: str, version: str, how: str, standing: str | None = None) -> bool:
        found.append(version)
        if found.count(version) == 1:
            judged.wait(DEADLINE)
            if version == worse:
                moved.wait(DEADLINE)
        done = promoted(self, dataset, version, how, standing)
        if version == better:
            moved.set()
        return done

    promoted = RouterRegistry.promote
    monkeypatch.setattr(RouterRegistry, "promote", promote)
    at_once(three, raced)
    assert sorted(found) == sorted([worse, better])
    assert three.client.get_model_version_by_alias(raced.model, CHAMPION).version == better
    assert raced.verdict(three.client, worse).startswith(f"not clearly better than version {better}: ")


@pytest.mark.parametrize("damage", ["deleted", "cut short"])
def test_a_champion_whose_front_cannot_be_read_keeps_nothing_from_being_registered(
    three: Registered, raced: Raced, tmp_path: Path, damage: str
) -> None:
    source = three.client.get_model_version_by_alias(raced.model, CHAMPION).source
    front = three.server.artifacts / source.removeprefix("mlflow-artifacts:/") / "artifacts" / "front.safetensors"
    sound = front.read_bytes()
    front.unlink() if damage == "deleted" else front.write_bytes(sound[:-9])
    run, number = raced.runs[1], raced.versions[1]
    found = registered(three.server, run)
    assert (str(found.version), found.champion) == (number, False)
    assert "(champion: version 1): not judged: the front of version 1 cannot be read (" in found.line
    assert found.line.endswith(f"; `quee champion promote {raced.dataset} {number}` decides")
    assert "\n" not in found.line

    front.write_bytes(sound)  # mended, and the next run judges
    assert "better than version 1: " in registered(three.server, run).line
    front.unlink()
    command(tmp_path, three.server, "promote", raced.dataset, 1)
    command(tmp_path, three.server, "promote", raced.dataset, number)  # by hand it can always be decided
    assert three.client.get_model_version_by_alias(raced.model, CHAMPION).version == number


def test_nothing_in_a_registered_model_is_pickled(three: Registered) -> None:
    source = three.client.get_model_version_by_alias(MODEL, CHAMPION).source
    folder = three.server.artifacts / source.removeprefix("mlflow-artifacts:/")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    outside = {name for name in files if not name.startswith("code/")}
    assert outside == {
        "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "router_model.py", "input_example.json",
        "serving_input_example.json", "artifacts/front.safetensors",
        *(f"artifacts/router/{file.name}" for file in router_folder(three.runs[1].folder).iterdir()),
    }  # fmt: skip
    assert {Path(name).suffix for name in files if name.startswith("code/")} <= {".py", ".html", ".css", ".js"}
    assert [name for name, data in files.items() if data[:1] == b"\x80" or data[:2] == b"PK"] == []
    assert sum(len(data) for name, data in files.items() if name.startswith("code/")) < 2_000_000


LOADED = """
import base64, json, sys
import pandas as pd
from importlib.metadata import packages_distributions
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
text = json.load(open(sys.argv[2]))["inputs"]["image"][0]
answer = model.predict(pd.DataFrame({"image": [text, base64.b64decode(text)]}))
assert answer.loc[0].tolist() == answer.loc[1].tolist(), answer
import quee_core
owners = packages_distributions()
tops = {name.partition(".")[0] for name in sys.modules}
print(json.dumps({
    "core": quee_core.__file__, "columns": list(answer.columns),
    "loaded": sorted({owner.lower().replace("_", "-") for top in tops for owner in owners.get(top, ())}),
    "files": [module.__file__ for name, module in sys.modules.items() if name.startswith("quee_core")],
}))
"""


def test_serving_needs_no_quee_and_only_the_libraries_that_are_named(three: Registered) -> None:
    source = three.client.get_model_version_by_alias(MODEL, CHAMPION).source
    folder = three.server.artifacts / source.removeprefix("mlflow-artifacts:/")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(folder), str(folder / "serving_input_example.json")], capture_output=True,
        text=True, env=environment | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["core"] == str(folder / "code" / "quee_core" / "__init__.py")
    assert found["columns"] == ["label", "index", "probabilities", "path", "cost"]
    requirements = (folder / "requirements.txt").read_text().split()
    assert [each.partition("==")[0] for each in requirements] == list(SERVING)
    assert set(SERVING) <= set(found["loaded"])
    own = [folder / "router_model.py", *map(Path, found["files"])]
    imported = {name for path in own for name in imported_at_once(path)} - set(sys.stdlib_module_names)
    owners = packages_distributions()
    named = {name: {owner.lower().replace("_", "-") for owner in owners[name]} for name in imported - {"quee_core"}}
    assert [name for name, known in named.items() if not known & set(SERVING)] == []
    assert {"prefect", "distributed", "plotly", "typer"}.isdisjoint(found["loaded"])


def imported_at_once(path: Path) -> Iterator[str]:
    """Top-level names of what a module imports when it is itself imported."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.fixture(scope="module")
def serving(three: Registered, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    with ModelServer(f"models:/{MODEL}@{CHAMPION}", three.server.url, tmp_path_factory.mktemp("serve")) as server:
        yield server


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    dataset = load_dataset("fashion_mnist", None)
    return [dataset.image("test", k) for k in range(70)]  # more than go through the network together


@pytest.mark.parametrize("params", [{}, {"price": 0.3}, {"budget": 0.7}, {"budget": -1.0, "price": 0.02}])
def test_the_served_model_answers_as_the_router_in_process(
    serving: ModelServer, three: Registered, images: list[Image.Image], params: dict[str, float]
) -> None:
    deployed = load_router(router_folder(three.runs[1].folder))
    budget, price = params.get("budget", -1.0), params.get("price", 0.0)
    point = deployed.point_within(budget) if budget >= 0 else deployed.point_at(price)
    routed = deployed.router(torch.stack([deployed.preprocess(image) for image in images]), point.as_rule())
    status, answer = serving.ask(
        {"dataframe_split": {"columns": ["image"], "data": [[e] for e in encoded(images)]}, "params": params}
    )
    assert status == 200
    rows = answer["predictions"]
    assert [row["index"] for row in rows] == routed.label.tolist()
    assert [row["label"] for row in rows] == [deployed.manifest.class_names[k] for k in routed.label]
    assert [row["path"] for row in rows] == [routed.journeys[int(path)] for path in routed.path]
    assert [row["cost"] for row in rows] == pytest.approx(routed.cost.tolist(), rel=1e-12)
    np.testing.assert_allclose([row["probabilities"] for row in rows], routed.probabilities, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("rows", "params", "told"),
    [
        (["good", "AAAA"], {}, "row 1: image cannot be decoded: no image format that Pillow knows"),
        (["good", "good", "not base64!"], {}, "row 2: not base64"),
        (["cut"], {}, "row 0: image cannot be decoded"),
        (["good"], {"budget": 1e-6}, "budget 1e-06: the cheapest operating point costs"),
        (["good"], {"budget": 0.5, "price": 0.1}, "give one of the two"),
        (["good"], {"price": -1.0}, "price"),
    ],
)
def test_what_cannot_be_answered_is_the_callers_fault_and_named(
    serving: ModelServer, images: list[Image.Image], rows: list[str], params: dict[str, float], told: str
) -> None:
    (good,) = encoded(images[:1])
    texts = {"good": good, "cut": base64.b64encode(base64.b64decode(good)[:-60]).decode()}
    status, answer = serving.ask(
        {"dataframe_records": [{"image": texts.get(row, row)} for row in rows], "params": params}
    )
    assert status == 400
    assert answer["error_code"] == "INVALID_PARAMETER_VALUE"
    assert told in answer["message"]


def command(folder: Path, server: MlflowServer, *words: object) -> Any:
    done = quee(folder, "champion", *words, "--tracking-uri", server.url, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def test_a_hand_promotes_and_rolls_back(three: Registered, tmp_path: Path) -> None:
    def of(*words: object) -> Any:
        return command(tmp_path, three.server, *words)

    (shown,) = of("show", "fashion_mnist")
    run = three.runs[1]
    assert (shown["version"], shown["run"], shown["backbone"]) == ("2", run.record.name, run.record.backbone)
    assert shown["since"]
    assert f"{len(run.record.fronts[0].points)} operating points" in shown["front"]
    assert shown in of("show")

    promoted = of("promote", "fashion_mnist", 1)
    assert (promoted["version"], promoted["before"], promoted["how"]) == ("1", "2", "promoted by hand")
    assert three.champion() == "1"
    assert three.client.get_model_version(MODEL, "1").tags["quee.promoted"].endswith("by hand; before it version 2")
    assert of("promote", "fashion_mnist", 1)["before"] == "1"  # already: nothing to roll back to is added
    assert "(champion: version 1)" in three.again(1).line  # a rerun does not overrule the hand

    assert of("rollback", "fashion_mnist")["version"] == "2"
    assert of("rollback", "fashion_mnist")["version"] == "1"  # the first of all
    assert "no champion before the present one" in refused(
        tmp_path, "champion", "rollback", "fashion_mnist", "--tracking-uri", three.server.url
    )
    three.client.set_registered_model_alias(MODEL, CHAMPION, "2")  # in the UI, say
    (shown,) = of("show", "fashion_mnist")
    assert (shown["version"], shown["since"], shown["how"]) == ("2", None, "alias set by hand")
    assert of("rollback", "fashion_mnist")["version"] == "1"
    of("promote", "fashion_mnist", 2)
    assert json.loads(three.client.get_registered_model(MODEL).tags[HISTORY_TAG])[-1]["version"] == "2"


def test_what_champion_cannot_do_is_told(three: Registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = ("--tracking-uri", three.server.url)
    assert "no version 99; it has 1, 2" in refused(tmp_path, "champion", "promote", "fashion_mnist", 99, *at)
    assert "did you mean 'fashion_mnist'" in refused(tmp_path, "champion", "show", "fashion_mnits", *at)
    three.client.create_registered_model("quee-router-mine")
    assert "quee-router-mine: not quee's" in refused(tmp_path, "champion", "show", "mine", *at)
    assert {"fashion_mnist", "mine"} & {each["dataset"] for each in command(tmp_path, three.server, "show")} == {
        "fashion_mnist"
    }
    stranger = three.client.create_model_version(MODEL, "s3://bucket/stranger").version
    told = refused(tmp_path, "champion", "promote", "fashion_mnist", stranger, *at)
    assert f"version {stranger} was not registered by quee" in told
    three.client.delete_model_version(MODEL, stranger)
    assert "no MLflow database there; run a sweep first" in refused(tmp_path, "champion", "show")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    nowhere = f"http://me:sesame@127.0.0.1:{free_ports(1)[0]}"
    told = refused(tmp_path, "champion", "show", "--tracking-uri", nowhere)
    assert "no server answers there; start that server, or name another with --tracking-uri" in told
    assert "sesame" not in told
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nowhere)  # as MLflow's own commands take it
    assert refused(tmp_path, "champion", "show") == told


def test_a_model_of_that_name_that_is_not_ours_is_left_alone(
    three: Registered,
) -> None:
    run = three.runs[1]
    record = run.record.model_copy(update={"dataset": "taken"})
    three.client.create_registered_model("quee-router-taken")
    with pytest.raises(ConfigError, match="registered model quee-router-taken: not quee's"):
        registered(three.server, FinishedRun(run.sweep, record, run.folder))
    assert three.client.search_model_versions("name = 'quee-router-taken'") == []


def test_a_server_that_is_gone_is_told_in_one_line(three: Registered) -> None:
    run = three.runs[0]
    sweep = run.tracked_at(f"http://me:sesame@127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(ServerError, match=r"^MLflow at http://127\.0\.0\.1:\d+: no server answers there; the sweep is"):
        register.fn(sweep, run.record, run.folder, run.report, "run")
