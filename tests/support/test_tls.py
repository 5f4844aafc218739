"""The TLS proxy: real handshakes, verified certificates, plain text behind it, and PostgreSQL's own opening."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from contextlib import closing
from functools import partial
from typing import Any

import httpx
import pytest

from tests.support.forking import run_in_fork, start_child, wait_for_child
from tests.support.inspect import socket_inodes
from tests.support.proxy import TcpProxy
from tests.support.tls import TlsProxy
from tests.support.upstream import EchoUpstream


def test_serves_https_with_a_verified_certificate(tls_echo: TlsProxy, echo: EchoUpstream) -> None:
    """A client that trusts the authority is served, by address and by name, over one kept connection."""
    for host in ("127.0.0.1", "localhost"):
        with httpx.Client(verify=tls_echo.client_context()) as client:
            for index in range(5):
                assert client.get(f"https://{host}:{tls_echo.port}/echo/{index}").text == str(index)
            stream = client.get(f"https://{host}:{tls_echo.port}/echo/x").extensions["network_stream"]
            assert stream.get_extra_info("ssl_object").version() in ("TLSv1.2", "TLSv1.3")
    assert (tls_echo.accepted, echo.accepted) == (2, 2)


def test_is_not_trusted_without_its_authority(tls_echo: TlsProxy, echo: EchoUpstream) -> None:
    """A client with another trust store refuses the certificate, and a plain client gets nowhere."""
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://127.0.0.1:{tls_echo.port}/echo/x", verify=ssl.create_default_context())
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{tls_echo.port}/echo/x")
    assert echo.accepted == 0


def test_what_is_on_the_wire_is_encrypted(tls_echo: TlsProxy) -> None:
    """A proxy before it sees TLS records and never the token."""
    wire: list[bytes] = []

    def note(data: bytes) -> bool:
        wire.append(data)
        return False

    with TcpProxy(tls_echo.host, tls_echo.port) as tap:
        tap.cut_when(note)
        with httpx.Client(verify=tls_echo.client_context()) as client:
            assert client.get(f"https://127.0.0.1:{tap.port}/echo/secret-token").text == "secret-token"
    assert wire[0][:2] == b"\x16\x03", "a TLS handshake record"
    assert b"secret-token" not in b"".join(wire)


def test_carries_large_bodies_both_ways(tls_echo: TlsProxy, echo: EchoUpstream) -> None:
    """Nothing is lost, and nothing waits for bytes that TLS has already buffered."""
    with httpx.Client(verify=tls_echo.client_context(), timeout=30) as client:
        url = f"https://127.0.0.1:{tls_echo.port}"
        client.put(f"{url}/echo/x", content=b"y" * 3_000_000)
        assert len(client.get(f"{url}/stream?n=50000").text.splitlines()) == 50_000
    assert len(echo.requests()[0].body) == 3_000_000


def test_the_end_of_either_side_is_passed_on(tls_echo: TlsProxy, echo: EchoUpstream) -> None:
    """The server's close reaches the client as an orderly end of TLS, and the client's reaches the server."""
    raw = socket.create_connection((tls_echo.host, tls_echo.port), timeout=5)
    context = tls_echo.client_context()
    with context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False) as client:
        client.sendall(b"GET /echo/x?close=fin HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(100) == b"", "a close alert, not a ragged end, which would raise"
    with httpx.Client(verify=context) as http:
        http.get(f"https://127.0.0.1:{tls_echo.port}/echo/x")
        echo.wait_for_open(1)
    echo.wait_for_open(0)


def test_a_forked_child_holds_none_of_its_sockets(tls_echo: TlsProxy) -> None:
    """Only the client's socket is shared with a forked child."""
    with httpx.Client(verify=tls_echo.client_context()) as client:
        before = socket_inodes()
        client.get(f"https://127.0.0.1:{tls_echo.port}/echo/x")
        opened = socket_inodes() - before
        assert len(opened) == 3, "the client's, its counterpart, and the one to the server"
        assert len(opened & run_in_fork(socket_inodes)) == 1


def test_close_leaves_no_thread_and_no_socket(echo: EchoUpstream) -> None:
    """Closing ends a handshake that is stuck, an open connection, and the port."""
    before = socket_inodes()
    proxy = TlsProxy(echo.host, echo.port)
    silent = socket.create_connection((proxy.host, proxy.port))
    with closing(silent), closing(proxy), httpx.Client(verify=proxy.client_context()) as client:
        client.get(f"https://127.0.0.1:{proxy.port}/echo/x")
        assert proxy.open == 1
        started = time.monotonic()
        proxy.close()
        proxy.close()
        assert time.monotonic() - started < 3
        assert proxy.open == 0
    assert not proxy.ca_file.exists()
    assert not [thread for thread in threading.enumerate() if thread.name == f"TlsProxy-{proxy.port}"]
    assert socket_inodes() <= before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((proxy.host, proxy.port))


def _cancel_soon(connection: Any) -> None:
    time.sleep(0.3)
    connection.cancel()


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_postgres_with_a_verified_certificate(postgres_server: Any, database: Any, driver: str) -> None:
    """libpq's `sslmode=verify-full` connects to a PostgreSQL behind the proxy, and says that TLS is in use."""
    module = pytest.importorskip(driver)
    with TlsProxy(postgres_server.host, postgres_server.port, postgres=True) as proxy:
        options = {
            "host": "127.0.0.1",
            "port": proxy.port,
            "sslmode": "verify-full",
            "sslrootcert": str(proxy.ca_file),
        }
        with closing(module.connect(database.dsn, **options)) as connection:
            cursor = connection.cursor()
            cursor.execute("SELECT repeat('x', 3000000)")
            assert len(cursor.fetchone()[0]) == 3_000_000
            if driver == "psycopg2":
                assert connection.info.ssl_in_use
            # libpq's cancel call opens a connection of its own, and never speaks TLS.
            child = start_child(partial(_cancel_soon, connection))
            with pytest.raises(module.errors.QueryCanceled):
                cursor.execute("SELECT pg_sleep(10)")
            wait_for_child(child)
        assert proxy.accepted >= 1
        with TlsProxy("127.0.0.1", 9) as stranger:
            options["sslrootcert"] = str(stranger.ca_file)
            with pytest.raises(module.OperationalError, match="certificate verify failed"):
                module.connect(database.dsn, **options)
