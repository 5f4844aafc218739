"""A peer that is never silent and never done: each of its answers comes a few bytes at a time, for ever."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from functools import partial

#: The time between two pieces, in seconds: far below any read timeout.
PAUSE = 0.03

_OK = b"HTTP/1.1 200 OK\r\n"


class Trickle:
    """Answers requests on a free loopback port by their paths: ``/ok`` at once, every key of `ANSWERS` for ever.

    As a proxy it answers CONNECT for ever, too.

    Args:
        context: The TLS context of the server; None for plain text.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self._context = context
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.port}"
        self.paths: list[str] = []
        self._start(self._accept)

    def __enter__(self) -> Trickle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in list(self._threads):
            thread.join(10)

    def _start(self, target: Callable[[], object]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._start(partial(self._serve, connection))

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.settimeout(1)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection:
                while head := self._head(connection):
                    method, path = head.split(" ", 2)[:2]
                    self.paths.append(path)
                    if path == "/ok":
                        connection.sendall(_OK + b"Content-Length: 2\r\n\r\nok")
                    elif path == "/upload":
                        self._for_ever(partial(connection.recv, 65536))
                    else:
                        begin, piece = ANSWERS["/head" if method == "CONNECT" else path]
                        connection.sendall(begin)
                        self._for_ever(partial(connection.sendall, piece))

    def _head(self, connection: socket.socket) -> str:
        head = b""
        while b"\r\n\r\n" not in head:
            byte = connection.recv(1)
            if not byte:
                return ""
            head += byte
        return head.decode()

    def _for_ever(self, step: Callable[[], object]) -> None:
        while not self._over.wait(PAUSE):
            step()


#: How each answer begins, and the piece that then comes again and again.
ANSWERS = {
    "/head": (_OK + b"X-Trickle: ", b"x"),
    "/informational": (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "/length": (_OK + b"Content-Length: 1000000\r\n\r\n", b"x"),
    "/extension": (_OK + b"Transfer-Encoding: chunked\r\n\r\n1;extension=", b"x"),
    # A connection that ends is the end of such a body.
    "/close": (_OK + b"Connection: close\r\n\r\n", b"x"),
}
