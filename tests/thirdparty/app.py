"""An application whose tasks use the adapter of this folder."""

from __future__ import annotations

import os

from celery import Celery

from tests.thirdparty.memcached import Memcached
from workerpools import PooledTask, RetryPolicy, WorkerPools

app = Celery("cached", broker=os.environ["CACHED_BROKER"], backend=os.environ["CACHED_BROKER"])
app.conf.workerpools_metrics_port = 0
pools = WorkerPools(app)


class CachedTask(PooledTask):
    """A base with a client of memcached."""

    cache = pools.add(Memcached("127.0.0.1", int(os.environ["CACHED_PORT"])))
    # Tasks fail at once where nothing but the replay in the process is looked at.
    replay = RetryPolicy(max_retries=0)


@app.task(base=CachedTask, bind=True, name="cached.read")
def read(self: CachedTask) -> int:
    """Read, and answer with the process."""
    self.cache.get("key")
    return os.getpid()


@app.task(base=CachedTask, bind=True, name="cached.count")
def count(self: CachedTask) -> int:
    """Do what cannot be taken back, then read."""
    counted = self.cache.incr("count", 1)
    self.cache.get("key")
    return int(counted)


@app.task(
    base=CachedTask, bind=True, name="cached.patient", replay=RetryPolicy(max_retries=50, backoff=0.1, backoff_max=0.1)
)
def patient(self: CachedTask) -> int:
    """Go back to the broker while the server is away."""
    self.cache.get("key")
    return os.getpid()
