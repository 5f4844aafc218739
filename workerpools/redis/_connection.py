"""One synchronous connection, and the socket that bounds its waits."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from workerpools.adapter import Sent, deadline
from workerpools.redis._exchange import LEAST, Watched

if TYPE_CHECKING:
    from typing import Any as _Driver
else:
    _Driver = object

__all__ = ["BoundedSocket", "WatchedConnection"]


class BoundedSocket:
    """A socket whose waits end together at one time, however many reads and writes an exchange takes.

    Args:
        raw: The socket, connected.

    Attributes:
        ends: When the waits end, on the clock of :func:`time.monotonic`; None for never, 0 for not waiting.
        sent: The number of bytes that the system has taken since the exchange began.
    """

    def __init__(self, raw: socket.socket) -> None:
        self.raw = raw
        self.ends: float | None = None
        self.sent = 0

    def begin(self, timeout: float | None) -> None:
        """Begin an exchange, which may take ``timeout`` seconds, and not longer than until the task's deadline."""
        self.sent = 0
        if timeout is not None:
            timeout += time.monotonic()
        at = deadline().at
        self.ends = timeout if at is None or (timeout is not None and timeout < at) else at

    def settimeout(self, value: float | None) -> None:
        """Bound the waits that follow, as the driver asks for it."""
        if value == 0:
            self.ends = 0.0
        else:
            sent = self.sent
            self.begin(value)
            self.sent = sent

    def _wait(self) -> None:
        ends = self.ends
        self.raw.settimeout(ends if not ends else max(LEAST, ends - time.monotonic()))

    def sendall(self, data: bytes) -> None:
        """Send everything."""
        self._wait()
        count = self.raw.send(data)
        self.sent += count
        if count < len(data):
            rest = memoryview(data).cast("B")[count:]
            while rest:
                self._wait()
                count = self.raw.send(rest)
                self.sent += count
                rest = rest[count:]

    def recv(self, size: int) -> bytes:
        """Receive, within the bound."""
        self._wait()
        return self.raw.recv(size)

    def recv_into(self, buffer: Any, *sizes: int) -> int:
        """Receive, within the bound."""
        self._wait()
        return self.raw.recv_into(buffer, *sizes)

    def has_ended(self) -> bool:
        """Return whether the server has closed the connection or sent something unasked; no round trip."""
        raw = self.raw
        try:
            raw.settimeout(0)
            # TLS cannot peek. What it returns instead of data leaves the connection usable.
            raw.recv(1, *((socket.MSG_PEEK,) if type(raw) is socket.socket else ()))
        except BlockingIOError:
            return False
        except OSError as error:
            return type(error).__name__ != "SSLWantReadError"
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


