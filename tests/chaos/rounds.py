"""Rounds of chaos: a sweep, hindered at a random moment and run again, and what must hold of it then."""

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from quee_core.record import SweepRecord
from quee_core.runs import read_record, record_digest
from tasks.registry import CHAMPION, history
from tasks.track import DIGEST_TAG, PARENT_TAG
from tests.chaos.commands import Command, DeployedRun, SweepCommand
from tests.chaos.hindrances import HINDRANCES, Hindrance, Scene
from tests.chaos.moments import Course
from tests.chaos.small_disk import mount
from tests.chaos.store_files import AWAY, FilesOnDisk, FilesOnS3, Shown, StoreFiles, whole_entries
from tests.chaos.surroundings import Surroundings
from tests.chaos.watcher import Watcher
from tests.quee_command import computed, write_sweep
from tests.test_sweep_s3 import figures

FINISHED = ("exit 0", "completed")
READY = 60.0  # seconds
MODEL = "quee-router-fashion_mnist"
SLOW = {"name": "mlp", "options": {"epochs": 30, "patience": 30, "batch": 8}}
PREDICTORS = [SLOW, {"name": "logistic"}, {"name": "nearest_cluster", "options": {"clusters": 5}}]
HEAD = f"{'round':>5} {'seed':>6}  {'hindered':<24} {'moment':<34} {'ended':<13} {'there':>5} {'again':>5} {'s':>5}"


@dataclass(frozen=True)
class Row:
    """One round. there: whole cells before the second run. again: cells that it computed. wrong: what must not be."""

    number: int
    seed: int
    hindered: str
    moment: str
    ended: str
    there: int
    again: int
    seconds: float
    missed: bool  # whether the sweep was over before anything befell it
    silent: bool  # whether nobody was left to tell Prefect's server how the disturbed one ended
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        ended = f"{self.ended}{' before' if self.missed else ''}"
        line = (
            f"{self.number:>5} {self.seed:>6}  {self.hindered:<24} {self.moment:<34} {ended:<13} "
            f"{self.there:>5} {self.again:>5} {self.seconds:>5.0f}"
        )
        return "\n".join([line, *(f"      round {self.number}, seed {self.seed}: {each}" for each in self.wrong)])


