"""The `quee` command on a sweep of seconds: in this process, which is quick, or in one of its own, to be stopped."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from flows.cli import app
from quee_core.config import SweepConfig
from quee_core.record import SweepRecord
from quee_core.runs import read_record
from quee_core.store import Manifest
from quee_core.whole_files import is_temporary
from tests.conftest import small_config
from tests.listening import listening_addresses

QUEE = Path(sys.executable).with_name("quee")
DEADLINE = 400  # seconds; only a hang takes as long, on a busy machine too
CELLS = 18  # tables of that sweep: two exits and two bit-widths make six paths, over three splits of one shard each


def write_sweep(folder: Path, **sections: Any) -> Path:
    """The small configuration, made smaller, with `sections` laid over it.

    The tests of a process share MLflow's database, which takes seconds to make.
    """
    tracking = f"sqlite:///{folder.parent / 'mlflow.db'}"
    small = small_config(
        folder, dataset={"limit": 60}, paths={"bits": [2, 4]}, prices={"count": 6}, run={"mlflow_uri": tracking}
    )
    return write_config(folder, small, **sections)


def write_config(folder: Path, config: SweepConfig, **sections: Any) -> Path:
    """`config` with `sections` laid over it, whether they are valid or not, as a file that a command takes."""
    raw = config.model_dump(mode="json", exclude_unset=True)
    for name, fields in sections.items():
        raw[name] = {**raw.get(name, {}), **fields} if isinstance(fields, dict) else fields
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def quee(folder: Path, *arguments: object) -> Result:
    """The command run in `folder`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(folder: Path, *arguments: object) -> str:
    """The message that the command ends with, which must be all that it says of the matter."""
    done = quee(folder, *arguments)
    assert done.exit_code == 2, (done.output, done.exception)
    return only_error(done.output)


def only_error(output: str) -> str:
    """The one line of `output` that reports an error."""
    assert "Traceback" not in output, output
    assert "ERROR" not in output, output
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def finished(folder: Path, *arguments: object) -> SweepRecord:
    """The record of the sweep in `folder`, which must run to its end without complaints."""
    done = quee(folder, "sweep", "sweep.yaml", *arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "error" not in done.output.lower(), done.output
    return read_record(folder / "runs" / "small" / "record.json")


def computed(record: SweepRecord, stage: str) -> int:
    """Pieces of work that a stage computed, in all its passes."""
    return sum(timing.computed for timing in record.timings if timing.stage == stage)


def whole_tables(store: Path) -> dict[Path, tuple[int, int]]:
    """Every table that a reader sees, with its file's inode and time; each must be what its manifest says."""
    tables = {}
    for path in store.glob("backbone=*/**/_part-*.json"):
        manifest = Manifest.model_validate_json(path.read_bytes())
        data = path.with_name(f"{path.stem.removeprefix('_')}.{manifest.sha256[:16]}.parquet")
        assert hashlib.sha256(data.read_bytes()).hexdigest() == manifest.sha256
        tables[data] = data.stat().st_ino, data.stat().st_mtime_ns
    return tables


def leftovers(folder: Path) -> list[Path]:
    """Temporary files of unfinished writing."""
    return [path for path in folder.rglob("*") if is_temporary(path.name)]


class SweepProcess:
    """`quee sweep sweep.yaml` in a process group of its own, as a terminal starts it; gone when the block ends.

    So are the processes that it started, which are known by a variable of their environment.
    """

    def __init__(
        self,
        folder: Path,
        before: Callable[[], None] = lambda: None,
        command: Sequence[object] = (QUEE,),
        arguments: Sequence[object] = ("sweep", "sweep.yaml"),
    ) -> None:
        self.folder = folder
        self._command = [*map(str, command), *map(str, arguments)]
        self._before = before
        self._lines: list[str] = []

    def __enter__(self) -> "SweepProcess":
        def prepare() -> None:
            # whoever starts the tests in the background ignores SIGINT, and children inherit that
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._before()

        self._process = subprocess.Popen(
            self._command, cwd=self.folder, env=os.environ | {"QUEE_TEST": str(self.folder)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=prepare,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._reader = Thread(target=self._lines.extend, args=[self._process.stdout])
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._alive():
            os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def listening(self) -> set[str]:
        """Addresses that it and what it started listen on at the moment."""
        return {address for pid in self._alive() for address in listening_addresses(pid)}

    @property
    def output(self) -> str:
        """What it has printed, to stdout and stderr."""
        return "".join(self._lines)

    def wait_for_tables(self, count: int) -> None:
        """Return once the store holds `count` tables; the sweep must still be running then."""
        self.wait_for(lambda: len(list(self.folder.glob("store/backbone=*/**/_part-*.json"))) >= count)

    def wait_for(self, holds: Callable[[], bool]) -> None:
        """Return once `holds()`; the command must still be running then."""
        deadline = time.monotonic() + DEADLINE
        while not holds():
            assert self._process.poll() is None, f"ended too early: {self.output}"
            assert time.monotonic() < deadline, f"too late: {self.output}"
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        """Signal the whole group, as a terminal does on Ctrl-C."""
        os.killpg(self._process.pid, number)

    def ended(self) -> tuple[int, str]:
        """Exit code and everything that was printed, once the process has ended and left none behind."""
        code = self._process.wait(DEADLINE)
        deadline = time.monotonic() + DEADLINE
        while self._alive():
            assert time.monotonic() < deadline, "Prefect's server was left running"
            time.sleep(0.05)
        self._reader.join()
        return code, self.output

    def _alive(self) -> list[int]:
        mark = f"QUEE_TEST={self.folder}\0".encode()
        found = []
        for place in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # ended in between
                if mark in place.read_bytes():
                    found.append(int(place.parent.name))
        return found
