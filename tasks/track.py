"""Tracking in MLflow: a parent run for each sweep, a child for each grid point, figures and tables (design, 13)."""

import csv
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path as FilePath
from tempfile import TemporaryDirectory

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.tracking import MlflowClient
from prefect import task
from prefect.cache_policies import NO_CACHE

from quee_core.config import SweepConfig
from quee_core.locks import alone
from quee_core.record import GridRow, StageTiming, SweepRecord, images_key
from quee_core.redaction import redacted, without_secrets
from quee_core.report.figures import all_figures
from quee_core.runs import TRACKING_LOCK, record_digest
from quee_core.tracked import Row, metrics_of, params_of, tables_of, tags_of
from tasks.figure_image import write_image
from tasks.mlflow_server import client_of, ended, experiment_of, mlflow_faults, sweep_advice, tracking_of
from tasks.progress import advance, stage
from tasks.retries import PATIENT

STAGE = "track in MLflow"
DIGEST_TAG = "quee.record"
PARENT_TAG = "mlflow.parentRunId"
LONGEST = 3600.0  # seconds that tracking may take: thousands of grid points take minutes
AT_ONCE = 8  # children logged together over HTTP, where each request waits; a SQLite file has one writer


@task(task_run_name="track-{record.name}", cache_policy=NO_CACHE, **PATIENT)
def track(sweep: SweepConfig, record: SweepRecord, folder: FilePath, report: FilePath) -> tuple[str, StageTiming]:
    """Log a finished sweep; returns the parent run's id. Finished runs are logged once: the same record adds none.

    What killed processes left running is ended first, as killed: runs of the same record, and any that are older than
    `LONGEST`. Raises ServerError if MLflow, or the disk, fails.
    """
    uri, artifacts = tracking_of(sweep)
    with (
        stage(STAGE, len(record.grid) + 1, "runs") as work,
        mlflow_faults(uri, sweep_advice(report)),
        alone(folder / TRACKING_LOCK),
    ):
        client = client_of(uri)
        experiment = experiment_of(client, record, artifacts)
        digest = record_digest(record)
        _end_abandoned(client, experiment, digest)
        if (known := _tracked(client, experiment, digest)) is not None:
            advance(STAGE, len(record.grid) + 1)
            work.count(reused=len(record.grid) + 1)
        else:
            tags = tags_of(record) | {DIGEST_TAG: digest}
            known = client.create_run(experiment, run_name=record.name, tags=tags).info.run_id
            with ended(client, known):
                _log_parent(client, known, record, folder / "figures", report, pictures=sweep.run.pictures)
                advance(STAGE, 1)
                _log_points(client, experiment, known, record.grid, AT_ONCE if uri.startswith("http") else 1)
            work.count(computed=len(record.grid) + 1)
    return known, work.timing()


def add_figures(sweep: SweepConfig, record: SweepRecord, figures: FilePath) -> str | None:
    """Log the folder `figures` to the finished run of `record`; its id, None where MLflow knows of none."""
    uri, artifacts = tracking_of(sweep)
    with mlflow_faults(uri, f"the figures are in {figures}"):
        client = client_of(uri)
        known = _tracked(client, experiment_of(client, record, artifacts), record_digest(record))
        if known is not None:
            client.log_artifacts(known, str(figures), f"figures/{figures.name}")
    return known


def _tracked(client: MlflowClient, experiment: str, digest: str) -> str | None:
    """The finished parent run of the same findings, if there is one."""
    runs = client.search_runs(
        [experiment], f"tags.`{DIGEST_TAG}` = '{digest}' and attributes.status = 'FINISHED'", max_results=1
    )
    return str(runs[0].info.run_id) if runs else None


def _end_abandoned(client: MlflowClient, experiment: str, digest: str) -> None:
    """End as killed what nobody will end: runs of the same findings, runs of other findings that are old, children."""
    before = int((time.time() - LONGEST) * 1000)
    parents = client.search_runs([experiment], f"tags.`{DIGEST_TAG}` = '{digest}'")
    old = f"tags.`{DIGEST_TAG}` LIKE '%' and attributes.status = 'RUNNING' and attributes.start_time < {before}"
    parents += client.search_runs([experiment], old)
    abandoned = [run for run in parents if run.info.status == "RUNNING"]
    for parent in parents:
        wanted = f"tags.`{PARENT_TAG}` = '{parent.info.run_id}' and attributes.status = 'RUNNING'"
        abandoned += client.search_runs([experiment], wanted)
    for run in {run.info.run_id for run in abandoned}:
        client.set_terminated(run, "KILLED")


