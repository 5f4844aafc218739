"""A small HTTP endpoint in a thread, of which a forked child inherits nothing.

A child with the listening socket would keep the port after its parent has died, and one with an accepted connection
would keep a client waiting for its end. Both are discarded in the child as connections of resources are (see
:mod:`workerpools._process.fork`).
"""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from workerpools._process import fork

__all__ = ["Endpoint"]

#: How long a client may take for its request, in seconds: each has a thread of its own while it does.
TIMEOUT = 10.0

#: How often the thread looks whether it should end, in seconds.
POLL = 0.2


class _Handler(WSGIRequestHandler):
    timeout = TIMEOUT

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a scrape every few seconds is no news."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    # Two workers with the same port would share its requests, and each would show half the truth.
    allow_reuse_port = False

    def __init__(self, host: str, port: int) -> None:
        self.accepted: set[socket.socket] = set()
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # Without the parents' look-up of the host's name, which may wait for a name server.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.accepted.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        try:
            super().shutdown_request(request)
        finally:
            self.accepted.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet about clients that went away."""


class Endpoint:
    """Serves a WSGI application until it is closed, or the process ends.

    Args:
        application: Called in threads of its own.
        host: The address to listen on.
        port: The port; 0 for any that is free.

    Raises:
        OSError: It cannot be listened on.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]], host: str, port: int) -> None:
        self._server: _Server | None = _Server(host, port)
        self.host, self.port = host, int(self._server.server_port)
        self._server.set_app(application)
        fork.guard(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": POLL}, name="workerpools-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening. May be called again, and in a child, where there is nothing to close."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self._thread.join(1.0)

    def pin(self) -> object:
        """Return what must not be finalized in a forked child (see :mod:`workerpools._process.fork`)."""
        server = self._server
        return (server, list(server.accepted)) if server is not None else ()

    def discard(self) -> tuple[object, Sequence[int]]:
        """Forget the inherited sockets, in a forked child."""
        server, self._server = self._server, None
        if server is None:
            return (), ()
        sockets = [server.socket, *server.accepted]
        return (server, sockets), [each.fileno() for each in sockets if each.fileno() >= 0]
