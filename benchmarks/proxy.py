"""A TCP proxy in a process of its own: `python -m benchmarks.proxy HOST PORT SECONDS` prints its port."""

from __future__ import annotations

import sys

from tests.support.proxy import TcpProxy


def main() -> None:
    """Delay what passes by SECONDS a round trip, until standard input ends."""
    host, port, seconds = sys.argv[1:4]
    with TcpProxy(host, int(port)) as proxy:
        proxy.delay(float(seconds) / 2)
        print(proxy.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
