"""The TCP proxy: every mode and every ending, seen from plain sockets."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

from tests.support.echo import EchoServer, ask, assert_ended, connect, eventually
from tests.support.forking import run_in_fork, start_child, wait_for_child
from tests.support.inspect import socket_inodes
from tests.support.proxy import TcpProxy
from tests.support.sockets import Ending, close_listener


def test_passes_bytes_and_counts_them(proxy: TcpProxy, server: EchoServer) -> None:
    """Both directions arrive unchanged, and the counters tell connections and bytes."""
    with connect(proxy) as client:
        assert ask(client, b"hello") == b"hello"
        assert (proxy.accepted, proxy.open) == (1, 1)
        assert (proxy.bytes_to_server, proxy.bytes_to_client) == (5, 5)
    proxy.wait_for(open=0)
    assert server.received == [b"hello"]


def test_passes_more_than_the_buffers_hold(proxy: TcpProxy) -> None:
    """A large transfer both ways at once neither loses a byte nor stalls."""
    data = bytes(range(256)) * 80_000
    with connect(proxy) as client:
        client.settimeout(30)
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        received = bytearray()
        while len(received) < len(data):
            received += client.recv(1 << 20)
        sender.join()
    assert bytes(received) == data


def test_passes_a_half_close(proxy: TcpProxy, server: EchoServer) -> None:
    """The end of one direction reaches the other side while the reply still flows."""
    with connect(proxy) as client:
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b"last words"
        assert client.recv(100) == b""
    eventually(lambda: server.endings == ["fin"])


def test_stop_refuses_and_start_accepts_on_the_same_port(proxy: TcpProxy) -> None:
    """Stopped, the port refuses; started, it serves again; a connection that was open goes on throughout."""
    port = proxy.port
    with connect(proxy) as old:
        ask(old, b"a")
        for _ in range(3):
            proxy.stop()
            with pytest.raises(ConnectionRefusedError):
                connect(proxy)
            assert ask(old, b"b") == b"b"
            proxy.start()
            assert proxy.port == port
            with connect(proxy) as client:
                assert ask(client, b"c") == b"c"


def test_stop_refuses_while_a_forked_child_lives(proxy: TcpProxy) -> None:
    """A child forked while the proxy listened does not keep the port open."""
    child = start_child(lambda: time.sleep(0.5))
    proxy.stop()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.start()
    with connect(proxy) as client:
        assert ask(client, b"x") == b"x"
    wait_for_child(child)


def test_a_forked_child_holds_none_of_the_proxys_sockets(proxy: TcpProxy) -> None:
    """Only the test's own sockets are shared with a forked child."""
    before = socket_inodes()
    with TcpProxy("127.0.0.1", 9) as other, connect(proxy) as client:
        ask(client, b"x")
        own = socket_inodes() - before
        shared = own & run_in_fork(socket_inodes)
        # Left are the client's and the one of the server's thread, which this process plays as well.
        assert len(own) == 8
        assert len(shared) == 2
        assert os.fstat(client.fileno()).st_ino in shared
        with pytest.raises(AssertionError, match="runs in process"):
            run_in_fork(other.stop)


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_close_all_ends_every_connection_as_told(proxy: TcpProxy, server: EchoServer, how: Ending) -> None:
    """Idle clients see exactly a FIN or an RST, and so does the server."""
    clients = [connect(proxy) for _ in range(3)]
    for client in clients:
        ask(client, b"x")
    assert proxy.close_all(how) == 3
    assert proxy.open == 0
    for client in clients:
        assert_ended(client, how)
        client.close()
    eventually(lambda: server.endings == [how] * 3)
    with connect(proxy) as fresh:
        assert ask(fresh, b"again") == b"again"


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_close_all_while_a_client_waits_and_a_forked_child_lives(proxy: TcpProxy, how: Ending) -> None:
    """The end is seen at once by a reader that is blocked, although a forked child was made meanwhile."""
    proxy.blackhole()
    with connect(proxy) as client:
        client.sendall(b"never answered")
        proxy.wait_for(accepted=1)
        child = start_child(lambda: time.sleep(0.5))
        threading.Timer(0.1, proxy.close_all, (how,)).start()
        started = time.monotonic()
        assert_ended(client, how)
        assert time.monotonic() - started < 0.45
        wait_for_child(child)


