"""The application of the tests of ``async def`` bodies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from typing import Any

from celery import Celery

from tests.support.recorder import record
from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.httpx import AsyncHttpxClient, HttpxClient
from workerpools.redis import AsyncRedisClient

app = Celery("shop", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_RESULTS"])
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))
pools = WorkerPools(app)


class ShopTask(PooledTask):
    """Asynchronous clients, two of HTTP, and a synchronous one."""

    api = pools.add(AsyncHttpxClient(base_url=os.environ["SHOP_API"]))
    other = pools.add(AsyncHttpxClient(base_url=os.environ["SHOP_API"]))
    counter = pools.add(AsyncRedisClient(os.environ["SHOP_BROKER"], client_name="shop-counter"))
    plain = pools.add(HttpxClient(base_url=os.environ["SHOP_API"]))
    replay = RetryPolicy(max_retries=0)


def task(name: str, **options: Any) -> Any:
    return app.task(base=ShopTask, bind=True, name=f"shop.{name}", **options)


@task("visit")
async def visit(self: Any, token: str) -> dict[str, Any]:
    """Use a client once."""
    response = await self.api.get(f"/echo/{token}")
    return {"pid": os.getpid(), "status": response.status_code, "id": self.request.id}


@task("request")
async def request(self: Any, number: int, method: str) -> int:
    """Send a request, to its end."""
    record("body", number)
    response = await self.api.request(method, f"/echo/{number}")
    return int(response.raise_for_status().status_code)


@task("both")
async def both(self: Any, number: int) -> list[Any]:
    """Two clients at once, and a message after the commit."""
    pools.on_commit(lambda: record("committed", number))
    found = await asyncio.gather(self.api.post(f"/echo/{number}"), self.other.get(f"/echo/{number}"))
    return [*(response.status_code for response in found), [str(effect) for effect in self.effects]]


@task("fails")
async def fails(self: Any, number: int) -> None:
    """Wait for a commit that does not come."""
    pools.on_commit(lambda: record("committed", number))
    await self.other.get(f"/echo/{number}")
    raise ValueError(number)


@task("from_sync")
def from_sync(self: Any, number: int) -> list[int]:
    """A synchronous body runs a coroutine, and uses a synchronous client beside it."""

    async def fetch() -> int:
        return int((await self.api.get(f"/echo/{number}")).status_code)

    return [pools.run(fetch()), self.plain.get(f"/echo/{number}").status_code]


@task("busy")
async def busy(self: Any, number: int, seconds: float) -> int:
    """Send requests until a time limit strikes, as Celery's does."""
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        while True:
            await asyncio.gather(
                self.api.get("/echo/busy", params={"delay": "0.01"}),
                self.other.post(f"/echo/{number}"),
                _count(self.counter, number),
                _step(),
            )
    finally:
        await asyncio.sleep(0)
        record("cleaned", number)


async def _count(counter: Any, number: int) -> None:
    async with counter.pipeline() as pipeline:
        await pipeline.watch("busy")
        # Each answer is the one that was asked for.
        assert await pipeline.echo(str(number)) == str(number).encode()
        pipeline.multi()
        assert (await pipeline.incr(f"busy-{number}").echo(str(number)).execute())[1] == str(number).encode()


async def _step() -> None:
    await asyncio.create_task(asyncio.sleep(0.001))


_released: list[bool] = []


@task("slow")
async def slow(self: Any) -> str:
    """Wait for :func:`release`."""
    record("slow")
    while not _released:
        await asyncio.sleep(0.01)
    return "released"


@task("release")
async def release(self: Any) -> None:
    _released.append(True)


@task("gauges")
async def gauges(self: Any) -> dict[str, Any]:
    """Return what is left in this process: tasks on the loop, and what is counted of connections."""
    assert await self.counter.ping()
    counted = {each.name: (each.in_use, each.pending) for each in pools.stats().totals()}
    return {"tasks": len(asyncio.all_tasks()) - 1, "counted": counted, "pid": os.getpid()}


if os.environ.get("SHOP_PARENT"):
    # The parent has used the loop, and its client's connection is open, when it forks.
    async def _warm() -> None:
        (await ShopTask.api.get().get("/echo/parent")).raise_for_status()

    if "worker" in __import__("sys").argv:
        pools.run(_warm())
