"""The flow `quee-new-backbones`, deployed as `quee-new-backbones/watch`: a sweep for each backbone not swept yet."""

import re
from dataclasses import dataclass
from typing import Annotated, cast

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from pydantic import Field

from flows.silent_runs import TAG
from quee_core.backbones.registry import list_backbones
from quee_core.backbones.shelf import VARIANT, Shelved, read_shelf
from quee_core.config import BackboneConfig, SweepConfig
from quee_core.errors import BackboneError, did_you_mean
from quee_core.fingerprints import fingerprint

SWEEP = "quee/full-sweep"
NAME_LENGTH = 80  # of a sweep, as its configuration bounds it


@dataclass(frozen=True)
class Started:
    """A backbone, the run that sweeps it, and what state that has."""

    label: str
    run: str
    state: str


@flow(name="quee-new-backbones", validate_parameters=True)
def watch(
    sweep: SweepConfig,
    folder: str | None = "backbones",
    names: tuple[str, ...] = (),
    announced: str | None = None,
    attempts: Annotated[int, Field(ge=1)] = 3,
) -> list[Started]:
    """Start `quee/full-sweep` for each backbone that it has not swept.

    sweep: what every backbone is swept with; its name is put before the backbone's, its section `backbone` replaced.
    folder: a folder or s3:// prefix of weights (`quee_core.backbones.shelf`); null for none. names: timm's, with
    their own weights. announced: only this one of them, or another of timm's names. attempts: runs of one backbone
    that may fail before it is given up.
    """
    shelved, faults = ([], []) if folder is None else read_shelf(folder)
    for fault in faults:
        get_run_logger().error("%s", fault)
    found = []
    for one in wanted(shelved, names, announced):
        try:
            found.append(sweep_of(one, sweep, attempts))
        except BackboneError as error:
            faults.append(str(error))
    if faults:
        raise BackboneError(f"{len(faults)} of the backbones in {folder} cannot be swept: {'; '.join(faults)}")
    return found


def wanted(shelved: list[Shelved], names: tuple[str, ...], announced: str | None) -> list[Shelved]:
    """The backbones to see to: all, or the one that was announced."""
    by_name = {one.label: one for one in [*shelved, *map(published, names)]}
    if announced is None:
        return list(by_name.values())
    if announced in by_name:
        return [by_name[announced]]
    if variants := [one for one in shelved if one.label.partition(VARIANT)[0] == announced]:
        return variants
    if announced in list_backbones():
        return [published(announced)]
    raise BackboneError(
        f"backbone {announced!r} was announced, but is neither in the folder nor a name of quee's or timm's; "
        f"{did_you_mean(announced, by_name)}"
    )


def published(name: str) -> Shelved:
    """A backbone of timm's with its own weights."""
    backbone = BackboneConfig(name=name, pretrained=True)
    return Shelved(name, backbone, fingerprint(backbone.model_dump(mode="json")))


@task(task_run_name="sweep-{one.label}", cache_policy=NO_CACHE)
def sweep_of(one: Shelved, base: SweepConfig, attempts: int) -> Started:
    """The run that sweeps a backbone: the one that there is, or a new one if there is none or it has failed."""
    name = sweep_name(base.name, one.label)
    asked = base.model_copy(update={"name": name, "backbone": one.backbone}).model_dump(mode="json")
    # where the work is done changes no result, but may be why it failed
    matters = {section: fields for section, fields in asked.items() if section != "run"}
    run: FlowRun
    for attempt in range(attempts):
        key = fingerprint([asked if attempt else matters, one.version, attempt])
        run = cast(
            FlowRun,
            run_deployment(
                SWEEP, parameters={"sweep": asked}, flow_run_name=name, timeout=0, idempotency_key=key,
                as_subflow=False, tags=[TAG, f"backbone:{one.label}"],
            ),
        )  # fmt: skip
        state = run.state_name or "Scheduled"
        if run.state is None or not run.state.is_final() or run.state.is_completed():
            get_run_logger().info("%s: run %s, %s", one.label, run.name, state.lower())
            return Started(one.label, str(run.id), state)
    raise BackboneError(
        f"{one.label}: {attempts} runs of it have failed, the last is {run.name}; it is not tried again"
    )


def sweep_name(base: str, label: str) -> str:
    """What the sweep of a backbone is called: `base` and the label, in what a sweep's name may hold."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", f"{base}-{label}")
    if len(name) <= NAME_LENGTH and name.endswith(label):
        return name
    return f"{name[: NAME_LENGTH - 9]}-{fingerprint(label)[:8]}"  # what was cut or replaced may tell two apart


if __name__ == "__main__":
    watch(SweepConfig())
