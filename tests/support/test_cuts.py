"""The rules that end a connection: after so many bytes, or at a chunk that a predicate recognises."""

import socket
import time

import pytest

from tests.support.cuts import Direction
from tests.support.echo import EchoServer, ask, assert_ended, connect, eventually
from tests.support.proxy import TcpProxy
from tests.support.sockets import Ending


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_cut_after_passes_exactly_so_many_bytes(
    proxy: TcpProxy, server: EchoServer, direction: Direction, how: Ending
) -> None:
    """The next connection carries n bytes of that direction and ends; the one after it is whole."""
    cut = proxy.cut_after(7, direction, how)
    with connect(proxy) as client:
        client.sendall(b"0123456789")
        cut.wait()
        if direction == "to_client":
            assert client.recv(100) == b"0123456"
        assert_ended(client, how)
    if direction == "to_server":
        eventually(lambda: b"".join(server.received) == b"0123456")
    eventually(lambda: len(server.endings) == 1)
    assert cut.fired == 1
    with connect(proxy) as client:
        assert ask(client, b"0123456789") == b"0123456789"


def test_cut_after_can_hold_for_all_connections(proxy: TcpProxy) -> None:
    """With scope "all" the rule counts from now on open connections and on later ones; `cancel` ends it."""
    with connect(proxy) as old:
        ask(old, b"12345")
        cut = proxy.cut_after(4, "to_client", scope="all")
        assert ask(old, b"123") == b"123"
        assert ask(old, b"456") == b"4"
        with connect(proxy) as new:
            assert ask(new, b"123456") == b"1234"
    cut.wait(fired=2)
    cut.cancel()
    with connect(proxy) as spared:
        assert ask(spared, b"123456") == b"123456"


def test_cut_after_zero_swallows_the_first_chunk(proxy: TcpProxy, server: EchoServer) -> None:
    """With 0 bytes the connection is made, and ends when the client first speaks."""
    cut = proxy.cut_after(0)
    with connect(proxy) as client:
        proxy.wait_for(open=1)
        client.sendall(b"hello")
        assert client.recv(1) == b""
    cut.wait()
    assert server.received == []


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("deliver", [False, True])
def test_cut_when_swallows_or_delivers(proxy: TcpProxy, server: EchoServer, deliver: bool, how: Ending) -> None:
    """The chunk reaches the server only with `deliver`; the client sees the same end, and no reply."""
    cut = proxy.cut_when(lambda data: b"COMMIT" in data, how=how, deliver=deliver)
    with connect(proxy) as client:
        assert ask(client, b"BEGIN") == b"BEGIN"
        client.sendall(b"COMMIT")
        assert_ended(client, how)
    cut.wait()
    assert server.received == ([b"BEGIN", b"COMMIT"] if deliver else [b"BEGIN"])
    with connect(proxy) as client:
        assert ask(client, b"COMMIT") == b"COMMIT", "the rule is good for one connection"


def test_cut_when_does_not_wait_for_ever_for_a_reply() -> None:
    """A server that reads and stays silent is given `reply_wait` seconds."""
    with socket.create_server(("127.0.0.1", 0)) as silent, TcpProxy(*silent.getsockname()) as proxy:
        proxy.cut_when(lambda data: True, deliver=True, reply_wait=0.2)
        with connect(proxy) as client:
            started = time.monotonic()
            client.sendall(b"request")
            assert client.recv(1) == b""
            assert 0.2 <= time.monotonic() - started < 2.0
        assert silent.accept()[0].recv(100) == b"request"


def test_cut_when_looks_at_replies_too(proxy: TcpProxy, server: EchoServer) -> None:
    """A predicate on the server's bytes cuts a request that was executed."""
    proxy.cut_when(lambda data: data == b"reply", "to_client", "rst")
    with connect(proxy) as client:
        client.sendall(b"reply")
        assert_ended(client, "rst")
    assert server.received == [b"reply"]