def test_a_fin_is_not_followed_by_a_reset(proxy: TcpProxy) -> None:
    """Data that the proxy has not read does not turn the FIN into an RST: the client's socket has no error."""
    proxy.blackhole()
    with connect(proxy) as client:
        client.sendall(b"x" * 100_000)
        proxy.wait_for(accepted=1)
        proxy.close_all("fin")
        assert client.recv(1) == b""
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_blackhole_is_silent_on_old_and_new_connections(proxy: TcpProxy, server: EchoServer) -> None:
    """Nothing arrives, nothing is answered, nothing is closed; afterwards what was held back flows on."""
    with connect(proxy) as old:
        ask(old, b"1")
        proxy.blackhole()
        with connect(proxy) as new:
            proxy.wait_for(accepted=2)
            for client in (old, new):
                client.settimeout(0.3)
                client.sendall(b"2")
                with pytest.raises(TimeoutError):
                    client.recv(1)
            assert server.received == [b"1"]
            assert server.endings == []
            assert proxy.open == 2
            proxy.pass_through()
            for client in (old, new):
                client.settimeout(5)
                assert client.recv(1) == b"2"


def test_blackhole_hides_a_clients_end_from_the_server(proxy: TcpProxy, server: EchoServer) -> None:
    """A client that gives up is no longer counted as open, but the server does not learn of it."""
    with connect(proxy) as client:
        ask(client, b"1")
        proxy.blackhole()
    proxy.wait_for(open=0)
    time.sleep(0.1)
    assert server.endings == []
    proxy.pass_through()
    eventually(lambda: server.endings == ["fin"])


def test_blackhole_fills_the_senders_window(proxy: TcpProxy) -> None:
    """A sender is not relieved of its data: a large write times out."""
    with connect(proxy) as client:
        ask(client, b"1")
        proxy.blackhole()
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.sendall(b"x" * 50_000_000)


def test_delay_is_added_in_each_direction(proxy: TcpProxy) -> None:
    """A round trip takes twice the delay, and half a millisecond is not rounded up to several."""
    with connect(proxy) as client:
        ask(client, b"x")
        proxy.delay(0.1)
        started = time.monotonic()
        ask(client, b"x")
        assert 0.2 <= time.monotonic() - started < 1.0
        proxy.delay(0.0005)
        took = []
        for _ in range(100):
            started = time.monotonic()
            ask(client, b"x")
            took.append(time.monotonic() - started)
        # The shortest: on a busy machine the others tell of the machine.
        assert 0.001 <= min(took) < 0.0018
        proxy.pass_through()
        started = time.monotonic()
        ask(client, b"x")
        assert time.monotonic() - started < 0.1


def test_an_error_in_a_predicate_is_not_lost(server: EchoServer) -> None:
    """A predicate that raises ends the proxy, and `close` says why."""

    def broken(data: bytes) -> bool:
        raise ZeroDivisionError("in the predicate")

    proxy = TcpProxy("127.0.0.1", server.port)
    proxy.cut_when(broken)
    with connect(proxy) as client:
        client.sendall(b"x")
        assert client.recv(1) == b""
    with pytest.raises(ZeroDivisionError, match="in the predicate"):
        proxy.close()


def test_a_refusing_server_shows_as_a_connection_that_closes(server: EchoServer) -> None:
    """When nobody listens behind the proxy, the client is accepted and sees the end."""
    close_listener(server.listener)
    with TcpProxy("127.0.0.1", server.port) as proxy, connect(proxy) as client:
        assert client.recv(1) == b""
        proxy.wait_for(accepted=1, open=0)


def test_wait_for_says_what_it_waited_for(proxy: TcpProxy) -> None:
    """A wait that is in vain ends with a TimeoutError that names the figures."""
    with pytest.raises(TimeoutError, match=r"accepted=0.*accepted=1"):
        proxy.wait_for(accepted=1, timeout=0.05)


def test_close_leaves_no_descriptor_and_no_thread(server: EchoServer) -> None:
    """After `close` the proxy's sockets and its thread are gone, and open connections see the end."""
    before = socket_inodes()
    proxy = TcpProxy("127.0.0.1", server.port)
    client = connect(proxy)
    ask(client, b"x")
    proxy.close()
    proxy.close()
    assert client.recv(1) == b""
    client.close()
    assert not [thread for thread in threading.enumerate() if thread.name == f"TcpProxy-{proxy.port}"]
    eventually(lambda: socket_inodes() <= before)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
