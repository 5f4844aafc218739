"""One connection: what leaves on it, what is answered, and what becomes of both when it is lost."""

from __future__ import annotations

import random
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from workerpools.adapter import Effect, Failure, FailureKind, Phase, Sent, add_note, deadline
from workerpools.errors import DeadlineExceeded
from workerpools.redis._commands import ENDING, UNKNOWN, Command, command_of, server_wait
from workerpools.redis._errors import Answer, answered, classify_connecting, code_of

if TYPE_CHECKING:
    from typing import Any as _Driver
else:
    _Driver = object

__all__ = ["BoundedSocket", "WatchedConnection", "effects_of_lock"]

# A socket with a timeout of 0 does not wait, and fails with an error other than a timeout.
_LEAST = 0.001

#: Collects the effects of the commands that a lock sends in this context.
effects_of_lock: ContextVar[list[Effect] | None] = ContextVar("workerpools_redis_lock", default=None)


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
        self.raw.settimeout(ends if not ends else max(_LEAST, ends - time.monotonic()))

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


class Exchange:
    """Commands that were sent together, and what is known of them.

    Attributes:
        commands: The commands.
        effect: The effect that they are; None where all are harmless.
        writes: How many of them may have done something.
        whole: Whether a part of them does nothing: one command, or MULTI to EXEC.
        reused: Whether the connection had served before.
    """

    __slots__ = ("commands", "effect", "reused", "whole", "writes")

    def __init__(self, commands: Sequence[Command], reused: bool) -> None:
        self.commands = commands
        self.reused = reused
        self.effect: Effect | None = None
        self.writes = 0
        last = commands[-1]
        self.whole = len(commands) == 1 or (commands[0].name == "MULTI" and last.name == "EXEC")

    @property
    def name(self) -> str:
        """What was sent, for messages."""
        if len(self.commands) == 1:
            return self.commands[0].name
        return "a transaction" if self.whole else "a pipeline"

    def refused(self) -> None:
        """One of the commands did nothing."""
        self.writes -= 1
        if self.writes <= 0:
            self.never_done()

    def never_done(self) -> None:
        """None of the commands did anything."""
        self.writes = 0
        if self.effect is not None:
            self.effect.withdraw()


