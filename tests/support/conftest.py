"""A proxy before a server that echoes."""

from collections.abc import Iterator

import pytest

from tests.support.echo import EchoServer
from tests.support.proxy import TcpProxy
from tests.support.sockets import close_listener


@pytest.fixture
def server() -> Iterator[EchoServer]:
    running = EchoServer()
    yield running
    close_listener(running.listener)


@pytest.fixture
def proxy(server: EchoServer) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", server.port) as running:
        yield running
