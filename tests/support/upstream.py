"""A real HTTP server in a process of its own, for tests that fork: no child of the test inherits its sockets.

`EchoUpstream` starts `tests.support.upstream_server` and talks to it over its standard input and output; the
server ends when that pipe closes or when its parent is gone.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import threading
import time
from typing import Any, NamedTuple

from tests.support.paths import environment
from tests.support.program import Program


class Request(NamedTuple):
    """One request as the server read it, logged before it is answered.

    Attributes:
        method: The HTTP method.
        path: The path without the query.
        query: The query string, or an empty string.
        idempotency_key: The Idempotency-Key header, or None.
        connection: Which of the server's connections it came over, counted from 1.
        body: The request's body.
    """

    method: str
    path: str
    query: str
    idempotency_key: str | None
    connection: int
    body: str


class EchoUpstream:
    """A running HTTP/1.1 keep-alive server on a free loopback port.

    `GET /echo/<token>` answers the token, `POST /orders` a JSON object with the order's number, `GET /stream?n=`
    n chunks "chunk 0", "chunk 1", … of a line each. Any path understands `?delay=` (seconds before the answer),
    `?status=` and `?close=fin` or `?close=rst`: the request is read and logged, then the connection ends without
    an answer.

    Args:
        keep_alive: Seconds after which the server closes an idle connection; None keeps it.
        timeout: Seconds that starting, stopping and each question to the server may take.
    """

    host = "127.0.0.1"

    def __init__(self, *, keep_alive: float | None = None, timeout: float = 15.0) -> None:
        self._timeout = timeout
        self._lock = threading.Lock()
        self._buffer = b""
        command = ["tests.support.upstream_server"]
        theirs_in, self._questions = os.pipe()
        self._answers, theirs_out = os.pipe()
        try:
            self._process = Program(
                command if keep_alive is None else [*command, str(keep_alive)],
                stdin=theirs_in,
                stdout=theirs_out,
                stderr=2,
                env=environment(),
            )
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        try:
            self.port: int = self._read()["port"]
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> EchoUpstream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<EchoUpstream {self.url} pid={self.pid}>"

    @property
    def url(self) -> str:
        """The server's base URL, without a slash at the end."""
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    @property
    def accepted(self) -> int:
        """How many connections the server accepted since it started."""
        return int(self._ask("accepted"))

    @property
    def orders(self) -> int:
        """How many `POST /orders` were executed, answered or not."""
        return int(self._ask("orders"))

    def requests(self) -> list[Request]:
        """Return every request since the start or the last `clear`, in the order of arrival."""
        return [Request(*row) for row in self._ask("requests")]

    def clear(self) -> None:
        """Forget the logged requests and the count of orders; connections keep their numbers."""
        self._ask("clear")

    def open_connections(self) -> int:
        """Return how many connections the server holds open now."""
        return int(self._ask("open"))

    def wait_for_open(self, count: int, timeout: float = 5.0) -> None:
        """Wait until the server holds exactly `count` connections; else `TimeoutError`."""
        deadline = time.monotonic() + timeout
        while (found := self.open_connections()) != count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self!r} holds {found} connections, {count} expected")
            time.sleep(0.01)

    def close_idle(self) -> int:
        """Close every connection that has no request in progress; returns how many there were."""
        return int(self._ask("close_idle"))

    def stop(self) -> None:
        """End the server with all its connections, once."""
        with self._lock:
            if self._process.returncode is not None:
                return
            os.close(self._questions)
            try:
                self._process.wait(self._timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            os.close(self._answers)

    def _ask(self, question: str) -> Any:
        with self._lock:
            os.write(self._questions, question.encode() + b"\n")
            return self._read()["answer"]

    def _read(self) -> dict[str, Any]:
        number = self._answers
        deadline = time.monotonic() + self._timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([number], [], [], left)[0]:
                raise TimeoutError(f"the HTTP server (pid {self.pid}) did not answer in {self._timeout} s")
            chunk = os.read(number, 65536)
            if not chunk:
                raise RuntimeError(f"the HTTP server (pid {self.pid}) ended with {self._process.wait()}")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer
