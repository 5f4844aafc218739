"""Best practice without a library, for requests, redis and asyncio: clients in module globals, made after the fork.

`fetch` runs on one event loop per process, on the child's main thread; `fetch_alone` is what people write instead.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import redis
import requests
from celery import signals

from benchmarks.apps import common

app = common.make("clients_by_hand")

SESSION: requests.Session
CACHE: redis.Redis
LOOP: asyncio.AbstractEventLoop
CLIENT: httpx.AsyncClient

TIMEOUT = httpx.Timeout(10.0, connect=3.0, pool=2.0)


@signals.worker_process_init.connect(weak=False)
def open_clients(**_: Any) -> None:
    """Open this process's clients, which connect with the first task, and its loop."""
    global SESSION, CACHE, LOOP, CLIENT
    SESSION = requests.Session()
    CACHE = redis.Redis.from_url(common.CACHE, socket_timeout=5.0, socket_connect_timeout=3.0, max_connections=10)
    LOOP = asyncio.new_event_loop()
    CLIENT = httpx.AsyncClient(base_url=common.HTTP, timeout=TIMEOUT)


@signals.worker_process_shutdown.connect(weak=False)
def close_clients(**_: Any) -> None:
    """Close them."""
    SESSION.close()
    CACHE.close()
    LOOP.run_until_complete(CLIENT.aclose())
    LOOP.close()


@app.task(name="ask")
def ask(number: float) -> None:
    """Get one small answer over requests."""
    SESSION.get(f"{common.HTTP}/echo/{int(number)}", timeout=(3.0, 10.0)).raise_for_status()


@app.task(name="count")
def count(number: float) -> None:
    """Count one up in Redis."""
    CACHE.incr(f"bench-{int(number) % 100}")


async def _fetch(client: httpx.AsyncClient, number: float) -> None:
    (await client.get(f"/echo/{int(number)}")).raise_for_status()


@app.task(name="fetch")
def fetch(number: float) -> None:
    """Get one small answer in a coroutine."""
    LOOP.run_until_complete(_fetch(CLIENT, number))


async def _alone(number: float) -> None:
    async with httpx.AsyncClient(base_url=common.HTTP, timeout=TIMEOUT) as client:
        await _fetch(client, number)


@app.task(name="fetch_alone")
def fetch_alone(number: float) -> None:
    """The same with a loop and a client of the task's own."""
    asyncio.run(_alone(number))
