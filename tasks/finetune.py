"""Fine-tuning, tracked in MLflow: a run for each, to which a training that goes on adds."""

import time
from collections.abc import Iterator
from pathlib import Path as FilePath

import yaml
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from quee_core.finetuning import WEIGHTS, Epoch, Training, sweep_of, train
from quee_core.redaction import without_secrets
from quee_core.whole_files import disk_faults, whole_file
from tasks.mlflow_server import client_of, ended, experiment_named, mlflow_faults, tracking_of

SWEEP = "sweep.yaml"
DIGEST_TAG = "quee.finetuning"


def finetune(training: Training, folder: FilePath) -> Iterator[Epoch]:
    """Train in `folder`, each epoch tracked once it is kept; at the end the weights lie there, and a sweep of them.

    Epochs of an earlier start are given and tracked again. Raises as `train` does, and ServerError if MLflow fails,
    which loses no epoch.
    """
    config = training.config
    uri, artifacts = tracking_of(config)
    advice = f"what is trained is kept in {folder}, the same command continues"
    with mlflow_faults(uri, advice):
        client = client_of(uri)
        run = _run_of(client, training, artifacts)
        with ended(client, run):
            for epoch in train(training, folder):
                client.log_batch(run, metrics=_metrics(epoch))
                yield epoch
            write_sweep(training, folder)
            client.log_artifact(run, str(folder / SWEEP))
            client.set_tag(run, "quee.weights", str((folder / WEIGHTS).resolve()))


def write_sweep(training: Training, folder: FilePath) -> FilePath:
    """Write a sweep of the trained weights beside them; what is there stays, for somebody may have changed it."""
    path = folder / SWEEP
    if not path.exists():
        said = sweep_of(training, folder).model_dump(mode="json", exclude_defaults=True)
        with disk_faults(path, "written"), whole_file(path) as file:
            file.write(yaml.safe_dump(said, sort_keys=False).encode())
    return path


def _run_of(client: MlflowClient, training: Training, artifacts: str | None) -> str:
    """The run of this training, running: the one that an earlier start left, or a new one."""
    config = training.config
    name = f"fine-tuning of {config.backbone.name} on {config.dataset.name}"
    experiment = experiment_named(client, name, artifacts)
    found = client.search_runs([experiment], f"tags.`{DIGEST_TAG}` = '{training.fingerprint}'", max_results=1)
    if found:
        known = str(found[0].info.run_id)
        client.update_run(known, "RUNNING")
        return known
    run = str(client.create_run(experiment, run_name=config.name, tags={DIGEST_TAG: training.fingerprint}).info.run_id)
    sections = config.model_dump(mode="json", exclude={"run", "name"})
    params = [
        Param(f"{section}.{field}", without_secrets(str(value))[:500])
        for section, fields in sections.items()
        for field, value in fields.items()
    ]
    client.log_batch(run, params=params)
    return run


def _metrics(epoch: Epoch) -> list[Metric]:
    now = int(time.time() * 1000)
    low, high = epoch.interval
    measured = {
        "loss": epoch.loss, "accuracy": epoch.accuracy, "accuracy_low": low, "accuracy_high": high, "n": epoch.n,
        "learning_rate": epoch.learning_rate, "seconds": epoch.seconds, "images_per_second": epoch.images_per_second,
    }  # fmt: skip
    return [Metric(name, float(value), now, epoch.number) for name, value in measured.items()]
