"""Counts a driver's round trips to PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.proxy import TcpProxy


class Trips(list[bytes]):
    """What drivers sent, by round trip: simple queries, or what a Sync message ends."""

    def note(self, chunk: bytes) -> bool:
        if chunk[:1] == b"Q" or b"S\x00\x00\x00\x04" in chunk:
            self.append(chunk)
        return False


@contextmanager
def trips(proxy: TcpProxy) -> Iterator[Trips]:
    """Count the round trips of all connections through a proxy."""
    found = Trips()
    rule = proxy.cut_when(found.note, times=None)
    try:
        yield found
    finally:
        rule.cancel()
