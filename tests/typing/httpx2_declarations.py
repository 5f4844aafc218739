"""Type-checked by mypy and pyright, never run: what a declaration with httpx2 infers."""

from __future__ import annotations

import httpx2  # pyright: ignore[reportMissingImports]  # it needs Python 3.11
from celery import Celery
from typing_extensions import assert_type

from workerpools import PooledTask, WorkerPools
from workerpools.httpx2 import DEFAULT_TIMEOUT, HttpxClient

app = Celery("shop")
pools = WorkerPools(app)


class ShopTask(PooledTask):
    api = pools.add(HttpxClient(base_url="https://api.example.com", limits=httpx2.Limits(), timeout=DEFAULT_TIMEOUT))


@app.task(base=ShopTask)
def body(self: ShopTask, api: httpx2.Client = ShopTask.api.inject()) -> None:
    assert_type(self.api, httpx2.Client)
