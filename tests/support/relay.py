"""One proxied connection: two flows of bytes, and the rules that may end it; for the proxy's thread alone."""

from __future__ import annotations

import select
import socket
from contextlib import nullcontext
from time import monotonic

from tests.support.cuts import ArmedCut, Cut, Direction
from tests.support.sockets import Ending, end

_CHUNK = 65536
_WANTS_READ = select.POLLIN | select.POLLHUP | select.POLLERR
_WANTS_WRITE = select.POLLOUT | select.POLLHUP | select.POLLERR


class Flow:
    """The bytes of one direction: at most one chunk waits here, so that back-pressure reaches the sender."""

    def __init__(self, direction: Direction, source: socket.socket, target: socket.socket) -> None:
        self.direction: Direction = direction
        self.source = source
        self.target = target
        self.pending = b""
        self.due = 0.0
        self.ended = False
        self.finished = False


class Link:
    """A client's connection and, once it is opened, the one to the server that stands for it."""

    def __init__(self, client: socket.socket, rules: list[ArmedCut], traffic: dict[Direction, int]) -> None:
        self.client = client
        self.upstream: socket.socket | None = None
        self.flows: list[Flow] = []
        self.rules = rules
        self.client_gone = False
        self.closed = False
        self._traffic = traffic
        self._met = False
        self._verdict: Cut | None = None
        self._reply_by: float | None = None

    def connect(self, address: tuple[str, int]) -> None:
        """Begin to connect to the server; a refusal shows at the first read, as with any other loss."""
        self.upstream = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.upstream.setblocking(False)
        self.upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.upstream.connect_ex(address)
        self.flows = [
            Flow("to_server", self.client, self.upstream),
            Flow("to_client", self.upstream, self.client),
        ]

    def close(self, how: Ending) -> None:
        """End both sides, once."""
        if self.closed:
            return
        self.closed = True
        with self._verdict.firing() if self._verdict is not None else nullcontext():
            end(self.client, how)
            if self.upstream is not None:
                end(self.upstream, how)

    def interests(self, now: float) -> tuple[dict[int, int], float | None]:
        """Return the poll mask of each descriptor, and the time at which to look again without an event."""
        masks: dict[int, int] = {}
        wake = self._reply_by
        for flow in self.flows:
            if flow.pending and flow.due > now:
                wake = flow.due if wake is None else min(wake, flow.due)
            elif flow.pending:
                number = flow.target.fileno()
                masks[number] = masks.get(number, 0) | select.POLLOUT
            elif not flow.ended and not self._condemned(flow):
                number = flow.source.fileno()
                masks[number] = masks.get(number, 0) | select.POLLIN
        return masks, wake

    def step(self, events: dict[int, int], delay: float) -> None:
        """Move what can be moved, given what poll reported."""
        for flow in self.flows:
            if self.closed:
                return
            if flow.pending:
                if flow.due <= monotonic() and events.get(flow.target.fileno(), 0) & _WANTS_WRITE:
                    self._write(flow)
            elif flow.ended or self._condemned(flow):
                continue
            elif events.get(flow.source.fileno(), 0) & _WANTS_READ:
                self._read(flow, delay)
        if not self.closed:
            self._settle()

    def _condemned(self, flow: Flow) -> bool:
        return self._verdict is not None and self._verdict.direction == flow.direction

    def _read(self, flow: Flow, delay: float) -> None:
        try:
            data = flow.source.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._lost()
            return
        if flow.direction == "to_client":
            self._met = True
        if self._verdict is not None and self._reply_by is not None:
            # This is the reply to a delivered request: the server has acted, the client must not learn of it.
            self.close(self._verdict.how)
            return
        if not data:
            flow.ended = True
            return
        flow.pending = self._judge(flow.direction, data)
        flow.due = monotonic() + delay if delay else 0.0
        if flow.pending and not delay:
            self._write(flow)

    def _judge(self, direction: Direction, data: bytes) -> bytes:
        if self._verdict is not None:
            return data
        for armed in self.rules:
            if armed.rule.direction != direction:
                continue
            keep = armed.feed(data)
            if keep is not None:
                armed.rule.take()
                self._verdict = armed.rule
                return keep
        return data

    def _write(self, flow: Flow) -> None:
        # Counted before they leave: whoever received the bytes finds them in the figures.
        waiting = len(flow.pending)
        self._traffic[flow.direction] += waiting
        sent = 0
        try:
            sent = flow.target.send(flow.pending)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._lost()
            return
        finally:
            self._traffic[flow.direction] -= waiting - sent
        self._met = True
        flow.pending = flow.pending[sent:]

    def _lost(self) -> None:
        # A server that refused shows as a connection that closes; a reset is passed on as one.
        self.close("rst" if self._met else "fin")

    def _settle(self) -> None:
        """Pass on an end of file, and carry out a verdict whose time has come."""
        verdict = self._verdict
        if verdict is not None and not any(flow.pending for flow in self.flows if self._condemned(flow)):
            now = monotonic()
            if self._reply_by is None:
                self._reply_by = now + verdict.reply_wait
            if now >= self._reply_by:
                self.close(verdict.how)
                return
        for flow in self.flows:
            if flow.ended and not flow.pending and not flow.finished:
                flow.finished = True
                try:
                    flow.target.shutdown(socket.SHUT_WR)
                except OSError:
                    self._lost()
                    return
        if self.flows and all(flow.finished for flow in self.flows):
            self.close("fin")
