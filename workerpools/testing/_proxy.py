"""A TCP proxy that can refuse, silence and cut connections."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

__all__ = ["TcpProxy"]

_CHUNK = 65536

# How often the listening thread checks whether to stop, in seconds.
_LOOK = 0.05


class _Link:
    """A client's connection, and its counterpart to the server."""

    def __init__(self, client: socket.socket, server: socket.socket, silent: bool) -> None:
        self.client = client
        self.server = server
        self.silent = silent
        #: Whether the server's next bytes are the answer to lose.
        self.losing = False
        self.ended = False
        #: The number of threads that use the sockets.
        self.users = 2


class TcpProxy:
    """Forwards connections from a free loopback port to a server.

    A context manager. Every method returns after it has taken effect.

    Args:
        host: The server's host.
        port: The server's port.

    Attributes:
        host: The loopback address to connect to.
        port: The port to connect to; the same after :meth:`stop` and :meth:`start`.
        accepted: The number of connections accepted so far.
        lost: The number of answers lost by :meth:`lose_answer`.
    """

    host = "127.0.0.1"

    def __init__(self, host: str, port: int) -> None:
        self.accepted = 0
        self.lost = 0
        self._server = (host, port)
        self._links: list[_Link] = []
        self._silent = False
        self._held = 0
        self._marker: bytes | None = None
        self._changed = threading.Condition()
        # Bound but never listening: reserves the port while the proxy is stopped.
        self._claim = socket.socket()
        self._claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._claim.bind((self.host, 0))
        self.port: int = self._claim.getsockname()[1]
        self._running: threading.Thread | None = None
        self.start()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def open(self) -> int:
        """The number of open connections."""
        with self._changed:
            return len(self._links)

    @property
    def held(self) -> int:
        """The number of chunks held back while the proxy is silent."""
        return self._held

    def wait_for(self, condition: Callable[[TcpProxy], bool], timeout: float = 5.0) -> None:
        """Wait until ``condition(proxy)`` holds.

        Args:
            condition: Evaluated after every change: ``lambda proxy: proxy.open == 0``.
            timeout: In seconds.

        Raises:
            TimeoutError: The condition did not hold in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), timeout):
                raise TimeoutError(f"waited {timeout:g} s for {self!r}")

    def start(self) -> None:
        """Accept connections."""
        if self._running is None:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.host, self.port))
            listener.listen(128)
            listener.settimeout(_LOOK)
            self._running = threading.Thread(target=self._listen, args=(listener,), daemon=True)
            self._running.start()

    def stop(self) -> None:
        """Refuse new connections; open ones are unaffected."""
        running, self._running = self._running, None
        if running is not None:
            running.join()

    def cut(self) -> None:
        """Close every open connection."""
        with self._changed:
            links = list(self._links)
        for link in links:
            self._end(link)

    def silence(self, *, new: bool = True) -> None:
        """Keep connections open and forward nothing.

        Args:
            new: Whether later connections are silent, too: accepted, and never answered.
        """
        with self._changed:
            self._silent = new
            for link in self._links:
                link.silent = True

    def resume(self) -> None:
        """Forward again, beginning with the data held back."""
        with self._changed:
            self._silent = False
            for link in self._links:
                link.silent = False
            self._changed.notify_all()

    def lose_answer(self, to: bytes = b"") -> None:
        """Lose the answer to one request: the request is delivered, and its answer closes the connection.

        Args:
            to: Identifies the request: the next one that contains these bytes.
        """
        with self._changed:
            self._marker = to

    def close(self) -> None:
        """Stop, and close every connection."""
        self.stop()
        self.cut()
        self._claim.close()

    def _listen(self, listener: socket.socket) -> None:
        with listener:
            while self._running is threading.current_thread():
                with contextlib.suppress(OSError):
                    self._accept(listener.accept()[0])

    def _accept(self, client: socket.socket) -> None:
        try:
            client.settimeout(None)
            server = socket.create_connection(self._server, 5.0)
            server.settimeout(None)
        except OSError:
            client.close()
            raise
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._changed:
            link = _Link(client, server, self._silent)
            self._links.append(link)
            self.accepted += 1
            self._changed.notify_all()
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=self._forward, args=(link, source, target), daemon=True).start()

    def _forward(self, link: _Link, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(_CHUNK):
                self._hold(link)
                if source is link.server and link.losing:
                    self.lost += 1
                    return
                if source is link.client and self._marker is not None and self._marker in data:
                    self._marker, link.losing = None, True
                target.sendall(data)
        except OSError:
            return
        finally:
            self._end(link)
            with self._changed:
                link.users -= 1
                over = link.users == 0
            if over:
                link.client.close()
                link.server.close()

    def _hold(self, link: _Link) -> None:
        with self._changed:
            if link.silent:
                self._held += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: link.ended or not link.silent)
                self._held -= 1

    def _end(self, link: _Link) -> None:
        with self._changed:
            if link.ended:
                return
            link.ended = True
            for each in (link.client, link.server):
                # Shut down only: another thread may be about to read from the descriptor.
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            self._links.remove(link)
            self._changed.notify_all()

    def __repr__(self) -> str:
        return f"<TcpProxy {self.host}:{self.port} accepted={self.accepted} open={self.open} held={self.held}>"
