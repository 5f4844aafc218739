"""An application with every client that sends requests or commands: one task for each, all of one shape."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from celery import Celery

from tests.support.recorder import record
from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.httpx import AsyncHttpxClient
from workerpools.redis import RedisClient
from workerpools.requests import RequestsSession

app = Celery("shop", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_RESULTS"])
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))
pools = WorkerPools(app)


class ShopTask(PooledTask):
    """Each client goes through a proxy of its own."""

    abstract = True
    requests = pools.add(RequestsSession(os.environ["SHOP_REQUESTS"]))
    redis = pools.add(RedisClient(os.environ["SHOP_REDIS"]))
    httpx = pools.add(AsyncHttpxClient(base_url=os.environ["SHOP_HTTPX"]))
    replay = RetryPolicy(max_retries=0)


class AnyTimesTask(ShopTask):
    """What it does may be done more than once."""

    abstract = True
    idempotent = True


def _begun(number: int) -> None:
    record("body", number)
    pools.on_commit(lambda: record("committed", number))


def _ended(task: Any, fails: bool) -> dict[str, Any]:
    if fails:
        raise ValueError("the body fails")
    return {"pid": os.getpid(), "effects": [str(effect) for effect in task.effects]}


def requests(self: Any, number: int, method: str, fails: bool = False) -> dict[str, Any]:
    _begun(number)
    self.requests.request(method, f"/echo/{number}").raise_for_status()
    return _ended(self, fails)


def redis(self: Any, number: int, method: str, fails: bool = False) -> dict[str, Any]:
    _begun(number)
    if method == "POST":
        self.redis.incr(f"echo/{number}")
    else:
        self.redis.get(f"echo/{number}")
    return _ended(self, fails)


async def httpx(self: Any, number: int, method: str, fails: bool = False) -> dict[str, Any]:
    _begun(number)
    (await self.httpx.request(method, f"/echo/{number}")).raise_for_status()
    return _ended(self, fails)


for _body in (requests, redis, httpx):
    app.task(base=ShopTask, bind=True, name=f"shop.{_body.__name__}")(_body)
    app.task(base=AnyTimesTask, bind=True, name=f"shop.{_body.__name__}.any_times")(_body)


@app.task(name="shop.gauges")
def gauges() -> dict[str, Any]:
    """Return what this process counts as in use or waited for."""
    return {each.name: (each.in_use, each.pending) for each in pools.stats().totals()}


if os.environ.get("SHOP_PARENT") and "worker" in sys.argv:
    # The parent has used each client when it forks.
    ShopTask.requests.get().get("/echo/parent")
    ShopTask.redis.get().get("echo/parent")

    async def _get() -> None:
        await ShopTask.httpx.get().get("/echo/parent")

    pools.run(_get())