class WatchedConnection(_Driver):  # type: ignore[misc]
    """The part of a connection that reports; the driver's own class is the other base.

    Args:
        pool: The pool that makes it, a ``WatchedPool``.
        options: The driver's options.

    Attributes:
        made: When it was opened, on the clock of :func:`time.monotonic`.
        returned: When it was last returned to the pool.
        lives: Its maximum lifetime, in seconds; None for no limit.
        reused: Whether it has served before.
        reason: Why it is closed, for the statistics.
        retired: Whether it must not connect again: it belongs to nobody.
    """

    def __init__(self, pool: Any, **options: Any) -> None:
        self.pool = pool
        self.made = self.returned = 0.0
        self.lives: float | None = None
        self.reused = False
        self.reason = ""
        self.retired = False
        self._raw: socket.socket | None = None
        self._ends: float | None = None
        self._connecting = False
        #: The commands that the next bytes are.
        self._announced: Sequence[Sequence[Any]] | None = None
        #: The replies to come: each command, with what it was sent with.
        self._replies: deque[tuple[Exchange, Command]] = deque()
        self._left: set[str] = set()
        super().__init__(**options)

    # Bounds. The driver reads these whenever it waits for something else than an answer.

    @property
    def socket_timeout(self) -> float | None:
        """The time left to connect, in seconds; else the timeout of an answer."""
        if not self._connecting or self._ends is None:
            timeout: float | None = self.pool.timeout
            return timeout
        return deadline().clamp(max(_LEAST, self._ends - time.monotonic()), _LEAST)

    @socket_timeout.setter
    def socket_timeout(self, value: float | None) -> None:
        return

    @property
    def socket_connect_timeout(self) -> float | None:
        """The time left to connect, in seconds."""
        return self.socket_timeout

    @socket_connect_timeout.setter
    def socket_connect_timeout(self, value: float | None) -> None:
        return

    # Connecting.

    def connect(self) -> None:
        """Connect and log in, unless connected."""
        if self._sock is not None:
            return
        library, opening = self.pool.library, self.pool.opening
        if self.retired:
            raise library.ConnectionError("this connection was given back to its pool at the end of its attempt")
        if deadline().remaining() == 0.0:
            raise DeadlineExceeded(
                f"no connection of the resource {opening.resource!r} was opened: the task's deadline has passed"
            )
        began = time.monotonic()
        self._ends = began + self.pool.connect_timeout
        self._replies.clear()
        self._left.clear()
        self.reused, self.reason = False, ""
        self._connecting = True
        opening.descriptors.connecting(*self.pool.ports)
        try:
            if self.pool.sentinel is not None:
                self.host, self.port = self.pool.sentinel.primary()
            super().connect()
            opening.created(time.monotonic() - began)
            self.returned = time.monotonic()
        except BaseException as error:
            self.disconnect()
            if isinstance(error, (library.RedisError, OSError)):
                self._not_connected(error)
            raise
        finally:
            self._connecting = False
            opening.descriptors.gave_up()

    def _not_connected(self, error: BaseException) -> None:
        opening = self.pool.opening
        timed_out = isinstance(error, (self.pool.library.TimeoutError, TimeoutError))
        add_note(error, f"workerpools: connecting by the resource {opening.resource!r}")
        if timed_out and deadline().remaining() == 0.0:
            opening.failed(error, None, phase=Phase.CONNECT, deadline=True)
        else:
            opening.failed(error, classify_connecting(error, timed_out=timed_out))

    def connect_check_health(self, *arguments: Any, **options: Any) -> None:
        """Connect; where the driver connects by itself, too."""
        if self._connecting:
            super().connect_check_health(*arguments, **options)
        else:
            self.connect()

    def _connect(self) -> BoundedSocket:
        self._raw = raw = super()._connect()
        self.made = time.monotonic()
        self.lives = self.pool.lifetime.drawn(random.random())
        self.pool.opening.connected(raw)
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
        parser = self._parser
        if self.protocol in (3, "3") and type(parser).__name__ == "_RESP2Parser":
            self.set_parser(self.pool.library.RESP3)
            self._parser.EXCEPTION_CLASSES = parser.EXCEPTION_CLASSES
        self._parser.on_connect(self)
        super().send_packed_command(super().pack_commands(commands), check_health=False)
        for command in commands:
            try:
                answer = super().read_response()
            except self.pool.library.ResponseError:
                if command[0] in needed:
                    raise
                continue
            if command[0] == "HELLO":
                self.handshake_metadata = answer
            elif command[0] == "ROLE" and answer[0] not in (b"master", "master"):
                raise self.pool.library.ConnectionError("the server that Sentinel names is not a primary yet")

    def on_connect_check_health(self, check_health: bool = True) -> None:
        """Log in, as newer drivers call it."""
        self.on_connect()

    def _log_in(self) -> tuple[list[tuple[Any, ...]], tuple[str, ...]]:
        """Return the commands that set a connection up, and those that must succeed."""
        credentials = self.pool.credentials
        found: Any = ()
        if credentials is not None:
            found = credentials()
            found = (found,) if isinstance(found, str) else tuple(found)
        elif self.credential_provider is not None:
            found = tuple(self.credential_provider.get_credentials())
        elif self.username or self.password:
            found = (self.username, self.password or "") if self.username else (self.password,)
        commands: list[tuple[Any, ...]] = []
        if self.protocol in (3, "3"):
            login = ("AUTH", *(found if len(found) == 2 else ("default", *found))) if found else ()
            commands.append(("HELLO", 3, *login))
        elif found:
            commands.append(("AUTH", *found))
        commands.append(("CLIENT", "SETINFO", "LIB-NAME", f"{self.pool.library.name}(workerpools)"))
        commands.append(("CLIENT", "SETINFO", "LIB-VER", self.pool.library.version))
        if self.client_name:
            commands.append(("CLIENT", "SETNAME", self.client_name))
        if self.db:
            commands.append(("SELECT", self.db))
        if self.pool.sentinel is not None:
            commands.append(("ROLE",))
        return commands, ("HELLO", "AUTH", "SELECT", "ROLE")

    def disconnect(self, *arguments: Any, **options: Any) -> None:
        """Close the connection; the next use opens another."""
        raw, self._raw = self._raw, None
        # Before an answer has come: lost, or interrupted.
        reason = self.reason or ("stale" if self._replies else "other")
        try:
            super().disconnect(*arguments, **options)
        finally:
            if raw is not None:
                raw.close()
                self.pool.opening.disconnected(raw, reason=reason, age=time.monotonic() - self.made)

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
            if sock.sent == 0 or (exchange.whole and sock.sent < size):
                # The server acts on whole commands only.
                exchange.never_done()
                self._lost(error, (exchange,), Sent.PARTIAL if sock.sent else Sent.NOTHING)
            else:
                self._lost(error, (exchange,), Sent.UNKNOWN)
            raise

    def _begin(self, announced: Sequence[Sequence[Any]] | None) -> Exchange:
        opening = self.pool.opening
        timeout: float | None = self.pool.timeout
        if announced:
            commands: Sequence[Command] = [command_of(arguments) for arguments in announced]
        else:
            commands = (UNKNOWN,)
        exchange = Exchange(commands, self.reused)
        if deadline().remaining() == 0.0:
            raise DeadlineExceeded(
                f"{exchange.name} by the resource {opening.resource!r} was not sent: the task's deadline has passed"
            )
        for place, command in enumerate(commands):
            if not command.harmless and not (command.name == "EXEC" and exchange.whole and len(commands) > 1):
                exchange.writes += 1
            if command.leaves:
                self._left.add(command.name)
            elif (ended := ENDING.get(command.name)) is not None:
                self._left.difference_update(ended)
            if command.waits and announced and timeout is not None:
                asked = server_wait(command, announced[place])
                timeout = None if asked is None else timeout + asked
        if exchange.writes:
            exchange.effect = effect = opening.effect(f"{exchange.name} by {opening.resource!r}")
            if exchange.whole:
                exchange.writes = 1
            if (collected := effects_of_lock.get()) is not None:
                collected.append(effect)
        self._replies.extend((exchange, command) for command in commands)
        self._sock.begin(timeout)
        return exchange

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
        if self._replies:
            exchange, command = self._replies.popleft()
            if answer is None and command.name == "EXEC":
                # A watched key had changed.
                exchange.never_done()
        return answer

    def can_read(self, timeout: float = 0) -> Any:
        """Wait for a message."""
        try:
            found = super().can_read(timeout)
        except self.pool.library.ConnectionError as error:
            self._lost(error, (), Sent.UNKNOWN)
            raise
        if not found and timeout and deadline().remaining() == 0.0:
            raise DeadlineExceeded(
                f"no message came by the resource {self.pool.opening.resource!r} before the task's deadline"
            )
        return found

    def _failed(self, error: Exception) -> None:
        library = self.pool.library
        code = code_of(error)
        if code:
            exchange, command = self._replies.popleft() if self._replies else _unasked(self.reused)
            # A command of a transaction is not done before EXEC.
            whole = command.whole or (exchange.whole and command.name != "EXEC" and len(exchange.commands) > 1)
            answer = answered(code, str(error), whole=whole, reused=exchange.reused)
            self._answered(error, answer, code, exchange, command)
        elif isinstance(error, (library.ConnectionError, library.TimeoutError)):
            # Without repetition, in order.
            self._lost(error, tuple(dict.fromkeys(exchange for exchange, _ in self._replies)), Sent.UNKNOWN)

    def _answered(self, error: Exception, answer: Answer, code: str, exchange: Exchange, command: Command) -> None:
        if answer.nothing and not command.harmless and (command.name != "EXEC" or code == "EXECABORT"):
            exchange.refused()
        if answer.kind is None:
            return
        failure = Failure(answer.kind, Sent.ALL, phase=Phase.RESPONSE, code=code, known=f"{answer.known} ({code})")
        add_note(error, f"workerpools: {exchange.name} by the resource {self.pool.opening.resource!r}")
        self.pool.opening.failed(error, failure)
        if answer.kind is FailureKind.STALE or code in ("READONLY", "UNBLOCKED"):
            # A new connection may lead to the new primary.
            self.pool.retire(time.monotonic(), "stale")

    def _lost(self, error: Exception, exchanges: Sequence[Exchange], sent: Sent) -> None:
        opening = self.pool.opening
        timed_out = isinstance(error, self.pool.library.TimeoutError)
        name = exchanges[0].name if exchanges else "a wait for a message"
        add_note(error, f"workerpools: {name} by the resource {opening.resource!r}")
        self._left.add("")
        if timed_out and deadline().remaining() == 0.0:
            add_note(error, "workerpools: the task's deadline had passed")
            opening.failed(error, None, phase=Phase.REQUEST, deadline=True)
            return
        reused = exchanges[0].reused if exchanges else True
        if any(exchange.writes for exchange in exchanges):
            kind, known = FailureKind.INDETERMINATE, "the server may have acted on the command"
        elif timed_out or not reused:
            kind, known = FailureKind.UNAVAILABLE, _UNDONE
        else:
            kind, known = FailureKind.STALE, f"a kept connection was dead, and {_UNDONE}"
        opening.failed(error, Failure(kind, sent, phase=Phase.REQUEST, timed_out=timed_out, known=known))
        if not timed_out:
            self.pool.retire(time.monotonic(), "stale")

    # For the pool.

    def is_clean(self) -> bool:
        """Return whether the next task may use it: every answer was read, and nothing was left on it."""
        return self._sock is not None and not self._replies and not self._left

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


def _unasked(reused: bool) -> tuple[Exchange, Command]:
    return Exchange((UNKNOWN,), reused), UNKNOWN


_UNDONE = "the server has changed nothing"
