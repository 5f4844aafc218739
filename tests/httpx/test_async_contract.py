"""The adapter for asynchronous httpx keeps the contract, on a real server."""

from __future__ import annotations

import httpx
import pytest

from tests.support.upstream import EchoUpstream
from workerpools.httpx import AsyncHttpxClient
from workerpools.testing import AdapterContract


class TestAsyncHttpxClient(AdapterContract):
    """A POST is a write; a response that is not read keeps its connection."""

    answer_to = b"POST"
    secret = "pass-of-the-api"

    @pytest.fixture
    def server(self, echo: EchoUpstream) -> tuple[str, int]:
        self.echo = echo
        return echo.host, echo.port

    def adapter(self, host: str, port: int) -> AsyncHttpxClient:
        return AsyncHttpxClient(base_url=f"http://shop:{self.secret}@{host}:{port}", trust_env=False)

    async def read(self, value: httpx.AsyncClient) -> object:
        return await value.get("/echo/token")

    async def write(self, value: httpx.AsyncClient) -> object:
        return await value.post("/orders")

    def written(self) -> int:
        return self.echo.orders

    async def hold(self, value: httpx.AsyncClient) -> object:
        return await value.send(value.build_request("GET", "/echo/token"), stream=True)