class WatchedConnection(Watched, _Driver):  # type: ignore[misc]
    """The part of a connection that reports; the driver's own class is the other base."""

    def __init__(self, pool: Any, **options: Any) -> None:
        self._ends: float | None = None
        super().__init__(pool, **options)

    @property
    def is_open(self) -> bool:
        return self._sock is not None

    def drop(self) -> None:
        self.disconnect()

    def _bound(self, timeout: float | None) -> None:
        self._sock.begin(timeout)

    # Bounds. The driver reads these whenever it waits for something else than an answer.

    @property
    def socket_timeout(self) -> float | None:
        """The time left to connect, in seconds; else the timeout of an answer."""
        if not self._connecting or self._ends is None:
            timeout: float | None = self.pool.timeout
            return timeout
        return deadline().clamp(max(LEAST, self._ends - time.monotonic()), LEAST)

    @socket_timeout.setter
    def socket_timeout(self, value: float | None) -> None:
        return

    # Connecting.

    def connect(self) -> None:
        """Connect and log in, unless connected."""
        if self._sock is not None:
            return
        descriptors = self.pool.opening.descriptors
        with self._opening():
            self._ends = time.monotonic() + self.pool.connect_timeout
            descriptors.connecting(*self.pool.ports)
            try:
                if self.pool.sentinel is not None:
                    self.host, self.port = self.pool.sentinel.primary()
                super().connect()
            finally:
                descriptors.gave_up()

    def connect_check_health(self, *arguments: Any, **options: Any) -> None:
        """Connect; where the driver connects by itself, too."""
        if self._connecting:
            super().connect_check_health(*arguments, **options)
        else:
            self.connect()

    def _connect(self) -> BoundedSocket:
        raw = super()._connect()
        self._opened(raw)
        bounded = BoundedSocket(raw)
        bounded.begin(self.socket_timeout)
        return bounded

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> socket.socket:
        # Built once: the driver would build one for each connection, which takes longer than the rest.
        context: ssl.SSLContext = self.pool.tls()
        return context.wrap_socket(sock, server_hostname=self.host)

    def on_connect(self) -> None:
        """Log in and select the database: all in one round trip."""
        commands, needed = self._log_in()
        self._begin_protocol()
        super().send_packed_command(super().pack_commands(commands), check_health=False)
        for command in commands:
            try:
                answer = super().read_response()
            except self.pool.library.ResponseError:
                if command[0] in needed:
                    raise
                continue
            self._logged_in(command, answer)

    def on_connect_check_health(self, check_health: bool = True) -> None:
        """Log in, as newer drivers call it."""
        self.on_connect()

    def disconnect(self, *arguments: Any, **options: Any) -> None:
        """Close the connection; the next use opens another."""
        raw, self._raw = self._raw, None
        try:
            super().disconnect(*arguments, **options)
        finally:
            if raw is not None:
                raw.close()
                self._closed(raw)

    # Sending.

    def send_command(self, *arguments: Any, **options: Any) -> None:
        """Send a command."""
        self._announced = (arguments,)
        super().send_command(*arguments, **options)

    def pack_commands(self, commands: Iterable[Sequence[Any]]) -> Any:
        """Pack the commands that are sent next."""
        self._announced = commands = list(commands)
        return super().pack_commands(commands)

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send what was packed."""
        announced, self._announced = self._announced, None
        if self._sock is None:
            self.connect()
        exchange = self._begin(announced)
        sock: Any = self._sock
        try:
            super().send_packed_command(command, check_health=False)
        except (self.pool.library.ConnectionError, self.pool.library.TimeoutError) as error:
            size = len(command) if isinstance(command, (str, bytes)) else sum(map(len, command))
            self._unsent(error, exchange, sock.sent, size)
            raise

    # Receiving.

    def read_response(self, *arguments: Any, **options: Any) -> Any:
        """Read one answer."""
        if not self._replies and self._sock is not None:
            # A message, which comes when it comes.
            self._sock.begin(None)
        try:
            answer = super().read_response(*arguments, **options)
        except Exception as error:
            self._failed(error)
            raise
        self._answer(answer)
        return answer

    def can_read(self, timeout: float = 0) -> Any:
        """Wait for a message."""
        try:
            found = super().can_read(timeout)
        except self.pool.library.ConnectionError as error:
            self._lost(error, (), Sent.UNKNOWN)
            raise
        if not found and timeout and deadline().remaining() == 0.0:
            raise self._no_message()
        return found

    # For the pool.

    def has_ended(self) -> bool:
        """Return whether it is surely unusable. No round trip."""
        return bool(self._sock.has_ended())

    def answers(self) -> bool:
        """Return whether the server answers, in a round trip."""
        self._sock.begin(min(self.pool.timeout or self.pool.connect_timeout, self.pool.connect_timeout))
        try:
            super().send_packed_command(self._command_packer.pack("PING"), check_health=False)
            super().read_response()
        except (self.pool.library.RedisError, OSError):
            return False
        return True

    def interrupt(self) -> None:
        """End the wait of the thread that uses it, which then closes it."""
        if (raw := self._raw) is not None:
            self.reason = "shutdown"
            try:
                raw.shutdown(socket.SHUT_RDWR)
            except OSError:
                return