class Rounds:
    """Rounds in one set of surroundings, each with a store, a folder and findings of its own."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._client = MlflowClient(tracking_uri=around.mlflow.url, registry_uri=around.mlflow.url)
        self.reference, self.course = self._undisturbed()
        self.cells = self.course.kinds["table"]

    def run(self, number: int, seed: int) -> Row:
        """The round of a seed, whose last digit says what befalls it."""
        started = time.monotonic()
        rng = random.Random(seed)
        hindrance = HINDRANCES[seed % len(HINDRANCES)]
        folder, files = self._prepared(f"round-{number}-{seed}", hindrance)
        moment = self.course.moment(rng.choice(hindrance.stages), rng, dask=not hindrance.on_disk)
        units = self._around.dask.mark()
        with Watcher(files) as watcher:
            first = self._command(folder, "first", hindrance)
            if hit := moment.wait(watcher, lambda: first.running):
                hindrance.hinder(Scene(self._around, folder, first, files, watcher, rng))
            ended = None if hindrance.silent else first.ended()
            before = self._whole(files)
            unfinished = self._unfinished(units)
            again = self._command(folder, "again", hindrance)
            ended_again, ended = again.ended(), ended or first.ended()
            after = self._whole(files)
        wrong = [f"the store: {each}" for each in watcher.violations]
        missed = ended in FINISHED and (not hit or ended not in hindrance.endings)
        if ended not in hindrance.endings and not missed:
            wrong.append(f"the disturbed sweep ended with {ended!r}: {first.said[-2000:]}")
        if "Traceback" in first.said + again.said:
            wrong.append(f"a traceback: {(first.said + again.said)[-3000:]}")
        there = sum(entry.kind == "table" for entry in before)
        recomputed = -1
        if ended_again not in FINISHED:
            wrong.append(f"the second run ended with {ended_again!r}: {again.said[-2000:]}")
        else:
            record = read_record(folder / "runs" / "small" / "record.json")
            recomputed = computed(record, "extract")
            wrong += self._not_the_same(record)
            wrong += [f"{entry.manifest} was written again" for entry in before if after.get(entry) != before[entry]]
            if recomputed != self.cells - there:
                wrong.append(f"{there} cells of {self.cells} were there, and {recomputed} were computed")
            wrong += self._units_twice(units, unfinished)
            wrong += self._wrong_in_mlflow(record)
        return Row(
            number, seed, hindrance.name, str(moment), ended, there, recomputed, time.monotonic() - started,
            missed, hindrance.silent or ended == "killed", tuple(wrong),
        )  # fmt: skip

    def at_once(self, processes: int) -> list[str]:
        """What is wrong when as many processes as that compute the same sweep in the same folder at once."""
        folder, files = self._prepared("at-once", HINDRANCES[0])
        with Watcher(files) as watcher:
            commands = [SweepCommand(self._around, folder, f"process-{number}") for number in range(processes)]
            endings = [command.ended() for command in commands]
        wrong = [f"the store: {each}" for each in watcher.violations]
        for command, ended in zip(commands, endings, strict=True):
            if ended != "exit 0" or "Traceback" in command.said:
                wrong.append(f"one of them ended with {ended!r}: {command.said[-3000:]}")
        record = read_record(folder / "runs" / "small" / "record.json")
        kinds = Counter(entry.kind for entry in self._whole(files))
        if kinds != self.course.kinds:
            wrong.append(f"they published {kinds}, one alone {self.course.kinds}")
        return [*wrong, *self._not_the_same(record), *self._wrong_in_mlflow(record)]

    def _undisturbed(self) -> tuple[SweepRecord, Course]:
        """A sweep that nothing befalls."""
        folder, files = self._prepared("undisturbed", HINDRANCES[0])
        with Watcher(files) as watcher:
            started, first, last, entries = time.monotonic(), 0.0, 0.0, 0
            command = SweepCommand(self._around, folder, "only")
            while command.running:
                if watcher.entries > entries:
                    last, entries = time.monotonic(), watcher.entries
                    first = first or last
                time.sleep(0.01)
            ended, over = command.ended(), time.monotonic()
        assert ended == "exit 0", command.said
        assert watcher.violations == []
        record = read_record(folder / "runs" / "small" / "record.json")
        assert all(row.failure is None for row in record.grid)
        kinds = Counter(entry.kind for entry in self._whole(files))
        return record, Course(kinds, first - started, over - last)

    def _prepared(self, name: str, hindrance: Hindrance) -> tuple[Path, StoreFiles]:
        """A folder with a sweep of its own, and its store."""
        folder = self._around.folder / "rounds" / name
        folder.mkdir(parents=True)
        if hindrance.small_disk and mount(folder):
            self._around.disks.append(folder)
        files: StoreFiles = (
            FilesOnDisk(folder / "store") if hindrance.on_disk else FilesOnS3(self._around.environment, name)
        )
        run: dict[str, Any] = {"store": files.url, "mlflow_uri": self._around.mlflow.url}
        if not hindrance.on_disk:
            run["dask"] = self._around.dask.address
        write_sweep(folder, run=run, predictors=PREDICTORS, targets={"clusters": [None, 3, 5]})
        return folder, files

    def _whole(self, files: StoreFiles) -> dict[Shown, tuple[str, str]]:
        """What is visible and whole; S3 that has just been started again may need some more seconds."""
        deadline = time.monotonic() + READY
        while True:
            try:
                return dict(whole_entries(files))
            except AWAY:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def _command(self, folder: Path, name: str, hindrance: Hindrance) -> Command:
        return (DeployedRun if hindrance.deployed else SweepCommand)(self._around, folder, name)

    def _not_the_same(self, record: SweepRecord) -> Iterator[str]:
        if figures(record) != figures(self.reference):
            yield "its fronts are not those of an undisturbed sweep"
        if failed := [row.described for row in record.grid if row.failure is not None]:
            yield f"grid points failed: {failed}"

    def _unfinished(self, since: Mapping[str, int]) -> Counter[str]:
        """Units that workers have begun and not finished: they may end, unseen, while the second run does them."""
        return Counter(unit for unit, _ in self._around.dask.started(since)) - Counter(
            self._around.dask.computed(since)
        )

    def _units_twice(self, since: Mapping[str, int], unfinished: Counter[str]) -> list[str]:
        times = Counter(self._around.dask.computed(since))
        return [f"computed {n} times: {unit}" for unit, n in times.items() if n > 1 + (unit in unfinished)]

    def _wrong_in_mlflow(self, record: SweepRecord) -> Iterator[str]:
        """One finished run and one version for the findings, nothing left running, and a champion that is one."""
        runs = self._runs()
        if left := [run.info.run_name for run in runs if run.info.status == "RUNNING"]:
            yield f"left running in MLflow: {left}"
        digest = record_digest(record)
        parents = [run for run in runs if run.data.tags.get(DIGEST_TAG) == digest and run.info.status == "FINISHED"]
        if len(parents) != 1:
            yield f"{len(parents)} finished runs of the same findings in MLflow"
        else:
            own = parents[0].info.run_id
            children = [run for run in runs if run.data.tags.get(PARENT_TAG) == own]
            if sorted(run.info.status for run in children) != ["FINISHED"] * len(record.grid):
                yield f"{len(children)} runs of grid points for {len(record.grid)} points, or not all finished"
        versions = self._client.search_model_versions(f"name = '{MODEL}' and tags.`{DIGEST_TAG}` = '{digest}'")
        if len(versions) != 1:
            yield f"{len(versions)} registered versions of the same findings"
        model = self._client.get_registered_model(MODEL)
        crowned = self._client.get_model_version_by_alias(MODEL, CHAMPION)
        reigns = history(model)
        if not reigns or reigns[-1].version != str(crowned.version) or DIGEST_TAG not in crowned.tags:
            yield f"the champion is version {crowned.version}, the history says {reigns[-1:]}"

    def _runs(self) -> list[Run]:
        experiments = [each.experiment_id for each in self._client.search_experiments()]
        found: list[Run] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(experiments, max_results=5000, page_token=token)
            found += page
            if not (token := page.token):
                return found
