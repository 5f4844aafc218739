"""A server that answers with what it was sent, and a client's view of the proxy before it."""

import socket
import threading
import time

import pytest

from tests.support.proxy import TcpProxy
from tests.support.sockets import Ending


class EchoServer:
    """Answers what it receives, and remembers it, with how each connection ended."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.endings: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    self.received.append(data)
                    connection.sendall(data)
                self.endings.append("fin")
            except ConnectionResetError:
                self.endings.append("rst")
            except OSError as exc:
                self.endings.append(repr(exc))


def connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(proxy.address, timeout=5)


def ask(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    answer = b""
    while len(answer) < len(data):
        chunk = client.recv(65536)
        if not chunk:
            break
        answer += chunk
    return answer


def assert_ended(client: socket.socket, how: Ending) -> None:
    """Assert that the client's next read sees exactly this end."""
    if how == "rst":
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    else:
        assert client.recv(1) == b""


def eventually(condition: object, timeout: float = 5.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)
