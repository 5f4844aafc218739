"""The adapter for requests keeps the contract, on a real server."""

from __future__ import annotations

import pytest
import requests

from tests.support.upstream import EchoUpstream
from workerpools.requests import RequestsSession
from workerpools.testing import AdapterContract


class TestRequestsSession(AdapterContract):
    """A POST is a write; a response that is not read keeps its connection."""

    answer_to = b"POST"
    secret = "pass-of-the-api"

    @pytest.fixture
    def server(self, echo: EchoUpstream) -> tuple[str, int]:
        self.echo = echo
        return echo.host, echo.port

    def adapter(self, host: str, port: int) -> RequestsSession:
        return RequestsSession(f"http://shop:{self.secret}@{host}:{port}", trust_env=False)

    def read(self, value: requests.Session) -> object:
        return value.get("/echo/token")

    def write(self, value: requests.Session) -> object:
        return value.post("/orders")

    def written(self) -> int:
        return self.echo.orders

    def hold(self, value: requests.Session) -> object:
        return value.get("/echo/token", stream=True)
