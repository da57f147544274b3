"""What befalls a sweep, one function each: they are called at the moment, and return once the world is whole again."""

import random
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quee_core.places import PATIENCE
from tests.chaos.commands import Command, SweepCommand
from tests.chaos.small_disk import filled
from tests.chaos.store_files import StoreFiles
from tests.chaos.surroundings import Surroundings
from tests.chaos.watcher import Watcher


@dataclass(frozen=True)
class Scene:
    """A sweep in the middle: what runs, where, and what is random about the hindrance."""

    around: Surroundings
    folder: Path
    command: Command
    files: StoreFiles
    watcher: Watcher
    rng: random.Random


@dataclass(frozen=True)
class Hindrance:
    """name: as the table shows it. stages: of which a moment is drawn. endings: how the sweep may end because of it.

    deployed: the sweep is a run of a worker. silent: nobody is left to tell the server how that ended. on_disk: its
    store is a folder, and its grid in its own process. small_disk: that folder is a disk of its own, where possible.
    """

    name: str
    hinder: Callable[[Scene], None]
    stages: tuple[str, ...]
    endings: tuple[str, ...]
    deployed: bool = False
    silent: bool = False
    on_disk: bool = False
    small_disk: bool = False


def kill_flow(scene: Scene) -> None:
    scene.command.kill()


def kill_worker(scene: Scene) -> None:
    """The flow's process notices, and ends itself; another worker takes up work."""
    scene.around.kill_worker()
    scene.command.ended()
    scene.around.start_worker()


def kill_worker_and_flow(scene: Scene) -> None:
    """Nobody is left to tell the server, whose automation ends the run once it has been silent for long enough."""
    scene.around.kill_worker_and_flows()
    scene.around.start_worker()


def kill_dask_worker(scene: Scene) -> None:
    for number in (0, 1)[: scene.rng.choice((1, 1, 2))]:
        scene.around.kill_dask_worker(number, nanny_too=scene.rng.random() < 0.5)
    time.sleep(scene.rng.uniform(0, 1))
    scene.around.start_dask_workers()


def restart_s3(scene: Scene) -> None:
    scene.around.s3.kill()
    time.sleep(scene.rng.uniform(0, 2))
    scene.around.s3.start()


def keep_s3_away(scene: Scene) -> None:
    """For longer than the store's patience: the sweep gives up, or has needed the store no more."""
    scene.around.s3.kill()
    time.sleep(PATIENCE)
    scene.command.ended()
    scene.around.s3.start()


def kill_mlflow(scene: Scene) -> None:
    scene.around.mlflow.kill()
    if scene.rng.random() < 0.5:
        scene.command.ended()
    scene.around.mlflow.start()


def fill_disk(scene: Scene) -> None:
    """Writes then end half way and with an error number; by a limit on the process where no disk can be mounted."""
    if scene.folder.is_mount():
        with filled(scene.folder):
            scene.command.ended()
        return
    assert isinstance(scene.command, SweepCommand)
    with suppress(ProcessLookupError):
        _, most = resource.prlimit(scene.command.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(scene.command.pid, resource.RLIMIT_FSIZE, (1, most))


def halve_a_table(scene: Scene) -> None:
    name, data = _a_table(scene)
    scene.watcher.spoil(name, data[: scene.rng.randrange(len(data))])


def flip_bits(scene: Scene) -> None:
    name, data = _a_table(scene)
    spoilt = bytearray(data)
    for _ in range(scene.rng.randint(1, 3)):
        spoilt[scene.rng.randrange(len(spoilt))] ^= 1 << scene.rng.randrange(8)
    scene.watcher.spoil(name, bytes(spoilt))


def _a_table(scene: Scene) -> tuple[str, bytes]:
    names = sorted(
        name for name in scene.files.versions() if name.endswith(".parquet") and name.startswith("backbone=")
    )
    name = scene.rng.choice(names)
    data = scene.files.read(name)
    assert data
    return name, data


_ALL = ("calibration", "extraction", "grid", "evaluation", "tracking")
_WITH_TABLES = ("extraction", "grid", "evaluation", "tracking")
HINDRANCES = (
    Hindrance("flow process killed", kill_flow, _ALL, ("killed",)),
    Hindrance("Prefect worker killed", kill_worker, _WITH_TABLES, ("crashed", "completed"), deployed=True),
    Hindrance("Dask worker killed", kill_dask_worker, ("grid",), ("exit 0",)),
    Hindrance("S3 server restarted", restart_s3, _ALL, ("exit 0",)),
    Hindrance("S3 server away for long", keep_s3_away, ("grid", "evaluation"), ("exit 0", "exit 2")),
    Hindrance("MLflow server killed", kill_mlflow, ("evaluation", "tracking", "tracking"), ("exit 0", "exit 2")),
    Hindrance("disk full", fill_disk, _WITH_TABLES, ("exit 0", "exit 2"), on_disk=True, small_disk=True),
    Hindrance("table half written", halve_a_table, _WITH_TABLES, ("exit 0",)),
    Hindrance("table with flipped bits", flip_bits, _WITH_TABLES, ("exit 0",), on_disk=True),
    Hindrance("worker and flow killed", kill_worker_and_flow, _WITH_TABLES, ("crashed",), deployed=True, silent=True),
)
