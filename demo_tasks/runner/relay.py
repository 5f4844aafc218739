"""Stands between the worker and PostgreSQL, and loses the answers to COMMIT when it is told to.

What a network does once in a blue moon, at the worst moment: the server has committed, and the client never hears of
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading

__all__ = ["Relay"]


class Relay:
    """Forwards connections from a free loopback port to a server, until it is closed.

    Args:
        host: The server's.
        port: The server's.

    Attributes:
        port: The relay's own port.
        lost: How many answers to COMMIT were lost.
    """

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._to_lose = 0
        self.lost = 0
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._closing = asyncio.Event()
        self._thread.start()
        self._ready.wait(10)

    def lose_commits(self, count: int) -> None:
        """Lose the answers to the next ``count`` COMMITs, and end their connections."""
        self._to_lose += count

    def close(self) -> None:
        """End every connection and take no more."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(5)

    async def _serve(self) -> None:
        tasks: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            if task is not None:
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await self._connect(reader, writer)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._closing.wait()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._server)
        except OSError:
            writer.close()
            return
        link = _Link(self)
        try:
            done, pending = await asyncio.wait(
                {
                    asyncio.ensure_future(link.forward(reader, server_writer, to_server=True)),
                    asyncio.ensure_future(link.forward(server_reader, writer, to_server=False)),
                },
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in pending:
                task.cancel()
            await asyncio.gather(*done, *pending, return_exceptions=True)
        finally:
            for end in (writer, server_writer):
                with contextlib.suppress(OSError, RuntimeError):
                    end.close()

    def _take(self) -> bool:
        if self._to_lose < 1:
            return False
        self._to_lose -= 1
        return True


class _Link:
    """One connection through the relay."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._loses = False

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_server: bool) -> None:
        """Move bytes one way until one side ends, or the answer to a COMMIT is to be lost."""
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                # The simple query protocol: the statement is in the message as it is (PostgreSQL documentation,
                # "Message Formats", Query).
                if to_server and data.startswith(b"Q") and data[5:].startswith(b"COMMIT"):
                    self._loses = self._relay._take()
                elif not to_server and self._loses:
                    self._relay.lost += 1
                    return
                writer.write(data)
                await writer.drain()
