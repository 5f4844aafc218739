"""The asynchronous connection and pool: what they await. All that is known and decided is the synchronous ones'."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from workerpools.adapter import Due, Lease, deadline, loop_is_running, on_loop, start_coroutine
from workerpools.redis._exchange import LEAST, Watched
from workerpools.redis._pool import Pooled

if TYPE_CHECKING:
    from typing import Any as _Driver
else:
    _Driver = object

__all__ = ["AsyncWatchedConnection", "AsyncWatchedPool"]

#: How long another thread waits for the event loop to do what takes no time, in seconds.
_PROMPT = 5.0


class CountedSocket(socket.socket):
    """A socket that counts what the event loop sends.

    Attributes:
        sent: The number of bytes that the system has taken since it was last set.
    """

    sent = 0

    def send(self, data: Any, *flags: int) -> int:
        """Send what the system takes."""
        count = super().send(data, *flags)
        self.sent += count
        return count

    def sendmsg(self, buffers: Iterable[Any], *options: Any) -> int:
        """Send what the system takes."""
        count = super().sendmsg(buffers, *options)
        self.sent += count
        return count


class AsyncWatchedConnection(Watched, _Driver):  # type: ignore[misc]
    """The part of an asynchronous connection that reports; the driver's own class is the other base."""

    def __init__(self, pool: Any, **options: Any) -> None:
        self._ends: float | None = None
        self._reader: Any = None
        self._writer: Any = None
        super().__init__(pool, **options)

    @property
    def is_open(self) -> bool:
        return self._writer is not None

    # Bounds. The driver reads these whenever it waits.

    def _bound(self, timeout: float | None) -> None:
        at = deadline().at
        ends = None if timeout is None else time.monotonic() + timeout
        self._ends = ends if at is None or (ends is not None and ends < at) else at

    @property
    def socket_timeout(self) -> float | None:
        """The time left, in seconds: to connect, or for the answers to what was sent."""
        return None if self._ends is None else max(LEAST, self._ends - time.monotonic())

    @socket_timeout.setter
    def socket_timeout(self, value: float | None) -> None:
        return

    # Connecting.

    async def connect(self) -> None:
        """Connect and log in, unless connected."""
        if self.is_open:
            return
        with self._opening():
            self._bound(self.pool.connect_timeout)
            if self.pool.sentinel is not None:
                # It waits as a thread does.
                self.host, self.port = await asyncio.to_thread(self._primary)
            await super().connect()

    def _primary(self) -> tuple[str, int]:
        descriptors = self.pool.opening.descriptors
        descriptors.connecting()
        try:
            found: tuple[str, int] = self.pool.sentinel.primary()
        finally:
            descriptors.gave_up()
        return found

    async def connect_check_health(self, *arguments: Any, **options: Any) -> None:
        """Connect; where the driver connects by itself, too."""
        if self._connecting:
            await super().connect_check_health(*arguments, **options)
        else:
            await self.connect()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        async with self.pool.library.timeout(self.socket_timeout):
            failed: OSError | None = None
            for family, address in await self._addresses(loop):
                try:
                    await self._connect_to(loop, family, address)
                except OSError as error:
                    failed = error
                else:
                    return
            raise failed or OSError(f"{self.host!r} has no address")

    async def _addresses(self, loop: asyncio.AbstractEventLoop) -> list[tuple[int, Any]]:
        path = getattr(self, "path", None)
        if path is not None:
            return [(socket.AF_UNIX, path)]
        wanted: dict[str, Any] = {"family": self.socket_type, "type": socket.SOCK_STREAM}
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            found = await loop.getaddrinfo(self.host, self.port, **wanted)
        else:
            # Without the thread that the loop would ask in.
            found = socket.getaddrinfo(self.host, self.port, flags=socket.AI_NUMERICHOST, **wanted)
        return [(each[0], each[4]) for each in found]

    async def _connect_to(self, loop: asyncio.AbstractEventLoop, family: int, address: Any) -> None:
        descriptors = self.pool.opening.descriptors
        raw = CountedSocket(family, socket.SOCK_STREAM)
        # From here on a fork knows it.
        descriptors.add(raw)
        try:
            raw.setblocking(False)
            tls: dict[str, Any] = {}
            if family != socket.AF_UNIX:
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.socket_keepalive:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    for option, value in self.socket_keepalive_options.items():
                        raw.setsockopt(socket.IPPROTO_TCP, option, value)
                if hasattr(self, "ssl_context"):
                    tls = {"ssl": self.pool.tls(), "server_hostname": self.host}
            await loop.sock_connect(raw, address)
            reader, writer = await asyncio.open_connection(sock=raw, **tls)
        except BaseException:
            descriptors.drop(raw)
            raw.close()
            raise
        # drain() waits until everything is the system's.
        writer.transport.set_write_buffer_limits(0)
        self._opened(raw)
        self._reader, self._writer = reader, writer

    async def on_connect(self) -> None:
        """Log in and select the database: all in one round trip."""
        commands, needed = self._log_in()
        self._begin_protocol()
        await self._write(self.pack_commands(commands))
        self._announced = None
        for command in commands:
            try:
                answer = await super().read_response()
            except self.pool.library.ResponseError:
                if command[0] in needed:
                    raise
                continue
            self._logged_in(command, answer)

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        """Log in, as newer drivers call it."""
        await self.on_connect()

    async def disconnect(self, *arguments: Any, **options: Any) -> None:
        """Close the connection; the next use opens another."""
        self.drop()

    def _close(self) -> None:
        self.drop()

    def drop(self) -> None:
        raw, self._raw = self._raw, None
        writer, self._writer, self._reader = self._writer, None, None
        self._parser.on_disconnect()
        if (forget := getattr(self, "_reset_himport_state", None)) is not None:
            forget()
        if writer is not None:
            # The loop sends nothing of what it still has, and leaves the socket.
            writer.transport.abort()
        if raw is not None:
            raw.close()
            self._closed(raw)

    # Sending.

    async def send_command(self, *arguments: Any, **options: Any) -> None:
        """Send a command."""
        self._announced = (arguments,)
        await super().send_command(*arguments, **options)

    def pack_commands(self, commands: Iterable[Sequence[Any]]) -> Any:
        """Pack the commands that are sent next."""
        self._announced = commands = list(commands)
        return super().pack_commands(commands)

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send what was packed."""
        announced, self._announced = self._announced, None
        if not self.is_open:
            await self.connect()
        exchange = self._begin(announced)
        raw = self._raw
        try:
            await self._write(command)
        except (self.pool.library.ConnectionError, self.pool.library.TimeoutError) as error:
            size = len(command) if isinstance(command, (str, bytes)) else sum(map(len, command))
            self._unsent(error, exchange, raw.sent, size)
            raise

    async def _write(self, command: Any) -> None:
        """Give bytes to the event loop, and wait until the system has taken them."""
        chunks = [command.encode() if isinstance(command, str) else command]
        writer, self._raw.sent = self._writer, 0
        try:
            writer.writelines(chunks if isinstance(command, (str, bytes)) else command)
            transport = writer.transport
            if transport.get_write_buffer_size() or transport.is_closing():
                async with self.pool.library.timeout(self.socket_timeout):
                    await writer.drain()
                if transport.is_closing():
                    raise ConnectionResetError("Connection lost")
        except asyncio.TimeoutError:
            self.drop()
            raise self.pool.library.TimeoutError("Timeout writing to socket") from None
        except OSError as error:
            self.drop()
            raise self.pool.library.ConnectionError(f"Error while writing to socket. {error}.") from error
        except BaseException:
            self.drop()
            raise

    # Receiving.

    async def read_response(self, disable_decoding: bool = False, timeout: float | None = None, **options: Any) -> Any:
        """Read one answer, or wait for a message for ``timeout`` seconds."""
        if not self._replies:
            # A message, which comes when it comes.
            self._bound(None)
        patience = timeout
        if timeout is not None:
            patience = deadline().clamp(None if timeout == math.inf else timeout)
        try:
            answer = await super().read_response(disable_decoding, patience, **options)
        except Exception as error:
            self._failed(error)
            raise
        if answer is None and timeout is not None:
            if timeout and deadline().remaining() == 0.0:
                raise self._no_message()
            return None
        self._answer(answer)
        return answer

    # For the pool.

    async def has_ended(self) -> bool:
        """Return whether it is surely unusable. No round trip."""
        if self._is_over():
            return True
        try:
            # Past the loop, which may not have looked yet.
            self._raw.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        if isinstance(self._writer.get_extra_info("ssl_object"), (ssl.SSLObject, ssl.SSLSocket)):
            # What TLS sends for itself is no end: the loop reads it.
            for _ in range(2):
                await asyncio.sleep(0)
            return self._is_over()
        return True

    def _is_over(self) -> bool:
        reader = self._reader
        return bool(
            reader is None
            or reader.at_eof()
            or reader.exception() is not None
            or reader._buffer
            or self._writer.transport.is_closing()
        )

    async def answers(self) -> bool:
        """Return whether the server answers, in a round trip."""
        self._bound(min(self.pool.timeout or self.pool.connect_timeout, self.pool.connect_timeout))
        try:
            await self._write(self.pack_command("PING"))
            await super().read_response()
        except (self.pool.library.RedisError, OSError):
            return False
        return True

    def interrupt(self) -> None:
        """End the wait of the coroutine that uses it."""
        self.reason = "shutdown"
        self.drop()


class AsyncWatchedPool(Pooled):
    """The part of an asynchronous pool that waits; the driver's own class is the other base.

    It belongs to the process's event loop. What another thread asks of it is done there.
    """

    declaration = "AsyncRedisClient"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        #: Those that wait for a connection, the first one first.
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._unused: asyncio.Future[None] | None = None
        super().__init__(*arguments, **options)

    async def get_connection(self, command_name: object = None, *keys: object, **options: object) -> Any:
        """Check out a connection, connected and fit for use.

        Raises:
            RuntimeError: The calling thread has another event loop, to which the connections do not belong.
        """
        self.opening.require_loop()
        lease = self._asked()
        lease.reclaim = reclaim = partial(self._reclaim, lease)
        try:
            connection = await self._acquire(lease)
            began = time.monotonic()
            if connection.is_open and await self._is_fit(connection, began):
                connection.reused = True
                lease.acquired(reclaim=reclaim)
            else:
                await connection.connect()
                lease.acquired(creating=time.monotonic() - began, reused=False, reclaim=reclaim)
        except BaseException as error:
            self._give_back(lease)
            lease.gave_up(timed_out=getattr(error, "pool_timeout", False))
            lease.returned()
            raise
        return connection

    async def _acquire(self, lease: Lease) -> AsyncWatchedConnection:
        patience = None if self._has_room() else self._patience()
        until = None if patience is None else time.monotonic() + patience
        while not self._has_room():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise self._exhausted()
                await asyncio.wait((waiter,), timeout=left)
            except BaseException:
                if waiter.done():
                    # Woken, and cancelled before it could take what there is.
                    self._wake()
                raise
            finally:
                waiter.cancel()
                with suppress(ValueError):
                    self._waiters.remove(waiter)
        connection: AsyncWatchedConnection = self._taken(lease)
        return connection

    def _wake(self) -> None:
        """Wake the first that waits for a connection; and who waits for the end of all uses."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                break
        if self._unused is not None and not self._used and not self._unused.done():
            self._unused.set_result(None)

    async def _is_fit(self, connection: AsyncWatchedConnection, now: float) -> bool:
        """Return whether an idle connection may be used; else it is closed."""
        action = self._due(connection, now)
        if action is not Due.RETIREMENT and not await connection.has_ended():
            if action is not Due.CHECK:
                return True
            alive = await connection.answers()
            self.opening.checked(alive=alive)
            if alive:
                return True
        self._replace(connection)
        return False

    # Checking in.

    async def release(self, connection: Any) -> None:
        """Check a connection in; one that something was left on is closed."""
        # Without an await: a cancellation cannot come in between.
        lease = self._used.get(connection)
        if lease is None:
            # Taken back before.
            connection.drop()
            return
        self._settle(connection)
        if connection.is_open:
            self._idle.append(connection)
        self._used.pop(connection, None)
        self._wake()
        lease.returned()

    def _give_back(self, lease: Lease) -> bool:
        """Take the connection of a lease back, whatever state it is in; return whether it was out."""
        found = [connection for connection, held in self._used.items() if held is lease]
        for connection in found:
            connection.retired = True
            connection.reason = connection.reason or "other"
            connection.drop()
            self._used.pop(connection, None)
            self._wake()
        return bool(found)

    def _reclaim(self, lease: Lease) -> bool:
        try:
            return bool(_on_loop(partial(self._give_back, lease)))
        finally:
            lease.gave_up()
            lease.returned()

    # Retiring.

    def retire(self, since: float, reason: str) -> None:
        """Use connections that were opened before ``since`` for nothing new: idle ones are closed."""
        _on_loop(partial(self._retire, since, reason))

    def _retire(self, since: float, reason: str) -> None:
        for connection in self._retired(since, reason):
            connection.reason = reason
            connection.drop()

    def shut_down(self, timeout: float) -> None:
        """Close everything, once what is in use has come back or ``timeout`` seconds have passed."""
        if on_loop():
            self._end()
        else:
            _await_on_loop(lambda: self._drained(timeout), timeout + _PROMPT)

    async def _drained(self, timeout: float) -> None:
        if self._used and timeout > 0:
            self._unused = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._unused,), timeout=timeout)
        self._end()

    def _end(self) -> None:
        self._closed = True
        self._retire(time.monotonic(), "shutdown")
        for connection in list(self._used):
            connection.interrupt()

    # The driver's, for its users.

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """Close the idle connections; those in use once they are checked in."""
        self._retire(time.monotonic() if inuse_connections else self._since, "other")

    async def aclose(self) -> None:
        """Close the idle connections."""
        await self.disconnect()


def _on_loop(function: Callable[[], Any]) -> Any:
    """Call a function on the event loop, and return its result, whatever the time left to the calling attempt."""

    async def call() -> Any:
        return function()

    return function() if on_loop() else _await_on_loop(call, _PROMPT)


def _await_on_loop(start: Callable[[], Awaitable[Any]], timeout: float) -> Any:
    if not loop_is_running():
        # Nothing was ever opened.
        return None
    # No Event: one that a signal strikes as it takes its own lock would stop the loop.
    done, result = threading.Lock(), list[Any]()
    done.acquire()

    async def run() -> None:
        try:
            result.append(await start())
        finally:
            done.release()

    start_coroutine(run())
    done.acquire(timeout=timeout)
    return result[0] if result else None
