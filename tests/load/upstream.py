"""An HTTP server that counts what it is paid, and can be killed and started again without forgetting it.

`Upstream` is the test's side. The server is this module run as a program; what it has executed stands in a file,
written before the answer, so that a kill at any moment loses no count.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.paths import environment

HOST = "127.0.0.1"


class Payment(NamedTuple):
    """One POST as the server read it.

    Attributes:
        number: What was paid.
        key: Its Idempotency-Key.
        executed: Whether it was more than the repetition of a key.
    """

    number: int
    key: str | None
    executed: bool


class Upstream:
    """The server's process and its file.

    Args:
        folder: Where the file goes.
    """

    host = HOST

    def __init__(self, folder: Path) -> None:
        self._ledger = folder / "payments.jsonl"
        # Bound, never listening: nobody else is given the port while the server is down.
        self._claim = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._claim.bind((HOST, 0))
        self.port: int = self._claim.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Upstream:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        self._claim.close()

    def start(self, timeout: float = 20.0) -> None:
        """Start the server and wait until it takes connections."""
        command = [sys.executable, "-m", "tests.load.upstream", str(self.port), str(self._ledger)]
        # It ends with this pipe, that is with this process.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment(), start_new_session=True)
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 1.0):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"the server on port {self.port} does not answer ({self._process.poll()})")
            time.sleep(0.02)

    def kill(self) -> None:
        """End the server with SIGKILL, whatever is in flight."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process = None

    def payments(self) -> list[Payment]:
        """Return every POST that any of the server's lives has read as a whole."""
        return _read(self._ledger)


def _read(ledger: Path) -> list[Payment]:
    if not ledger.exists():
        return []
    return [Payment(*json.loads(line)) for line in ledger.read_text().splitlines()]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    # The library closes its idle connections earlier.
    timeout = 30
    server: _Server

    def do_GET(self) -> None:
        self._answer(self.path.rpartition("/")[2])

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        number = self.path.rpartition("/")[2]
        self.server.pay(int(number), self.headers.get("Idempotency-Key"))
        self._answer(number)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            # The client went away, which is what the test is about.
            self.close_connection = True

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, ledger: Path) -> None:
        super().__init__((HOST, port), _Handler)
        self._keys = {payment.key for payment in _read(ledger)} - {None}
        self._file = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._lock = threading.Lock()

    def pay(self, number: int, key: str | None) -> None:
        with self._lock:
            line = json.dumps(Payment(number, key, key is None or key not in self._keys)) + "\n"
            # One write: it is there as a whole or not at all.
            os.write(self._file, line.encode())
            self._keys.add(key)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet about connections that broke."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def main() -> None:
    """Serve until standard input ends."""
    server = _Server(int(sys.argv[1]), Path(sys.argv[2]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
