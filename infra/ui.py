"""`make ui`: Prefect and MLflow on loopback, with the sweeps of the runs folder; both end with this process."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from flows.prefect_server import BATCHED

DEADLINE = 120.0  # seconds until both must answer
LOOPBACK = ("127.0.0.1", "::1", "localhost")
BIN = Path(sys.executable).parent


def serve(runs: Path, host: str, prefect_port: int, mlflow_port: int) -> int:
    """Start both servers on what `quee sweep` left below `runs`, and wait for Ctrl-C; returns the exit code."""
    runs = runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    if host not in LOOPBACK:
        print(f"note: listening on {host}: whoever reaches it can read and start everything", file=sys.stderr)
    prefect = [BIN / "prefect", "server", "start", "--host", host, "--port", str(prefect_port)]
    mlflow = [
        BIN / "mlflow", "server", "--host", host, "--port", str(mlflow_port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{runs / 'mlflow.db'}", "--artifacts-destination", str(runs / "mlartifacts"),
    ]  # fmt: skip
    surroundings = {
        **BATCHED,
        **os.environ,
        "PREFECT_HOME": str(runs / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_API_URL": f"http://{host}:{prefect_port}/api",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven more processes, which nothing here needs
        "DO_NOT_TRACK": "true",
    }
    surroundings.pop("PREFECT_API_URL", None)
    for name, port in (("prefect", prefect_port), ("mlflow", mlflow_port)):
        _check_free(host, port, name)
    servers: dict[str, subprocess.Popen[bytes]] = {}
    try:
        servers[f"http://{host}:{prefect_port}/api/health"] = _start(prefect, surroundings)
        servers[f"http://{host}:{mlflow_port}/health"] = _start(mlflow, surroundings)
        for url, process in servers.items():
            _until_it_answers(url, process)
        print(
            f"Prefect  http://{host}:{prefect_port}    export PREFECT_API_URL=http://{host}:{prefect_port}/api\n"
            f"MLflow   http://{host}:{mlflow_port}\nCtrl-C ends both",
            flush=True,
        )
        while not (ended := [url for url, process in servers.items() if process.poll() is not None]):
            time.sleep(0.5)
        sys.exit(f"error: {ended[0]}: the server has ended; what it said stands above")
    except KeyboardInterrupt:
        return 0
    finally:
        for process in servers.values():
            _end(process)


def _check_free(host: str, port: int, name: str) -> None:
    """End with a line if a server listens there already: it would answer in the place of ours."""
    try:
        [(family, kind, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended is no hindrance
            probe.bind(address)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        sys.exit(
            f"error: port {port} of {host}: {why.lower()}; end what listens there, or choose another: "
            f'make ui ARGS="--{name}-port N"'
        )


def _start(command: list[object], surroundings: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # sessions of their own: Ctrl-C reaches this process alone, which ends them in order
    return subprocess.Popen([str(part) for part in command], env=dict(surroundings), start_new_session=True)


def _until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE
    while True:
        if process.poll() is not None:
            sys.exit(f"error: {url.rpartition('/')[0]}: the server has ended; what it said stands above")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if time.monotonic() > deadline:
                sys.exit(f"error: {url}: no answer within {DEADLINE:.0f} s")
            time.sleep(0.3)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Serve as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of sweeps (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone)")
    parser.add_argument("--prefect-port", type=int, default=4200, help="port of Prefect (%(default)s)")
    parser.add_argument("--mlflow-port", type=int, default=5000, help="port of MLflow (%(default)s)")
    asked = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(serve(asked.runs, asked.host, asked.prefect_port, asked.mlflow_port))


if __name__ == "__main__":
    main()
