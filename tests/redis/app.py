"""An application whose tasks use redis, over each driver."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

from celery import Celery

from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.redis import AsyncRedisClient, RedisClient

app = Celery("counting", broker=os.environ["COUNTING_BROKER"], backend=os.environ["COUNTING_BROKER"])
pools = WorkerPools(app)


class CountingTask(PooledTask):
    """A base with a client of each driver, synchronous and asynchronous."""

    redis = pools.add(RedisClient(os.environ["COUNTING_URL"], client_name="counting"))
    valkey = pools.add(
        RedisClient(os.environ["COUNTING_URL"].replace("redis://", "valkey://", 1), client_name="counting")
    )
    redis_async = pools.add(AsyncRedisClient(os.environ["COUNTING_URL"], client_name="counting"))
    valkey_async = pools.add(
        AsyncRedisClient(os.environ["COUNTING_URL"].replace("redis://", "valkey://", 1), client_name="counting")
    )
    replay = RetryPolicy(max_retries=0)


# Used before the fork: what is open here must not be used there.
if os.environ.get("COUNTING_PRELOADED"):
    CountingTask.redis.get().get("n")
    CountingTask.valkey.get().get("n")
    pools.run(CountingTask.redis_async.get().get("n"))
    pools.run(CountingTask.valkey_async.get().get("n"))


@app.task(base=CountingTask, bind=True, name="counting.read")
def read(self: CountingTask, driver: str) -> int:
    """Read, and answer with the process."""
    getattr(self, driver).get("n")
    return os.getpid()


@app.task(base=CountingTask, bind=True, name="counting.struck", replay=False)
def struck(self: CountingTask, driver: str, number: int) -> int:
    """Send and receive until the signal of a soft time limit strikes, wherever that is."""
    client = getattr(self, driver)
    striking = threading.Timer(random.uniform(0.001, 0.03), os.kill, (os.getpid(), signal.SIGUSR1))
    striking.start()
    ends = time.monotonic() + 3
    while time.monotonic() < ends:
        with client.pipeline() as pipeline:
            pipeline.watch("n")
            text = f"{number}-{time.monotonic()}"
            # Each answer is the one that was asked for.
            assert pipeline.echo(text) == text.encode()
            pipeline.multi()
            assert pipeline.echo(text).ping().execute() == [text.encode(), True]
    return number


@app.task(base=CountingTask, bind=True, name="counting.read_async")
async def read_async(self: CountingTask, driver: str) -> int:
    """Read, and answer with the process."""
    await getattr(self, driver).get("n")
    return os.getpid()


@app.task(base=CountingTask, bind=True, name="counting.struck_async", replay=False)
async def struck_async(self: CountingTask, driver: str, number: int) -> int:
    """Send and receive until the signal of a soft time limit strikes, wherever that is."""
    client = getattr(self, driver)
    striking = threading.Timer(random.uniform(0.001, 0.03), os.kill, (os.getpid(), signal.SIGUSR1))
    striking.start()
    ends = time.monotonic() + 3
    while time.monotonic() < ends:
        async with client.pipeline() as pipeline:
            await pipeline.watch("n")
            text = f"{number}-{time.monotonic()}"
            # Each answer is the one that was asked for.
            assert await pipeline.echo(text) == text.encode()
            pipeline.multi()
            assert await pipeline.echo(text).ping().execute() == [text.encode(), True]
    return number
