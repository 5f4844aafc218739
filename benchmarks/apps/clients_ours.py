"""workerpools over requests, redis and asynchronous httpx, as its documentation shows it."""

from __future__ import annotations

from benchmarks.apps import common
from workerpools import PooledTask, WorkerPools
from workerpools.httpx import AsyncHttpxClient
from workerpools.redis import RedisClient
from workerpools.requests import RequestsSession

app = common.make("clients_ours")
pools = WorkerPools(app)


class ShopTask(PooledTask):
    """With a session, a cache and an asynchronous client."""

    abstract = True
    session = pools.add(RequestsSession(common.HTTP))
    cache = pools.add(RedisClient(common.CACHE))
    client = pools.add(AsyncHttpxClient(base_url=common.HTTP))


@app.task(base=ShopTask, bind=True, name="ask")
def ask(self: ShopTask, number: float) -> None:
    """Get one small answer over requests."""
    self.session.get(f"/echo/{int(number)}").raise_for_status()


@app.task(base=ShopTask, bind=True, name="count")
def count(self: ShopTask, number: float) -> None:
    """Count one up in Redis."""
    self.cache.incr(f"bench-{int(number) % 100}")


@app.task(base=ShopTask, bind=True, name="fetch")
async def fetch(self: ShopTask, number: float) -> None:
    """Get one small answer in a coroutine."""
    (await self.client.get(f"/echo/{int(number)}")).raise_for_status()
