"""A gate before an S3 server: it notes every request, and answers some of them itself as a failing server would."""

import http.client
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.s3_server import S3Server, other_environment

HOP_BY_HOP = ("connection", "transfer-encoding", "keep-alive")


@dataclass(frozen=True)
class Request:
    """method: GET, PUT and so on, and LIST for a listing. key: bucket and object, or the prefix that is listed."""

    method: str
    key: str
    headers: dict[str, str]
    query: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """An error that S3 would give; status 0 for a connection that is dropped without an answer."""

    status: int
    code: str = ""
    more: str = ""

    @property
    def body(self) -> bytes:
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{self.code}</Code><Message>{self.code}, as it were'
            f"</Message>{self.more}</Error>"
        ).encode()


DROPPED = Answer(0)


class S3Gate:
    """`requests`: all that came, in order. `judge`: what to answer instead of the server; None to pass a request on.

    Requests carry the gate's name in their signature, which the server checks as it comes.
    """

    def __init__(self, server: S3Server) -> None:
        self.requests: list[Request] = []
        self.judge: Callable[[Request], Answer | None] = lambda _: None
        self._server = server
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def handle_all(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer = gate._noted(self.command, self.path, dict(self.headers))
                if answer is DROPPED:
                    self.close_connection = True
                elif answer is not None:
                    self._reply(answer.status, {"Content-Type": "application/xml"}, answer.body)
                else:
                    self._reply(*gate._passed_on(self.command, self.path, dict(self.headers), body))

            def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in (*HOP_BY_HOP, "content-length"):
                        self.send_header(name, value)
                length = headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_all  # noqa: N815 (http.server's names)

        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._listener.daemon_threads = True

    @property
    def environment(self) -> dict[str, str]:
        host, port = self._listener.server_address[:2]
        return self._server.environment | {"AWS_ENDPOINT_URL": f"http://{host!s}:{port}"}

    def fail(self, *answers: Answer, when: Callable[[Request], bool] = lambda _: True) -> None:
        """Give these answers to the next requests for which `when` holds, then pass all on."""
        left = list(answers)
        self.judge = lambda request: left.pop(0) if left and when(request) else None

    def count(self, method: str) -> int:
        return sum(request.method == method for request in self.requests)

    def __enter__(self) -> "S3Gate":
        self._thread = Thread(target=self._listener.serve_forever, args=[0.05])
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()

    def _noted(self, method: str, path: str, headers: dict[str, str]) -> Answer | None:
        parts = urlsplit(path)
        query, key = parse_qs(parts.query, keep_blank_values=True), unquote(parts.path).lstrip("/")
        if "list-type" in query:
            method, key = "LIST", f"{key}/{query['prefix'][0]}"
        request = Request(method, key, headers, query)
        self.requests.append(request)
        return self.judge(request)

    def _passed_on(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(urlsplit(self._server.endpoint).netloc, timeout=60)
        try:
            connection.request(method, path, body, {k: v for k, v in headers.items() if k.lower() not in HOP_BY_HOP})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()


@pytest.fixture
def s3_gate(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Gate]:
    """A gate before the server, whose variables are set in the server's stead while a test runs."""
    with S3Gate(s3_server) as gate, other_environment(gate.environment, monkeypatch):
        yield gate
