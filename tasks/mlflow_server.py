"""Where MLflow is, how its faults are told, and the experiment of a sweep."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from quee_core.config import SweepConfig
from quee_core.errors import ServerError, ServerUnreachableError
from quee_core.finetune_config import FinetuneConfig
from quee_core.record import SweepRecord
from quee_core.redaction import without_secrets
from quee_core.s3_place import may_pass
from quee_core.whole_files import check_room

DATABASE = "mlflow.db"
ARTIFACTS_ROOM = 16_000_000  # bytes of a sweep's figures and router
# MLflow reads them from the environment alone; the first prints a line, and asks the server, for each run that ends
_QUIET = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}

_UNSAFE = "no safe connection to it, by its certificate or ours"
_FAULTY = "it answers with errors of its own, time and again"
_CAUSES = {  # urllib3's names
    "NewConnectionError": "no server answers there",
    "NameResolutionError": "its host is not found",
    "SSLError": _UNSAFE,
    "ResponseError": _FAULTY,
}


def tracking_of(sweep: SweepConfig | FinetuneConfig) -> tuple[str, str | None]:
    """Tracking URI, and place of artifacts of new experiments (None: the server's own).

    Those of the run, or SQLite and a folder below the runs.
    """
    asked = sweep.run.artifacts
    artifacts = asked if asked is None or "://" in asked else FilePath(asked).resolve().as_uri()
    if sweep.run.mlflow_uri is not None:
        return sweep.run.mlflow_uri, artifacts
    root = sweep.run.runs.resolve()
    root.mkdir(parents=True, exist_ok=True)
    return database_uri(root), artifacts or (root / "mlartifacts").as_uri()


def check_artifacts(sweep: SweepConfig) -> None:
    """See that `run.artifacts`, where the sweep has one, can be used: MLflow needs it hours after the start.

    Raises ServerError for a URL that MLflow cannot list, StoreError for a folder that cannot be written.
    """
    asked = sweep.run.artifacts
    if asked is None:
        return
    if "://" not in asked:
        check_room(FilePath(asked), ARTIFACTS_ROOM)
        return
    with mlflow_faults(asked, "correct run.artifacts, or make that place"):
        get_artifact_repository(asked, tracking_uri=tracking_of(sweep)[0]).list_artifacts()


def database_uri(runs: FilePath) -> str:
    """Tracking URI of the SQLite file in a folder of runs."""
    return f"sqlite:///{runs.resolve() / DATABASE}"


def run_address(sweep: SweepConfig, record: SweepRecord, run: str, pages: str | None = None) -> str | None:
    """Where a browser finds a tracked run; None where no server shows it. Raises ServerError if it does not answer.

    pages: MLflow's address for browsers, where that is another than the one it is tracked at.
    """
    uri, artifacts = tracking_of(sweep)
    shown = pages or uri
    if not shown.startswith(("http://", "https://")):
        return None
    with mlflow_faults(uri, "the sweep is finished and tracked"):
        experiment = experiment_of(client_of(uri), record, artifacts)
    return f"{without_secrets(shown).rstrip('/')}/#/experiments/{experiment}/runs/{run}"


@contextmanager
def mlflow_faults(uri: str, advice: str) -> Iterator[None]:
    """Turn a failure of MLflow, or of the disk, into a ServerError of one line that ends with `advice`.

    ServerUnreachableError where the server does not answer.
    """
    try:
        yield
    except (MlflowException, SQLAlchemyError, BotoCoreError, ClientError, Boto3Error, OSError) as error:
        why = _given_up(error) or (str(error) or type(error).__name__).splitlines()[0]
        kind = ServerUnreachableError if passes(error) else ServerError
        raise kind(without_secrets(f"MLflow at {uri}: {why}; {advice}")) from error


def passes(error: BaseException) -> bool:
    """Whether a failure may pass: of MLflow's server, or of the S3 server that it keeps files on."""
    given_up = _given_up(error)
    if given_up is not None:
        return given_up != _UNSAFE
    return any(each is not None and may_pass(each) for each in (error, error.__cause__, error.__context__))


def gives_no_answer(error: BaseException) -> bool:
    """Whether MLflow's client has given up on a server that is away, which then takes no word of the failure either."""
    return _given_up(error) not in (None, _UNSAFE, _FAULTY)


def _given_up(error: BaseException) -> str | None:
    """Why MLflow's client stopped trying, if it did; what else it says is urllib3's, which names the address thrice."""
    told = str(error)
    if not any(said in told for said in ("Max retries exceeded", "Connection aborted")):
        return None
    return next((why for cause, why in _CAUSES.items() if cause in told), "the server breaks off")


def sweep_advice(report: FilePath) -> str:
    """That nothing but the tracking is lost."""
    return (
        f"the sweep is finished, its report is {report}; mend this and run the same command again to track and "
        "register it"
    )


def client_of(uri: str) -> MlflowClient:
    """A client of the server or database at `uri`; its libraries log no more than what went wrong."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a retry is no news, a failure is told
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def ended(client: MlflowClient, run: str, status: str = "FINISHED") -> Iterator[None]:
    """Mark `run` as `status`, or as failed or killed if logging to it ends otherwise: none is left running."""
    try:
        yield
    except BaseException as error:
        if not gives_no_answer(error):
            client.set_terminated(run, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    client.set_terminated(run, status)


def experiment_of(client: MlflowClient, record: SweepRecord, artifacts: str | None) -> str:
    """Id of the experiment of a backbone and a data set, made if there is none, with its artifacts at `artifacts`."""
    return experiment_named(client, f"{record.backbone} on {record.dataset}", artifacts)


def experiment_named(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Id of the experiment `name`, made if there is none, with its artifacts at `artifacts`."""
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
