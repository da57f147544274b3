"""Tracking in MLflow: a parent run for each sweep, a child for each grid point, figures and tables (design, 13)."""

import logging
import time
from pathlib import Path as FilePath

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient
from prefect import task
from prefect.cache_policies import NO_CACHE

from quee_core.config import SweepConfig
from quee_core.record import GridRow, StageTiming, SweepRecord
from quee_core.report.figures import all_figures
from tasks.progress import advance, stage

STAGE = "track in MLflow"


@task(task_run_name="track-{record.name}", cache_policy=NO_CACHE)
def track(sweep: SweepConfig, record: SweepRecord, folder: FilePath, report: FilePath) -> tuple[str, StageTiming]:
    """Log a finished sweep; returns the parent run's id. Finished runs are logged once: the same record adds none."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri, artifacts = tracking_of(sweep)
    with stage(STAGE, len(record.grid) + 1, "runs") as work:
        client = MlflowClient(tracking_uri=uri)
        experiment = _experiment(client, f"{record.backbone} on {record.dataset}", artifacts)
        parent = client.create_run(experiment, run_name=record.name, tags=_tags(record))
        client.log_batch(parent.info.run_id, metrics=_front_metrics(record), params=_params(record))
        figures = folder / "figures"
        figures.mkdir(parents=True, exist_ok=True)
        for name, figure in all_figures(record).items():
            figure.write_html(figures / f"{name}.html", include_plotlyjs=True)
        client.log_artifacts(parent.info.run_id, str(figures), "figures")
        client.log_artifact(parent.info.run_id, str(report))
        client.log_dict(parent.info.run_id, record.model_dump(mode="json"), "record.json")
        advance(STAGE, 1)
        for row in record.grid:
            _log_point(client, experiment, parent.info.run_id, row)
            advance(STAGE, 1)
        client.set_terminated(parent.info.run_id)
        work.count(computed=len(record.grid) + 1)
    return parent.info.run_id, work.timing()


def tracking_of(sweep: SweepConfig) -> tuple[str, str | None]:
    """Tracking URI and artifact folder: those of the sweep, or SQLite and a folder below the runs."""
    if sweep.run.mlflow_uri is not None:
        return sweep.run.mlflow_uri, None
    root = sweep.run.runs.resolve()
    root.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{root / 'mlflow.db'}", (root / "mlartifacts").as_uri()


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=artifacts))
    except mlflow.exceptions.MlflowException:
        found = client.get_experiment_by_name(name)  # another process made it first
        if found is None:
            raise
        return str(found.experiment_id)


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
