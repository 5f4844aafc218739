"""The HTTP API that the documentation's shop talks to, and a front page for the settings-only bases."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self) -> None:
        target = urlsplit(self.path)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(float(parse_qs(target.query).get("delay", ["0"])[0]))
        what, _, number = target.path.strip("/").partition("/")
        if what == "orders" and number.isdigit():
            self._answer(200, {"id": int(number), "sku": "teapot", "quantity": 2})
        elif what == "payments" and self.command == "POST":
            self._answer(201, {"receipt": self.headers.get("Idempotency-Key", "none")})
        elif not what:
            self._answer(200, {"shop": "open"})
        else:
            self._answer(404, {"error": "no such path"})

    do_POST = do_GET

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet about clients that went away."""


@contextmanager
def shop_api() -> Iterator[str]:
    """Serve the API in a thread, on a free port of this machine; gives the base URL."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
