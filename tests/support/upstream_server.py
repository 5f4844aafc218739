"""The HTTP server process behind `EchoUpstream`: standard library, a thread a connection.

Questions arrive as lines on standard input, answers leave as JSON lines on standard output; the first of these
tells the port.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from tests.support.sockets import Ending, end


class Handler(BaseHTTPRequestHandler):
    """One connection: reads its requests one after the other."""

    protocol_version = "HTTP/1.1"
    # An answer leaves as one write, and does not wait for the acknowledgement of the one before.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: UpstreamServer

    def setup(self) -> None:
        # http.server reads it from the instance: seconds until an idle connection is closed.
        self.timeout = self.server.keep_alive  # type: ignore[misc]
        self.number = self.server.opened(self)
        self.busy = self.answered = False
        self.ending: Ending | None = None
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.server.closed(self)
        if self.ending is not None:
            # The files over the socket are closed by now: this is the last reference, and a real reset.
            end(self.connection, self.ending)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            # The client went away: nothing to answer, nothing to report.
            self.close_connection = True
        self.busy = False

    def parse_request(self) -> bool:
        # The first point after a request's first line arrived.
        self.busy, self.answered = True, False
        return super().parse_request()

    def do_GET(self) -> None:
        target = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(target.query).items()}
        body = self._body()
        if body is None:
            self.close_connection = True
            return
        order = self.server.log(
            (
                self.command,
                target.path,
                target.query,
                self.headers.get("Idempotency-Key"),
                self.number,
                body.decode(errors="replace"),
            )
        )
        time.sleep(float(query.get("delay", 0)))
        if query.get("close") in ("fin", "rst"):
            self.ending = cast(Ending, query["close"])
            self.close_connection = True
            return
        status = int(query.get("status", 200))
        if self.command == "POST" and target.path == "/orders":
            answer = {"order": order, "idempotency_key": self.headers.get("Idempotency-Key")}
            self._answer(status, json.dumps(answer).encode(), "application/json")
        elif target.path == "/stream":
            self._stream(int(query.get("n", 3)))
        elif target.path.startswith("/echo/"):
            self._answer(status, target.path.removeprefix("/echo/").encode())
        else:
            self._answer(404, b"no such path")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_GET

    def _body(self) -> bytes | None:
        """Read the request's body; None when the connection ended within it."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            return body if len(body) == length else None
        body = b""
        while line := self.rfile.readline():
            size = int(line, 16)
            chunk = self.rfile.read(size + 2)
            if len(chunk) < size + 2:
                return None
            if size == 0:
                return body
            body += chunk[:size]
        return None

    def _answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for wait in parse_qs(urlsplit(self.path).query).get("retry_after", ()):
            self.send_header("Retry-After", wait)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.answered = True

    def _stream(self, count: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for index in range(count):
            chunk = f"chunk {index}\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")
        self.answered = True

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the test asks for the log."""


class UpstreamServer(ThreadingHTTPServer):
    """The listening socket, the log, and the connections that are open."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, keep_alive: float | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.keep_alive = keep_alive
        self.requests: list[tuple[Any, ...]] = []
        self.accepted = 0
        self.orders = 0
        self._numbers = itertools.count(1)
        self._open: set[Handler] = set()
        self._lock = threading.Lock()

    def get_request(self) -> tuple[socket.socket, Any]:
        accepted = super().get_request()
        self.accepted += 1
        return accepted

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet about connections that broke: breaking them is what the tests do."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def opened(self, handler: Handler) -> int:
        """Register a connection and return its number."""
        with self._lock:
            self._open.add(handler)
            return next(self._numbers)

    def closed(self, handler: Handler) -> None:
        """Forget a connection."""
        with self._lock:
            self._open.discard(handler)

    def log(self, row: tuple[Any, ...]) -> int:
        """Log a request that was read as a whole; returns the number of orders so far."""
        with self._lock:
            self.requests.append(row)
            if row[:2] == ("POST", "/orders"):
                self.orders += 1
            return self.orders

    def close_idle(self) -> int:
        """Close the connections without a request in progress."""
        with self._lock:
            known = list(self._open)
        for handler in known:
            # The client may hold the whole answer before this thread knows that it is done.
            while handler.busy and handler.answered:
                time.sleep(0.001)
        idle = [handler for handler in known if not handler.busy]
        for handler in idle:
            with contextlib.suppress(OSError):
                # Wakes the handler's thread out of its read; the descriptor is closed there.
                handler.connection.shutdown(socket.SHUT_RDWR)
            self.closed(handler)
        return len(idle)

    def clear(self) -> None:
        """Forget the log."""
        with self._lock:
            self.requests, self.orders = [], 0

    def answer(self, question: str) -> object:
        """Answer one line from the test."""
        answers: dict[str, Callable[[], object]] = {
            "accepted": lambda: self.accepted,
            "orders": lambda: self.orders,
            "requests": lambda: list(self.requests),
            "open": lambda: len(self._open),
            "close_idle": self.close_idle,
            "clear": self.clear,
        }
        return answers[question]()


def _end_with_parent(parent: int) -> None:
    # A forked child of the test may hold the pipe open, so that its end of file never comes.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def main() -> None:
    """Serve until standard input ends or the parent is gone."""
    parent = os.getppid()
    server = UpstreamServer(float(sys.argv[1]) if len(sys.argv) > 1 else None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    print(json.dumps({"port": server.server_address[1]}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"answer": server.answer(line.strip())}), flush=True)
    # No waiting for threads with a request in progress: the kernel closes their connections.
    os._exit(0)


if __name__ == "__main__":
    main()
