"""An HTTP/2 server over TLS, in threads, whose answers a test chooses by the request's path."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trustme

from tests.support.sockets import close_listener, drop_in_forked_child


class Seen(NamedTuple):
    """A request that was read as a whole: its method, its path, and the number of its connection."""

    method: str
    path: str
    connection: int


class H2Server:
    """Serves HTTP/2 on a free loopback port. The first part of a request's path says what happens:

    * ``/ok``: it is answered.
    * ``/held``: it is answered once `let_go` is set.
    * ``/body``: the head is answered at once, the body once `let_go` is set.
    * ``/refused/N``, ``/reset/N``: the first N are answered by RST_STREAM, with REFUSED_STREAM or with INTERNAL_ERROR.
    * ``/goaway/N/…``: the first N are answered by GOAWAY: ``unseen`` names the stream before it as the last one that is
      processed, ``none`` no stream at all, ``seen`` this stream; the connection is closed.

    Args:
        streams: SETTINGS_MAX_CONCURRENT_STREAMS; None to say nothing of it.
        http2: Whether HTTP/2 is offered; otherwise the handshake leads to HTTP/1.1, which is answered with 200.
    """

    def __init__(self, *, streams: int | None = 100, http2: bool = True) -> None:
        self._streams = streams
        authority = trustme.CA()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(self._context)
        self._context.set_alpn_protocols(["h2"] if http2 else ["http/1.1"])
        #: The context of a client that trusts this server.
        self.client_context = ssl.create_default_context()
        authority.configure_trust(self.client_context)
        self.seen: list[Seen] = []
        self.let_go = threading.Event()
        #: Released for each request that is held.
        self.held = threading.Semaphore(0)
        self.connections = 0
        #: The most streams that were open at once in a connection.
        self.most = 0
        self._counts: dict[str, int] = {}
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        drop_in_forked_child(self._all_sockets)
        _start(self._accept)

    def __enter__(self) -> H2Server:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.let_go.set()
        close_listener(self._listener)
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _all_sockets(self) -> Iterable[socket.socket]:
        return [self._listener, *self._sockets]

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            _start(partial(self._serve, accepted, self.connections))

    def _serve(self, accepted: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError, h2.exceptions.ProtocolError), contextlib.ExitStack() as stack:
            connection = stack.enter_context(self._context.wrap_socket(accepted, server_side=True))
            self._sockets.append(connection)
            if connection.selected_alpn_protocol() == "h2":
                _Connection(self, connection, number).serve()
                return
            while connection.recv(65536):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def settings(self) -> dict[h2.settings.SettingCodes, int]:
        """Return what the server tells of itself."""
        limit = {} if self._streams is None else {h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: self._streams}
        return {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 65535, **limit}

    def counted(self, path: str) -> int:
        """Count a request; return how many of this path there were before."""
        before = self._counts.get(path, 0)
        self._counts[path] = before + 1
        return before


class _Connection:
    def __init__(self, server: H2Server, connection: socket.socket, number: int) -> None:
        self._server = server
        self._socket = connection
        self._number = number
        self._lock = threading.Lock()
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self._heads: dict[int, dict[str, str]] = {}
        self._open: set[int] = set()
        self._over = False

    def serve(self) -> None:
        self._h2.local_settings = h2.settings.Settings(client=False, initial_values=self._server.settings())
        self._h2.initiate_connection()
        self._flush()
        while not self._over and (data := self._socket.recv(65536)):
            with self._lock:
                events = self._h2.receive_data(data)
                self._flush()
            for event in events:
                if isinstance(event, h2.events.RequestReceived):
                    self._open.add(event.stream_id)
                    self._server.most = max(self._server.most, len(self._open))
                    self._heads[event.stream_id] = {str(name): str(value) for name, value in event.headers}
                elif isinstance(event, h2.events.StreamReset):
                    self._open.discard(event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    self._request(event.stream_id, self._heads[event.stream_id])

    def _request(self, stream: int, head: dict[str, str]) -> None:
        path = head[":path"]
        what, *arguments = path.strip("/").split("/")
        first = bool(arguments) and arguments[0].isdigit() and self._server.counted(path) < int(arguments[0])
        if what in ("refused", "reset") and first:
            if what == "reset":
                self._server.seen.append(Seen(head[":method"], path, self._number))
            refused, failed = h2.errors.ErrorCodes.REFUSED_STREAM, h2.errors.ErrorCodes.INTERNAL_ERROR
            with self._lock:
                self._open.discard(stream)
                self._h2.reset_stream(stream, refused if what == "refused" else failed)
                self._flush()
            return
        if what == "goaway" and first:
            last = {"unseen": stream - 2, "none": 0, "seen": stream}[arguments[1]]
            if last == stream:
                self._server.seen.append(Seen(head[":method"], path, self._number))
            with self._lock:
                self._h2.close_connection(last_stream_id=last)
                self._flush()
            self._over = True
            return
        self._server.seen.append(Seen(head[":method"], path, self._number))
        if what == "ok" or not what or first or arguments:
            self._answer(stream)
        else:
            self._server.held.release()
            if what == "body":
                self._head(stream)
            _start(partial(self._later, stream, what))

    def _later(self, stream: int, what: str) -> None:
        self._server.let_go.wait(30)
        with contextlib.suppress(OSError, h2.exceptions.ProtocolError):
            self._answer(stream, head=what != "body")

    def _head(self, stream: int) -> None:
        with self._lock:
            self._h2.send_headers(stream, [(":status", "200"), ("content-length", "2")])
            self._flush()

    def _answer(self, stream: int, *, head: bool = True) -> None:
        if head:
            self._head(stream)
        with self._lock:
            self._open.discard(stream)
            self._h2.send_data(stream, b"ok", end_stream=True)
            self._flush()

    def _flush(self) -> None:
        self._socket.sendall(self._h2.data_to_send())


def _start(target: Callable[[], object]) -> None:
    threading.Thread(target=target, daemon=True).start()
