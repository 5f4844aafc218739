"""A real worker: time limits that strike anywhere, and a clean end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from demo_tasks.servers import ValkeyServer
from tests.support.stand import PATIENCE, wait_until
from tests.support.worker import WorkerProcess
from workerpools.testing import TcpProxy

pytestmark = [pytest.mark.worker, pytest.mark.timeout(120)]

DRIVERS = ("redis", "valkey", "redis_async", "valkey_async")

#: What a loop that is used wrongly says.
BROKEN = ("loop is closed", "different loop", "never retrieved", "unclosed <", "was destroyed", "was never awaited")


@dataclass
class Counting:
    """A worker, and what is around it."""

    client: Celery
    worker: WorkerProcess
    proxy: TcpProxy
    own: Any

    def send(self, name: str, driver: str, *arguments: Any) -> Any:
        kind = "_async" if driver.endswith("async") else ""
        return self.client.send_task(f"counting.{name}{kind}", (driver, *arguments))

    def named(self) -> int:
        return sum(client["name"] == "counting" for client in self.own.client_list())


@pytest.fixture
def counting(valkey_server: ValkeyServer, broker_url: str) -> Iterator[Counting]:
    """A worker whose app has used its clients before it forks: no other has Celery's time limits."""
    server = valkey_server.start()
    with TcpProxy(server.host, server.port) as proxy, closing(redis.Redis.from_url(server.url())) as own:
        url = f"redis://:{server.password}@{proxy.host}:{proxy.port}/0"
        env = {
            "COUNTING_BROKER": broker_url,
            "COUNTING_URL": url,
            "COUNTING_PRELOADED": "yes",
            "PYTHONWARNINGS": "default",
        }
        client = Celery("client", broker=broker_url, backend=broker_url, set_as_current=False)
        with closing(client), WorkerProcess("tests.redis.app:app", env=env) as worker:
            yield Counting(client, worker, proxy, own)


def test_time_limits_that_strike_anywhere(counting: Counting) -> None:
    """No answer is another one's, and no connection is left in the middle of one."""
    results = [counting.send("struck", driver, number) for number in range(20) for driver in DRIVERS]
    ignored = 0
    for result in results:
        try:
            result.get(timeout=PATIENCE)
        except SoftTimeLimitExceeded:
            continue
        ignored += 1
    # Python ignores what is raised in a finalizer, and says so.
    assert ignored <= counting.worker.log().count("Exception ignored in")
    for driver in DRIVERS:
        for result in [counting.send("read", driver) for _ in range(10)]:
            result.get(timeout=PATIENCE)
    # One in each child for each driver, and in the parent, which had them before the fork.
    assert counting.named() <= 3 * len(DRIVERS)
    assert not [said for said in BROKEN if said in counting.worker.log()], counting.worker.log()
    assert counting.worker.stop() == 0
    wait_until(lambda: counting.named() == 0, "no connection")
