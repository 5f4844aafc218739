"""The session in a real worker: failures, effects, time limits, an orderly stop."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from celery import Celery

from tests.support.proxy import TcpProxy
from tests.support.stand import PATIENCE, ended
from tests.support.upstream import EchoUpstream
from tests.support.worker import WorkerProcess

pytestmark = [pytest.mark.worker, pytest.mark.timeout(240)]


@dataclass
class Asked:
    """A worker, and what is around it."""

    client: Celery
    worker: WorkerProcess
    proxy: TcpProxy
    echo: EchoUpstream

    def send(self, name: str, *args: Any) -> Any:
        return self.client.send_task(f"asked.{name}", args)

    def open_all(self) -> None:
        """Have every process use its session, over one connection."""
        wanted = set(self.worker.children())
        while wanted:
            answers = [self.send("read", f"token-{n}") for n in range(4)]
            for answer in answers:
                found = answer.get(timeout=PATIENCE)
                assert found["right"]
                wanted.discard(found["pid"])


@pytest.fixture
def asked(echo: EchoUpstream, broker_url: str) -> Iterator[Asked]:
    client = Celery("client", broker=broker_url, backend=broker_url, set_as_current=False)
    try:
        with TcpProxy(echo.host, echo.port) as proxy:
            env = {"ASKED_BROKER": broker_url, "ASKED_API": f"http://127.0.0.1:{proxy.port}"}
            app = "tests.requests.app:app"
            with WorkerProcess(app, concurrency=2, env=env) as worker:
                yield Asked(client, worker, proxy, echo)
    finally:
        # A result that is finalized when the broker is gone tries to reach it for minutes.
        gc.collect()
        client.backend.result_consumer.stop()
        client.close()


def test_a_worker(asked: Asked) -> None:
    """Dead idle connections cost nothing, a lost answer a second request or the task; an outage is waited for."""
    echo, proxy, worker = asked.echo, asked.proxy, asked.worker
    asked.open_all()
    proxy.close_all()
    proxy.wait_for(open=0, timeout=PATIENCE)
    asked.open_all()

    # The server has executed the order, and its answer is lost.
    for key, requests, state in (("k-1", 2, "SUCCESS"), (None, 1, "FAILURE")):
        asked.open_all()
        echo.clear()
        proxy.cut_when(lambda chunk: chunk.startswith(b"POST"), "to_server", "fin", deliver=True, scope="all")
        assert ended(asked.send("order", key)).state == state
        assert echo.orders == requests
    assert worker.log().count("request_replayed resource=api") == 1
    assert "it may have been done, and the task is not declared idempotent" in worker.log()

    echo.clear()
    proxy.stop()
    proxy.close_all()
    waiting = asked.send("patient")
    worker.wait_for_log("task_retried resource=api")
    proxy.start()
    assert waiting.get(timeout=PATIENCE)
    assert echo.orders == 1

    struck = [asked.send("struck", number).get(timeout=PATIENCE) for number in range(2)]
    assert all(right > 0 and wrong == 0 and strikes > 20 for right, wrong, strikes in struck), struck
    asked.open_all()
    # A connection that was struck may have been closed a moment ago.
    proxy.wait_for(open=proxy.open)
    assert proxy.open <= 4
    assert worker.stop() == 0
    proxy.wait_for(open=0, timeout=PATIENCE)
    echo.wait_for_open(0)
