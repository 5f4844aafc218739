"""What left on a connection, what was answered, and what becomes of both when it is lost, whoever waits for it."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from workerpools.adapter import Effect, Failure, FailureKind, Phase, Sent, add_note, deadline
from workerpools.errors import DeadlineExceeded
from workerpools.redis._commands import ENDING, UNKNOWN, Command, command_of, server_wait
from workerpools.redis._errors import Answer, answered, classify_connecting, code_of

__all__ = ["LEAST", "Exchange", "Watched", "effects_of_lock"]

#: A timeout of 0 does not wait, and fails with an error other than a timeout. In seconds.
LEAST = 0.001

#: Collects the effects of the commands that a lock sends in this context.
effects_of_lock: ContextVar[list[Effect] | None] = ContextVar("workerpools_redis_lock", default=None)


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


class Watched:
    """The part of a connection that knows and decides. A synchronous and an asynchronous one send and receive.

    Args:
        pool: The pool that makes it, a ``Pooled``.
        options: The driver's options.

    Attributes:
        made: When it was opened, on the clock of :func:`time.monotonic`.
        returned: When it was last returned to the pool.
        lives: Its maximum lifetime, in seconds; None for no limit.
        reused: Whether it has served before.
        reason: Why it is closed, for the statistics.
        retired: Whether it must not connect again: it belongs to nobody.
    """

    # Of the driver's class, which is the other base.
    protocol: Any
    credential_provider: Any
    username: str | None
    password: str | None
    client_name: str | None
    db: Any
    handshake_metadata: Any
    set_parser: Any
    _parser: Any

    def __init__(self, pool: Any, **options: Any) -> None:
        self.pool = pool
        self.made = self.returned = 0.0
        self.lives: float | None = None
        self.reused = False
        self.reason = ""
        self.retired = False
        #: The socket, while it is open.
        self._raw: Any = None
        self._connecting = False
        #: The commands that the next bytes are.
        self._announced: Sequence[Sequence[Any]] | None = None
        #: The replies to come: each command, with what it was sent with.
        self._replies: deque[tuple[Exchange, Command]] = deque()
        self._left: set[str] = set()
        super().__init__(**options)

    @property
    def is_open(self) -> bool:
        """Whether it is connected."""
        raise NotImplementedError

    def drop(self) -> None:
        """Close it at once; the next use opens another."""
        raise NotImplementedError

    def _bound(self, timeout: float | None) -> None:
        """End what is waited for from now on after ``timeout`` seconds, and by the task's deadline."""
        raise NotImplementedError

    @property
    def socket_connect_timeout(self) -> float | None:
        """The time left to connect, in seconds."""
        bounded: Any = self
        left: float | None = bounded.socket_timeout
        return left

    @socket_connect_timeout.setter
    def socket_connect_timeout(self, value: float | None) -> None:
        return

    # Connecting.

    @contextmanager
    def _opening(self) -> Generator[None, None, None]:
        """Count and bound the opening of the connection; say what it means when it fails."""
        library, opening = self.pool.library, self.pool.opening
        if self.retired:
            raise library.ConnectionError("this connection was given back to its pool at the end of its attempt")
        if deadline().remaining() == 0.0:
            raise DeadlineExceeded(
                f"no connection of the resource {opening.resource!r} was opened: the task's deadline has passed"
            )
        began = time.monotonic()
        self._replies.clear()
        self._left.clear()
        self.reused, self.reason = False, ""
        self._connecting = True
        try:
            yield
            opening.created(time.monotonic() - began)
            self.returned = time.monotonic()
        except BaseException as error:
            self.drop()
            if isinstance(error, (library.RedisError, OSError)):
                self._not_connected(error)
            raise
        finally:
            self._connecting = False

    def _not_connected(self, error: BaseException) -> None:
        opening = self.pool.opening
        timed_out = isinstance(error, (self.pool.library.TimeoutError, TimeoutError))
        add_note(error, f"workerpools: connecting by the resource {opening.resource!r}")
        if timed_out and deadline().remaining() == 0.0:
            opening.failed(error, None, phase=Phase.CONNECT, deadline=True)
        else:
            opening.failed(error, classify_connecting(error, timed_out=timed_out))

    def _opened(self, raw: Any) -> None:
        """Note the socket of the connection, which is open from now on."""
        self._raw = raw
        self.made = time.monotonic()
        self.lives = self.pool.lifetime.drawn(random.random())
        self.pool.opening.connected(raw)

    def _closed(self, raw: Any) -> None:
        """Note that the connection's socket was closed."""
        # Before an answer has come: lost, or interrupted.
        reason = self.reason or ("stale" if self._replies else "other")
        self.pool.opening.disconnected(raw, reason=reason, age=time.monotonic() - self.made)

    def _begin_protocol(self) -> None:
        parser = self._parser
        if self.protocol in (3, "3") and type(parser).__name__.endswith("RESP2Parser"):
            self.set_parser(self.pool.library.RESP3)
            self._parser.EXCEPTION_CLASSES = parser.EXCEPTION_CLASSES
        self._parser.on_connect(self)

    def _logged_in(self, command: Sequence[Any], answer: Any) -> None:
        """Note the answer to one of the commands that set a connection up."""
        if command[0] == "HELLO":
            self.handshake_metadata = answer
        elif command[0] == "ROLE" and answer[0] not in (b"master", "master"):
            raise self.pool.library.ConnectionError("the server that Sentinel names is not a primary yet")

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

    # Sending.

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
        self._bound(timeout)
        return exchange

    def _unsent(self, error: Exception, exchange: Exchange, sent: int, size: int) -> None:
        """Say what an error of sending means.

        Args:
            error: The error.
            exchange: What was to be sent.
            sent: The number of bytes that the system has taken.
            size: The number of all bytes.
        """
        if sent == 0 or (exchange.whole and sent < size):
            # The server acts on whole commands only.
            exchange.never_done()
            self._lost(error, (exchange,), Sent.PARTIAL if sent else Sent.NOTHING)
        else:
            self._lost(error, (exchange,), Sent.UNKNOWN)

    # Receiving.

    def _answer(self, answer: Any) -> None:
        """Note an answer."""
        if self._replies:
            exchange, command = self._replies.popleft()
            if answer is None and command.name == "EXEC":
                # A watched key had changed.
                exchange.never_done()

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
        return self.is_open and not self._replies and not self._left

    def _no_message(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"no message came by the resource {self.pool.opening.resource!r} before the task's deadline"
        )


def _unasked(reused: bool) -> tuple[Exchange, Command]:
    return Exchange((UNKNOWN,), reused), UNKNOWN


_UNDONE = "the server has changed nothing"
