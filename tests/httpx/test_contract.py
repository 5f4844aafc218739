"""The adapter for httpx keeps the contract, on a real server."""

from __future__ import annotations

import httpx
import pytest

from tests.support.upstream import EchoUpstream
from workerpools.httpx import HttpxClient
from workerpools.testing import AdapterContract


class TestHttpxClient(AdapterContract):
    """A POST is a write; a response that is not read keeps its connection."""

    answer_to = b"POST"
    secret = "pass-of-the-api"

    @pytest.fixture
    def server(self, echo: EchoUpstream) -> tuple[str, int]:
        self.echo = echo
        return echo.host, echo.port

    def adapter(self, host: str, port: int) -> HttpxClient:
        return HttpxClient(base_url=f"http://shop:{self.secret}@{host}:{port}", trust_env=False)

    def read(self, value: httpx.Client) -> object:
        return value.get("/echo/token")

    def write(self, value: httpx.Client) -> object:
        return value.post("/orders")

    def written(self) -> int:
        return self.echo.orders

    def hold(self, value: httpx.Client) -> object:
        return value.send(value.build_request("GET", "/echo/token"), stream=True)
