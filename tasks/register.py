"""Registration: the sweep's router as a version of its data set's registered model, and champion if it is better."""

from pathlib import Path as FilePath
from tempfile import TemporaryDirectory

from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model
from mlflow.tracking import MlflowClient
from prefect import task
from prefect.cache_policies import NO_CACHE

from quee_core.champion import ServedFront, dataset_name, served_front
from quee_core.config import SweepConfig
from quee_core.evaluation import QUEE
from quee_core.locks import alone
from quee_core.record import Registration, StageTiming, SweepRecord
from quee_core.runs import TRACKING_LOCK, record_digest, router_folder, write_registration
from quee_core.tracked import front_summary, tags_of
from tasks.mlflow_server import client_of, experiment_of, gives_no_answer, mlflow_faults, sweep_advice, tracking_of
from tasks.progress import advance, stage
from tasks.registry import RouterRegistry
from tasks.retries import PATIENT
from tasks.router_package import FRONT, package_router
from tasks.succession import judge
from tasks.track import DIGEST_TAG

STAGE = "register the router"
VERDICT_TAG = "quee.verdict"
MODEL = "router"


@task(task_run_name="register-{record.name}", cache_policy=NO_CACHE, **PATIENT)
def register(
    sweep: SweepConfig, record: SweepRecord, folder: FilePath, report: FilePath, run: str
) -> tuple[Registration, StageTiming]:
    """Register the router of a tracked sweep, whose parent run is `run`, and settle who is champion.

    The same record is registered and judged once. Raises ServerError if MLflow, or the disk, fails.
    """
    uri, artifacts = tracking_of(sweep)
    with (
        stage(STAGE, 1, "routers") as work,
        mlflow_faults(uri, sweep_advice(report)),
        alone(folder / TRACKING_LOCK),
    ):
        client = client_of(uri)
        registry = RouterRegistry(client)
        dataset = dataset_name(record.dataset, record.config)
        model = registry.ensure(dataset).name
        digest = record_digest(record)
        own: ServedFront | None = None
        version = _registered(client, model, digest)
        work.count(computed=version is None, reused=version is not None)
        if version is None:
            own = served_front(record, folder)
            experiment = experiment_of(client, record, artifacts)
            logged = _logged(client, experiment, digest) or _log(client, experiment, record, folder, own, run, digest)
            created = _create_version(client, model, logged, record, own, run, digest)
            version = _first(client, model, digest, created)
        if (verdict := version.tags.get(VERDICT_TAG)) is None:
            verdict, last = judge(registry, uri, dataset, str(version.version), own or served_front(record, folder))
            if last:
                client.set_model_version_tag(model, version.version, VERDICT_TAG, verdict)
        champion = registry.champion(dataset)
        number = str(version.version)
        crowned = champion is not None and champion.version == number
        now = "champion" if crowned else f"champion: version {champion.version if champion else 'none'}"
        registration = Registration(
            model=model, version=int(number), champion=crowned, line=f"{model} version {number} ({now}): {verdict}"
        )
        write_registration(registration, folder)
        advance(STAGE, 1)
    return registration, work.timing()


def _registered(client: MlflowClient, model: str, digest: str) -> ModelVersion | None:
    """The version of the same findings, if there is one: the first, should two processes have made one each."""
    found = client.search_model_versions(f"name = '{model}' and tags.`{DIGEST_TAG}` = '{digest}'")
    return min(found, key=lambda version: int(version.version), default=None)


def _logged(client: MlflowClient, experiment: str, digest: str) -> LoggedModel | None:
    """A whole model of the same findings that a killed process had logged, but not registered."""
    found = client.search_logged_models([experiment], f"tags.`{DIGEST_TAG}` = '{digest}'")
    return next((model for model in found if model.status == "READY"), None)


def _log(
    client: MlflowClient,
    experiment: str,
    record: SweepRecord,
    folder: FilePath,
    front: ServedFront,
    run: str,
    digest: str,
) -> LoggedModel:
    """Log the model's files; it is ready once all of them are there."""
    logged = client.create_logged_model(
        experiment, MODEL, source_run_id=run, tags=tags_of(record) | {DIGEST_TAG: digest}, model_type=MODEL
    )
    try:
        with TemporaryDirectory() as scratch:
            (FilePath(scratch) / FRONT).write_bytes(front.to_bytes())
            model = Model(
                artifact_path=logged.artifact_location, model_uuid=logged.model_id, run_id=run,
                model_id=logged.model_id,
            )  # fmt: skip
            made = package_router(router_folder(folder), FilePath(scratch) / FRONT, FilePath(scratch) / "model", model)
            client.log_model_artifacts(logged.model_id, str(made))
    except BaseException as error:
        if not gives_no_answer(error):
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.log_outputs(run, [LoggedModelOutput(logged.model_id, step=0)])
    return client.finalize_logged_model(logged.model_id, "READY")


def _create_version(
    client: MlflowClient,
    model: str,
    logged: LoggedModel,
    record: SweepRecord,
    front: ServedFront,
    run: str,
    digest: str,
) -> ModelVersion:
    (quee,) = (each for each in record.fronts if each.method == QUEE)
    return client.create_model_version(
        model,
        logged.artifact_location,  # a models:/ address would be looked up at the process's default server
        run,
        tags=tags_of(record)
        | {
            DIGEST_TAG: digest,
            "quee.run": record.name,
            "quee.front": front_summary(quee),
            "quee.test_images": f"{len(front.sample_ids)}, {front.images[:16]}",
        },
        model_id=logged.model_id,
    )


def _first(client: MlflowClient, model: str, digest: str, created: ModelVersion) -> ModelVersion:
    """The first version of the same findings; the one just created is removed if another process was quicker."""
    first = _registered(client, model, digest) or created
    if first.version != created.version:
        client.delete_model_version(model, created.version)
    return first
