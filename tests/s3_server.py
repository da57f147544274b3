"""A real S3 server on this machine, SeaweedFS, that tests may stop, kill and start again on the same data."""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import end_with_parent, free_ports

WEED = Path(sys.executable).with_name("weed")
DEADLINE = 180.0  # seconds; it takes about three, and on a busy machine longer
BUCKET = "quee"
ACCESS_KEY, SECRET_KEY = "QUEETESTKEY", "a/secret+that:must@show=nowhere"
READER_KEY, READER_SECRET = "QUEEREADERKEY", "another/secret"  # may read and list, not write
SERVERS = ("master", "volume", "filer", "s3")
_OPEN_CLIENTS: list[object] = []


class S3Server:
    """SeaweedFS with its data in `folder`, on ports of 127.0.0.1 that it keeps; one bucket, `BUCKET`.

    start: returns once it answers; from the main thread, with whose end the server ends too. kill: at once, as a power
    cut would; asked kindly, it takes 15 seconds. restart: on the same data and ports.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: list[int] = []
        (folder / "data").mkdir(parents=True)
        identities = [
            {"name": "quee", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
             "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
            {"name": "reader", "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
             "actions": ["Read", "List"]},
        ]  # fmt: skip
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[-1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What lets botocore, and all that is made of it, find the server and log in."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, the first time on ports that are free; try others if one is taken in between."""
        assert threading.current_thread() is threading.main_thread()
        for _ in range(5):
            if not self._process and not self._bucket_made:
                self._ports = free_ports(2 * len(SERVERS))
            if self._started():
                return
            self.kill()
        raise AssertionError(f"SeaweedFS does not start: {self.log[-3000:]}")

    def kill(self) -> None:
        """End it at once."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def restart(self) -> None:
        """Kill it, if it runs, and start it on the same data and ports."""
        self.kill()
        self.start()

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def __enter__(self) -> "S3Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def _bucket_made(self) -> bool:
        return (self._folder / "bucket").exists()

    def _started(self) -> bool:
        options = [f"-{name}.port={port}" for name, port in zip(SERVERS, self._ports[1::2], strict=True)]
        # else they are the others plus 10000
        options += [f"-{name}.port.grpc={port}" for name, port in zip(SERVERS, self._ports[::2], strict=True)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [WEED, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self._folder}/data", "-filer", "-s3",
                 f"-s3.config={self._folder}/s3.json", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0",
                 "-s3.port.lance=0", "-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=0",
                 "-volume.preStopSeconds=0", "-master.resumeState=false", "-filer.saveToFilerLimit=4194304", *options],
                stdout=log, stderr=subprocess.STDOUT, cwd=self._folder, start_new_session=True,
                preexec_fn=end_with_parent,
            )  # fmt: skip
        deadline = time.monotonic() + DEADLINE
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._answers():
                return True
            time.sleep(0.05)
        return False

    def _answers(self) -> bool:
        """Whether it takes a request of ours, by which the bucket is made or found."""
        connection = http.client.HTTPConnection("127.0.0.1", self._ports[-1], timeout=5)
        try:
            connection.request("GET", "/healthz")
            if connection.getresponse().status != 200:
                return False
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return self._bucket_made or self._make_bucket()

    def _make_bucket(self) -> bool:
        import botocore.session
        from botocore.exceptions import BotoCoreError, ClientError

        client = botocore.session.Session().create_client(
            "s3", region_name="us-east-1", endpoint_url=self.endpoint, aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )  # fmt: skip
        try:
            client.create_bucket(Bucket=BUCKET)
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        (self._folder / "bucket").touch()
        return True


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One for each process of tests. A test that ends it must start it again."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The server's variables, set in this process while a test runs, and no others of AWS's."""
    _set_alone(s3_server.environment, monkeypatch)
    return s3_server.environment


@contextmanager
def other_environment(variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These variables instead, while the block lasts: s3fs keeps its clients, so they are forgotten on both sides."""
    with monkeypatch.context() as patch:
        _set_alone(variables, patch)
        _forget_clients()
        try:
            yield
        finally:
            _forget_clients()


def _forget_clients() -> None:
    """New stores get new clients. The old ones stay open: a collected one is closed in whatever loop runs then."""
    from s3fs import S3FileSystem

    _OPEN_CLIENTS.extend(S3FileSystem._cache.values())
    S3FileSystem.clear_instance_cache()


def _set_alone(variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
