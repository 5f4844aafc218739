"""What a type checker must accept of an adapter's tests."""

from __future__ import annotations

import httpx
import pytest

from workerpools.httpx import HttpxClient
from workerpools.testing import AdapterContract, TcpProxy, run_attempt


class TestMine(AdapterContract):
    holds = False
    answer_to = b"POST"

    @pytest.fixture
    def server(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
        return "127.0.0.1", 1

    def adapter(self, host: str, port: int) -> HttpxClient:
        return HttpxClient(base_url=f"http://{host}:{port}")

    def read(self, value: httpx.Client) -> object:
        return value.get("/")


def use() -> int:
    with TcpProxy("127.0.0.1", 1) as proxy:
        proxy.wait_for(lambda proxy: proxy.open == 0)
    return run_attempt(lambda: 1, time_limit=1.0)
