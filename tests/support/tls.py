"""A proxy that speaks TLS to its clients and plain text to the server behind it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

import trustme

from tests.support.sockets import close_listener, drop_in_forked_child

# PostgreSQL's "SSLRequest (F)", "GSSENCRequest (F)" and the code in "CancelRequest (F)".
SSL_REQUEST = bytes.fromhex("0000000804d2162f")
GSS_REQUEST = bytes.fromhex("0000000804d21630")
CANCEL_CODE = bytes.fromhex("04d2162e")
_CHUNK = 65536
_STEP = 0.05
_STALLED = 30.0


class TlsProxy:
    """Accept TLS on a free loopback port and forward the plain text, both ways, until either side ends.

    To delay or break such a connection put a `TcpProxy` before it (the cut falls between TLS records or inside
    one) or behind it (the client sees an orderly end of TLS). psycopg's `cancel` deadlocks here as it does with
    `TcpProxy`.

    Args:
        upstream_host: The plain server's host.
        upstream_port: The plain server's port.
        postgres: Answer PostgreSQL's SSLRequest before the handshake, as libpq's `sslmode=verify-full` wants.

    Attributes:
        port: The loopback port.
        ca_file: The certificate authority to trust, in PEM (`sslrootcert`, or `cafile` of an SSL context).
        accepted: How many TLS handshakes succeeded.
    """

    host = "127.0.0.1"

    def __init__(self, upstream_host: str, upstream_port: int, *, postgres: bool = False) -> None:
        self.accepted = 0
        self._upstream = (upstream_host, upstream_port)
        self._postgres = postgres
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._waiting: set[socket.socket] = set()
        self._established: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        authority = trustme.CA()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1", "localhost").configure_cert(self._context)
        self._folder = tempfile.TemporaryDirectory(prefix="workerpools-tls-")
        self.ca_file = Path(self._folder.name) / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca_file))
        self._listener = socket.create_server((self.host, 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        drop_in_forked_child(self._all_sockets)
        self._start(self._accept)

    def __enter__(self) -> TlsProxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def open(self) -> int:
        """How many TLS connections are open."""
        return len(self._established)

    def client_context(self) -> ssl.SSLContext:
        """Return a client's context that trusts this proxy's authority alone."""
        return ssl.create_default_context(cafile=str(self.ca_file))

    def close(self) -> None:
        """End every connection and stop listening, once."""
        if self._closing.is_set() or self._pid != os.getpid():
            return
        self._closing.set()
        close_listener(self._listener)
        for sock in list(self._waiting):
            # Wakes a thread out of a handshake that does not come.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(_STALLED)
        self._folder.cleanup()

    def _all_sockets(self) -> Iterable[socket.socket]:
        yield self._listener
        yield from list(self._sockets)

    def _start(self, target: object, *args: object) -> None:
        assert callable(target)
        thread = threading.Thread(target=target, args=args, name=f"TlsProxy-{self.port}", daemon=True)
        with self._lock:
            self._threads = [known for known in self._threads if known.is_alive()]
            # Started before it is listed: a thread that was not started cannot be joined.
            thread.start()
            self._threads.append(thread)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.add(client)
            self._waiting.add(client)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        tls: ssl.SSLSocket | None = None
        upstream: socket.socket | None = None
        try:
            # Bounds the handshake: a client that connects and says nothing must not hold `close` up.
            client.settimeout(5.0)
            if self._postgres:
                first = client.recv(16)
                if first == GSS_REQUEST:
                    client.sendall(b"N")
                    first = client.recv(16)
                if first[4:8] == CANCEL_CODE:
                    # libpq's older cancel call never speaks TLS; a real server takes it on the same port.
                    with socket.create_connection(self._upstream, timeout=5.0) as cancel:
                        cancel.sendall(first)
                        cancel.recv(1)
                    return
                if first != SSL_REQUEST:
                    return
                client.sendall(b"S")
            tls = self._context.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
            self._sockets.add(tls)
            self._waiting.add(tls)
            tls.do_handshake()
            self._waiting -= {client, tls}
            self._established.add(tls)
            self.accepted += 1
            upstream = socket.create_connection(self._upstream, timeout=5.0)
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.add(upstream)
            self._relay(tls, upstream)
        except OSError:
            # Includes every TLS error: a client that refuses the certificate is no failure of the proxy's.
            pass
        finally:
            for sock in (upstream, tls, client):
                if sock is not None:
                    for known in (self._sockets, self._waiting, self._established):
                        known.discard(sock)
                    with contextlib.suppress(OSError):
                        sock.close()

    def _relay(self, tls: ssl.SSLSocket, upstream: socket.socket) -> None:
        # One thread for both directions: an SSL object must not be used by two at once.
        tls.setblocking(False)
        upstream.settimeout(_STALLED)
        while not self._closing.is_set():
            # A chunk is larger than a TLS record, and OpenSSL reads one record at a time: nothing stays buffered
            # where select would not see it.
            ready = select.select([tls, upstream], [], [], _STEP)[0]
            if tls in ready:
                try:
                    data = tls.recv(_CHUNK)
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    data = None
                if data == b"":
                    break
                if data:
                    upstream.sendall(data)
            if upstream in ready:
                data = upstream.recv(_CHUNK)
                if not data:
                    break
                self._send(tls, data)
        with contextlib.suppress(OSError):
            # Sends the close alert; the client's own is not waited for.
            tls.unwrap()

    def _send(self, tls: ssl.SSLSocket, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._closing.is_set():
            try:
                view = view[tls.send(view) :]
            except ssl.SSLWantWriteError:
                select.select([], [tls], [], _STEP)
            except ssl.SSLWantReadError:
                select.select([tls], [], [], _STEP)