def _log_parent(
    client: MlflowClient, run: str, record: SweepRecord, figures: FilePath, report: FilePath, *, pictures: bool
) -> None:
    now = int(time.time() * 1000)
    client.log_batch(  # in as many requests as it takes
        run,
        metrics=[Metric(name, value, now, step) for name, value, step in metrics_of(record)],
        params=[Param(name, value) for name, value in params_of(record).items()],
    )
    client.log_inputs(run, _inputs(record))
    with TemporaryDirectory() as scratch:
        _write_tables(tables_of(record), FilePath(scratch) / "tables")
        plain = json.dumps(redacted(record.model_dump(mode="json")), indent=2)
        (FilePath(scratch) / "record.json").write_text(plain, "utf-8")
        client.log_artifacts(run, scratch)
    _write_figures(record, figures, pictures=pictures)
    client.log_artifacts(run, str(figures), "figures")
    client.log_artifact(run, str(report))


def _inputs(record: SweepRecord) -> list[DatasetInput]:
    """The splits as MLflow's data sets: images, number and digest of each."""
    config = record.config.get("dataset", {})
    source = {"name": record.dataset, "root": config.get("root"), "url": config.get("url"), "seed": config.get("seed")}
    return [
        DatasetInput(
            Dataset(
                name=f"{record.dataset}, {split}",
                digest=digest[:16],
                source_type="quee",
                source=without_secrets(json.dumps({**source, "split": split})),
                profile=json.dumps({"num_rows": rows, "fingerprint": digest}),
            ),
            tags=[InputTag("mlflow.data.context", split)],
        )
        for split, rows in record.splits.items()
        if (digest := record.fingerprints.get(images_key(split))) is not None
    ]


def _write_tables(tables: Mapping[str, Sequence[Row]], folder: FilePath) -> None:
    """As CSV, which MLflow shows as tables."""
    folder.mkdir()
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)


def _write_figures(record: SweepRecord, folder: FilePath, *, pictures: bool) -> None:
    """As pages that need no network, the front as a picture too if asked and possible; an earlier record's go."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = all_figures(record)
    for old in folder.iterdir():
        if old.is_file():
            old.unlink()
    for name, figure in figures.items():
        figure.write_html(folder / f"{name}.html", include_plotlyjs=True)
    if pictures:
        write_image(figures["front"], folder / "front.png")


def _log_points(client: MlflowClient, experiment: str, parent: str, rows: Sequence[GridRow], at_once: int) -> None:
    with ThreadPoolExecutor(at_once) as threads:
        pending = [threads.submit(_log_point, client, experiment, parent, row) for row in rows]
        try:
            for done in as_completed(pending):
                done.result()
                advance(STAGE, 1)
        except BaseException:
            threads.shutdown(cancel_futures=True)  # those that have begun end their run themselves
            raise


def _log_point(client: MlflowClient, experiment: str, parent: str, row: GridRow) -> None:
    """Three requests: a run, all that is known of it, its end."""
    name = f"{row.point['predictor']}, {row.point['features']}, K = {row.point['clusters'] or '∞'}"
    tags = {PARENT_TAG: parent, "quee.winner": str(row.winner).lower()}
    if row.failure is not None:
        tags["quee.failure"] = row.failure
    run = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    now = int(time.time() * 1000)
    measured = {
        "rmse": row.rmse, "brier": row.brier, "ece": row.ece, "select_hypervolume": row.hypervolume,
        "fit_seconds": row.seconds,
    }  # fmt: skip
    with ended(client, run, "FINISHED" if row.failure is None else "FAILED"):
        client.log_batch(
            run,
            metrics=[Metric(k, v, now, 0) for k, v in measured.items() if v is not None],
            params=[Param(k, str(v)) for k, v in row.point.items()],
        )
