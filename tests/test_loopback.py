"""What quee starts listens on this machine alone, unless it is told otherwise; then it says what that means."""

import os
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.listening import listening_addresses
from tests.prefect_server import BIN, running, until
from tests.processes import free_ports
from tests.quee_command import SweepProcess, write_sweep

LOOPBACK = {"127.0.0.1"}
NOTE = "note: listening on 0.0.0.0: whoever reaches it can read and start everything"
pytestmark = [pytest.mark.usefixtures("prefect_home"), pytest.mark.xdist_group("loopback")]


def test_the_kernels_word_tells_loopback_from_everywhere() -> None:
    with ExitStack() as stack:
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            bound = stack.enter_context(socket.socket(family))
            bound.bind((host, 0))
            bound.listen()
            assert host in listening_addresses(os.getpid())


def test_a_sweep_and_the_server_that_it_starts_listen_on_loopback_alone(tmp_path: Path) -> None:
    write_sweep(tmp_path, run={"shard_images": 20, "batch": 10})
    seen: set[str] = set()
    with SweepProcess(tmp_path) as sweep:
        sweep.wait_for_tables(3)
        while sweep.running:
            seen |= sweep.listening()
            time.sleep(0.05)
    assert seen == LOOPBACK  # Prefect's server all the time, and Dask's for health while the grid is fitted


def ui(runs: Path, *arguments: object) -> list[object]:
    prefect, mlflow = free_ports(2)
    command = [BIN / "python", "-m", "infra.ui", "--runs", runs, "--prefect-port", prefect, "--mlflow-port", mlflow]
    return [*command, *arguments]


def test_make_ui_listens_on_loopback_alone_and_ends_what_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"  # mlflow finds uvicorn by name
    with running(ui(tmp_path / "runs"), log, os.environ | {"PATH": path}) as process:
        until("both servers", lambda: "Ctrl-C ends both" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        assert listening_addresses(process.pid) == LOOPBACK
        assert "note: " not in log.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize("taken", ["prefect", "mlflow"])
def test_make_ui_starts_nothing_where_another_server_would_answer(tmp_path: Path, taken: str) -> None:
    """And says what it means to listen elsewhere, before it looks."""
    command = [str(part) for part in ui(tmp_path / "runs", "--host", "0.0.0.0")]
    port = command[command.index(f"--{taken}-port") + 1]
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", int(port)))
        bound.listen()
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    note, error = done.stderr.splitlines()
    assert note == NOTE
    assert error == (
        f"error: port {port} of 0.0.0.0: address already in use; end what listens there, or choose another: "
        f'make ui ARGS="--{taken}-port N"'
    )
    assert done.stdout == ""
