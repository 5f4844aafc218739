"""A real TCP proxy that delays, silences and breaks the connections that pass through it.

One thread moves all bytes and owns every socket, so that a connection is closed by the only thread that uses
it: a socket that another thread is blocked on is not really closed, and its reset would not be sent. The test's
calls are carried out by that thread and return when they have taken effect.

``python -m tests.support.proxy HOST PORT SECONDS`` runs one in a process of its own: it prints its port, and adds so
many seconds to each round trip until its standard input ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from tests.support.cuts import ArmedCut, Cut, Direction, Scope
from tests.support.databases import HasAddress
from tests.support.relay import Link
from tests.support.sockets import Ending, close_listener, drop_in_forked_child

_CALL_TIMEOUT = 10.0
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR

# Of asm-generic/socket.h; Python has no names for them.
_ATTACH_FILTER = 26
_DETACH_FILTER = 27
# struct sock_filter: the one instruction BPF_RET | BPF_K with 0, "keep no byte of the packet".
_DROP = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
# struct sock_fprog.
_DROP_PROGRAM = struct.pack("@HP", 1, ctypes.addressof(_DROP))


class TcpProxy:
    """Forward connections from a free loopback port to a server, until told otherwise.

    Do not call `cancel` of a psycopg2 or psycopg connection that goes through a proxy of the same process: it holds
    the interpreter's lock until the proxy's thread answers, which needs that lock. `cancel_safe` of psycopg, a call
    from a forked child and `pg_cancel_backend` are free of that.

    Attributes:
        port: The loopback port; it stays the same over `stop` and `start`.
        accepted: How many connections were accepted since construction.
    """

    host = "127.0.0.1"

    def __init__(self, upstream_host: str, upstream_port: int) -> None:
        self.accepted = 0
        self._traffic: dict[Direction, int] = {"to_server": 0, "to_client": 0}
        self._upstream = (upstream_host, upstream_port)
        self._silent = False
        self._delay = 0.0
        self._links: list[Link] = []
        self._next: list[Cut] = []
        self._lasting: list[Cut] = []
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._calls: queue.SimpleQueue[tuple[Callable[[], object], Future[object]]] = queue.SimpleQueue()
        self._over = False
        self._closed = False
        self._pid = os.getpid()
        self._waker, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        # Bound, never listening: nobody else is given the port while the proxy is stopped.
        self._claim = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._claim.bind((self.host, 0))
        self.port: int = self._claim.getsockname()[1]
        self._listener: socket.socket | None = self._listen()
        drop_in_forked_child(self._sockets)
        self._thread = threading.Thread(target=self._run, name=f"TcpProxy-{self.port}", daemon=True)
        self._thread.start()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        mode = "blackhole" if self._silent else "pass"
        ways = f"{self.host}:{self.port} -> {self._upstream[0]}:{self._upstream[1]}"
        return f"<TcpProxy {ways} {mode} accepted={self.accepted} open={self.open}>"

    # What the test can see.

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to connect to."""
        return self.host, self.port

    @property
    def bytes_to_server(self) -> int:
        """How many bytes were forwarded from clients since construction."""
        return self._traffic["to_server"]

    @property
    def bytes_to_client(self) -> int:
        """How many bytes were forwarded from the server since construction."""
        return self._traffic["to_client"]

    @property
    def open(self) -> int:
        """How many accepted connections are open on the client's side."""
        return sum(not (link.closed or link.client_gone) for link in list(self._links))

    def wait_for(self, *, accepted: int | None = None, open: int | None = None, timeout: float = 5.0) -> None:
        """Wait until at least `accepted` connections came and exactly `open` are; else `TimeoutError`."""

        def reached() -> bool:
            return (accepted is None or self.accepted >= accepted) and (open is None or self.open == open)

        with self._changed:
            if not self._changed.wait_for(reached, timeout):
                raise TimeoutError(f"{self!r}: waited {timeout} s for {accepted=} {open=}")

    # What the test can do.

    def pass_through(self) -> None:
        """Forward at once, also what was held back; forget delay, cut rules and lost packets.

        Both ends of connections that were severed see them end.
        """

        def change() -> None:
            self._silent, self._delay = False, 0.0
            self._next, self._lasting = [], []
            for link in self._links:
                link.rules = []
                for sock in (link.client, link.upstream):
                    _filter(sock, _DETACH_FILTER)
            _filter(self._listener, _DETACH_FILTER)

        self._call(change)

    def blackhole(self) -> None:
        """Accept, keep old and new connections open, and move nothing: no bytes, no end.

        As a program that no longer reads: the kernel goes on acknowledging for it (see `sever`). May be called by a
        predicate of `cut_when`: the chunk still passes, and nothing else.
        """
        if threading.current_thread() is self._thread:
            self._silent = True
        else:
            self._call(lambda: setattr(self, "_silent", True))

    def sever(self) -> None:
        """Lose every packet of the open connections from now on, from both of their ends.

        A half-open connection, as a firewall leaves it that has forgotten its state: a socket filter (Linux,
        socket(7), SO_ATTACH_FILTER) drops what arrives, so that nothing is acknowledged either. What the proxy has
        read already is still sent on. May be called by a predicate of `cut_when`.
        """

        def lose() -> None:
            for link in self._links:
                for sock in (link.client, link.upstream):
                    _filter(sock, _ATTACH_FILTER)

        if threading.current_thread() is self._thread:
            lose()
        else:
            self._call(lose)

    def lead_to(self, server: HasAddress) -> None:
        """Connect those that come from now on to another server. May be called by a predicate of `cut_when`."""
        self._upstream = (server.host, server.port)

    def refuse_silently(self) -> None:
        """Lose the packets that would open a connection."""
        self._call(lambda: _filter(self._listener, _ATTACH_FILTER))

    def delay(self, seconds: float) -> None:
        """Hold every chunk back for `seconds`, in each direction; 0 ends it."""
        self._call(lambda: setattr(self, "_delay", seconds))

    def stop(self) -> None:
        """Refuse new connections; open ones stay as they are (see `close_all`)."""
        self._call(self._close_listener)

    def start(self) -> None:
        """Accept connections again, on the same port."""

        def listen() -> None:
            if self._listener is None:
                self._listener = self._listen()

        self._call(listen)

    def cut_after(
        self,
        n_bytes: int,
        direction: Direction = "to_server",
        how: Ending = "fin",
        *,
        scope: Scope = "next",
        times: int | None = None,
    ) -> Cut:
        """End a connection when `n_bytes` were forwarded in `direction`, counted from now.

        Args:
            n_bytes: Exactly so many bytes still pass; with 0 the next chunk is swallowed.
            direction: `"to_server"` or `"to_client"`.
            how: Whether both sides see a FIN or an RST.
            scope: The `"next"` connection, those `"open"` now, or `"all"`: open and to come.
            times: How many connections in all, or None for every one in scope.
        """
        return self._add(Cut(direction, how, after=n_bytes, times=times), scope)

    def cut_when(
        self,
        predicate: Callable[[bytes], bool],
        direction: Direction = "to_server",
        how: Ending = "fin",
        *,
        deliver: bool = False,
        reply_wait: float = 1.0,
        scope: Scope = "all",
        times: int | None = 1,
    ) -> Cut:
        """End a connection at a chunk that `predicate` accepts.

        Args:
            predicate: Called with each chunk in the proxy's thread; an exception in it is raised by `close`.
            direction: `"to_server"` or `"to_client"`.
            how: Whether both sides see a FIN or an RST.
            deliver: False: the chunk is swallowed. True: it is forwarded, and the answer to it is swallowed.
            reply_wait: With `deliver`, towards the server: end the connection when the answer arrives, so
                that the server has surely acted, or after so many seconds; 0 ends it once the chunk is forwarded.
            scope: The `"next"` connection, those `"open"` now, or `"all"`: open and to come.
            times: How many connections in all, or None for every one in scope.
        """
        wait = reply_wait if deliver and direction == "to_server" else 0.0
        cut = Cut(direction, how, predicate=predicate, deliver=deliver, reply_wait=wait, times=times)
        return self._add(cut, scope)

    def close_all(self, how: Ending = "fin") -> int:
        """End all open connections, also under `blackhole`; returns how many there were."""
        ended: list[Link] = []

        def close() -> None:
            for link in self._links:
                ended.append(link)
                link.close(how)

        self._call(close)
        return len(ended)

    def close(self) -> None:
        """Stop for good; raises what went wrong in the proxy's thread, a predicate's exception included."""
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        with contextlib.suppress(RuntimeError, OSError):
            self._call(lambda: setattr(self, "_over", True))
        self._thread.join(_CALL_TIMEOUT)
        if self._failure is not None:
            raise self._failure

    # The proxy's thread.

    def _call(self, action: Callable[[], object]) -> None:
        if self._pid != os.getpid():
            raise RuntimeError(f"this proxy runs in process {self._pid}, not in its forked child")
        if self._over or not self._thread.is_alive():
            raise RuntimeError("the proxy is closed") from self._failure
        done: Future[object] = Future()
        self._calls.put((action, done))
        self._waker.send(b"\0")
        done.result(_CALL_TIMEOUT)

    def _add(self, cut: Cut, scope: Scope) -> Cut:
        def add() -> None:
            if scope in ("open", "all"):
                for link in self._links:
                    link.rules.append(cut.arm())
            if scope == "next":
                self._next.append(cut)
            elif scope == "all":
                self._lasting.append(cut)

        self._call(add)
        return cut

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        listener.listen(512)
        listener.setblocking(False)
        return listener

    def _close_listener(self) -> None:
        if self._listener is not None:
            close_listener(self._listener)
            self._listener = None

    def _sockets(self) -> Iterable[socket.socket]:
        yield from (self._waker, self._woken, self._claim)
        if self._listener is not None:
            yield self._listener
        for link in self._links:
            yield link.client
            if link.upstream is not None:
                yield link.upstream

    def _run(self) -> None:
        try:
            while not self._over:
                self._turn()
        except BaseException as exc:
            self._failure = exc
        finally:
            self._over = True
            for link in self._links:
                link.close("fin")
            self._close_listener()
            for sock in (self._claim, self._waker, self._woken):
                sock.close()
            self._refuse_calls()
            with self._changed:
                self._changed.notify_all()

    def _refuse_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()[1].set_exception(RuntimeError("the proxy is closed"))

    def _turn(self) -> None:
        masks: dict[int, int] = {self._woken.fileno(): select.POLLIN}
        if self._listener is not None:
            masks[self._listener.fileno()] = select.POLLIN
        wake: float | None = None
        for link in self._links:
            if self._silent:
                if not link.client_gone:
                    masks[link.client.fileno()] = select.POLLRDHUP
                continue
            if link.upstream is None:
                link.connect(self._upstream)
            wanted, due = link.interests(time.monotonic())
            masks.update(wanted)
            if due is not None:
                wake = due if wake is None else min(wake, due)
        events = self._poll(masks, wake)
        for link in self._links:
            if not self._silent:
                link.step(events, self._delay)
            elif events.get(link.client.fileno(), 0) & _GONE:
                link.client_gone = True
        self._account()
        if self._listener is not None and events.get(self._listener.fileno()):
            self._accept(self._listener)
        if events.get(self._woken.fileno()):
            self._obey()
            self._account()

    @staticmethod
    def _poll(masks: dict[int, int], wake: float | None) -> dict[int, int]:
        poller = select.poll()
        for number, mask in masks.items():
            poller.register(number, mask)
        timeout: float | None = None
        if wake is not None:
            timeout = max(0.0, wake - time.monotonic())
            if timeout < 0.005:
                # poll counts in milliseconds, too coarse for a delay of half a millisecond each way.
                time.sleep(timeout)
                timeout = 0.0
        return dict(poller.poll(None if timeout is None else timeout * 1000))

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            while True:
                client, _ = listener.accept()
                client.setblocking(False)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                rules: list[ArmedCut] = [cut.arm() for cut in (*self._next, *self._lasting)]
                self._next = []
                with self._changed:
                    self._links.append(Link(client, rules, self._traffic))
                    self.accepted += 1
                    self._changed.notify_all()

    def _obey(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        while True:
            try:
                action, done = self._calls.get_nowait()
            except queue.Empty:
                return
            try:
                done.set_result(action())
            except BaseException as exc:
                done.set_exception(exc)

    def _account(self) -> None:
        """Drop the links that ended, and wake those who wait for a figure."""
        with self._changed:
            self._links = [link for link in self._links if not link.closed]
            self._changed.notify_all()


def _filter(sock: socket.socket | None, option: int) -> None:
    """Attach the filter that drops all packets, or detach it."""
    # Most sockets have none to detach.
    with contextlib.nullcontext() if option == _ATTACH_FILTER else contextlib.suppress(OSError):
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, option, _DROP_PROGRAM if option == _ATTACH_FILTER else 0)


def main() -> None:
    """Delay what passes, until standard input ends."""
    host, port, seconds = sys.argv[1:4]
    with TcpProxy(host, int(port)) as proxy:
        proxy.delay(float(seconds) / 2)
        print(proxy.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
