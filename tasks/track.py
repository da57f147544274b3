"""Tracking in MLflow: a parent run for each sweep, a child for each grid point, figures and tables (design, 13)."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from prefect import task
from prefect.cache_policies import NO_CACHE
from sqlalchemy.exc import SQLAlchemyError

from quee_core.config import SweepConfig
from quee_core.errors import ServerError
from quee_core.fingerprints import fingerprint
from quee_core.record import GridRow, StageTiming, SweepRecord
from quee_core.redaction import without_credentials
from quee_core.report.figures import all_figures
from tasks.progress import advance, stage

STAGE = "track in MLflow"
DIGEST_TAG = "quee.record"


@task(task_run_name="track-{record.name}", cache_policy=NO_CACHE)
def track(sweep: SweepConfig, record: SweepRecord, folder: FilePath, report: FilePath) -> tuple[str, StageTiming]:
    """Log a finished sweep; returns the parent run's id. Finished runs are logged once: the same record adds none.

    Raises ServerError if MLflow, or the disk, fails.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri, artifacts = tracking_of(sweep)
    with stage(STAGE, len(record.grid) + 1, "runs") as work, _tracking_faults(uri, report):
        client = MlflowClient(tracking_uri=uri)
        experiment = _experiment(client, f"{record.backbone} on {record.dataset}", artifacts)
        digest = _digest(record)
        if (known := _tracked(client, experiment, digest)) is not None:
            advance(STAGE, len(record.grid) + 1)
            work.count(reused=len(record.grid) + 1)
        else:
            tags = _tags(record) | {DIGEST_TAG: digest}
            known = client.create_run(experiment, run_name=record.name, tags=tags).info.run_id
            with _ended(client, known):
                _log_parent(client, known, record, folder / "figures", report)
                advance(STAGE, 1)
                for row in record.grid:
                    _log_point(client, experiment, known, row)
                    advance(STAGE, 1)
            work.count(computed=len(record.grid) + 1)
    return known, work.timing()


def tracking_of(sweep: SweepConfig) -> tuple[str, str | None]:
    """Tracking URI and artifact folder: those of the sweep, or SQLite and a folder below the runs."""
    if sweep.run.mlflow_uri is not None:
        return sweep.run.mlflow_uri, None
    root = sweep.run.runs.resolve()
    root.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{root / 'mlflow.db'}", (root / "mlartifacts").as_uri()


def run_address(sweep: SweepConfig, run: str) -> str | None:
    """Where a browser finds a tracked run; None where no server tracks."""
    uri, _ = tracking_of(sweep)
    if not uri.startswith(("http://", "https://")):
        return None
    experiment = MlflowClient(tracking_uri=uri).get_run(run).info.experiment_id
    return f"{without_credentials(uri).rstrip('/')}/#/experiments/{experiment}/runs/{run}"


@contextmanager
def _tracking_faults(uri: str, report: FilePath) -> Iterator[None]:
    """Tell a failure of MLflow in one line, and that nothing but the tracking is lost."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise ServerError(
            f"MLflow at {uri}: {str(error).splitlines()[0]}; the sweep is finished, its report is {report}; "
            "mend this and run the same command again to track it"
        ) from error


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException:
        found = client.get_experiment_by_name(name)  # another process made it first
        if found is None:
            raise
        return str(found.experiment_id)


def _digest(record: SweepRecord) -> str:
    """Fingerprint of what a sweep found, whenever and however fast it found it."""
    return fingerprint(record.model_dump(mode="json", exclude={"created", "timings"}))


def _tracked(client: MlflowClient, experiment: str, digest: str) -> str | None:
    """The finished parent run of the same findings, if there is one."""
    runs = client.search_runs(
        [experiment], f"tags.`{DIGEST_TAG}` = '{digest}' and attributes.status = 'FINISHED'", max_results=1
    )
    return str(runs[0].info.run_id) if runs else None


@contextmanager
def _ended(client: MlflowClient, run: str) -> Iterator[None]:
    """Mark `run` as finished, or as failed or killed if logging to it ends otherwise: none is left running."""
    try:
        yield
    except BaseException as error:
        client.set_terminated(run, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    client.set_terminated(run)


def _log_parent(client: MlflowClient, run: str, record: SweepRecord, figures: FilePath, report: FilePath) -> None:
    client.log_batch(run, metrics=_front_metrics(record), params=_params(record))
    figures.mkdir(parents=True, exist_ok=True)
    for name, figure in all_figures(record).items():
        figure.write_html(figures / f"{name}.html", include_plotlyjs=True)
    client.log_artifacts(run, str(figures), "figures")
    client.log_artifact(run, str(report))
    client.log_dict(run, record.model_dump(mode="json"), "record.json")


def _tags(record: SweepRecord) -> dict[str, str]:
    return {
        "quee.backbone": record.backbone,
        "quee.dataset": record.dataset,
        "quee.bits": "-".join(map(str, record.bits)),
        "quee.exits": "-".join(map(str, record.exits)),
        "quee.code_version": record.code_version,
        "quee.cost_unit": record.cost_unit,
    }


def _params(record: SweepRecord) -> list[Param]:
    flat = {f"{section}.{k}": v for section, of in record.config.items() if isinstance(of, dict) for k, v in of.items()}
    return [Param(name, str(value)[:500]) for name, value in flat.items()][:100]


def _front_metrics(record: SweepRecord) -> list[Metric]:
    """Hypervolumes, accuracy at budgets, and the fronts as metrics stepped by cost in thousandths."""
    now = int(time.time() * 1000)
    metrics = [Metric(f"hypervolume_{front.method}", front.hypervolume, now, 0) for front in record.fronts]
    metrics += [Metric(f"accuracy_at_{row.budget:g}", row.accuracy, now, 0) for row in record.budgets]
    metrics += [
        Metric(f"front_{front.method}", point.accuracy, now, round(1000 * point.cost))
        for front in record.fronts
        for point in front.points
    ]
    return metrics[:1000]


def _log_point(client: MlflowClient, experiment: str, parent: str, row: GridRow) -> None:
    name = f"{row.point['predictor']}, {row.point['features']}, K = {row.point['clusters'] or '∞'}"
    tags = {"mlflow.parentRunId": parent, "quee.winner": str(row.winner).lower()}
    run = client.create_run(experiment, run_name=name, tags=tags)
    now = int(time.time() * 1000)
    measured = {"rmse": row.rmse, "brier": row.brier, "ece": row.ece, "select_hypervolume": row.hypervolume}
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(k, v, now, 0) for k, v in measured.items() if v is not None],
        params=[Param(k, str(v)) for k, v in row.point.items()],
        tags=[] if row.failure is None else [RunTag("quee.failure", row.failure)],
    )
    client.set_terminated(run.info.run_id, "FINISHED" if row.failure is None else "FAILED")
