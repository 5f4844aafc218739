"""RabbitMQ, with classic and with quorum queues: retries, cut connections, and a restart under load."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import pytest
from celery import Celery
from kombu.exceptions import OperationalError

from demo_tasks.servers import Workspace
from tests.support.proxy import TcpProxy
from tests.support.rabbitmq import RabbitServer, rabbitmq_programs
from tests.support.services import require_program
from tests.support.stand import PATIENCE, Stand, wait_until

pytestmark = [pytest.mark.worker, pytest.mark.timeout(170)]


@pytest.fixture(scope="module")
def rabbit(workspace: Workspace) -> Iterator[RabbitServer]:
    """A RabbitMQ for the module."""
    require_program(rabbitmq_programs)
    with closing(RabbitServer(workspace)) as server:
        yield server.start()


@pytest.fixture
def broker(rabbit: RabbitServer) -> Iterator[TcpProxy]:
    """What the worker reaches the broker through."""
    with TcpProxy(rabbit.host, rabbit.port) as proxy:
        yield proxy


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_broker_that_is_cut_and_restarted(stand: Stand, rabbit: RabbitServer, broker: TcpProxy, kind: str) -> None:
    """A task that the database refuses comes back later. No message is lost, and every child keeps its connection."""
    conf: dict[str, Any] = {
        "task_default_queue": f"amqp-{kind}",
        "task_default_queue_type": kind,
        "broker_native_delayed_delivery_queue_type": kind,
        "broker_connection_retry_on_startup": True,
    }
    with (
        closing(Celery("client", broker=rabbit.url(), backend=stand.broker_url, set_as_current=False)) as client,
        TcpProxy(stand.database.host, stand.database.port) as database,
    ):
        client.conf.update(conf)
        own = replace(stand, client=client)
        env = {
            "SHOP_BROKER": f"amqp://guest:guest@{broker.host}:{broker.port}//",
            "SHOP_DATABASE": stand.database.through(database).url(),
        }
        with own.worker(concurrency=2, env=env, conf=conf) as worker:
            children = worker.children()
            own.reach_all(children)

            # The retry waits in the broker: with quorum queues in its own delayed delivery.
            database.stop()
            database.close_all("rst")
            late = own.send("patient", 1)
            wait_until(lambda: "task_retried" in worker.log(), "a retry")
            database.start()
            late.get(timeout=PATIENCE)
            assert len(stand.orders(1)) == 1

            # Under load: its connections cut, then the server restarted.
            over, sent = threading.Event(), list[int]()

            def load() -> None:
                number = 100
                while not over.wait(0.05):
                    number += 1
                    with suppress(OperationalError, OSError):
                        own.send("patient", number, retry=False)
                        sent.append(number)

            loading = threading.Thread(target=load)
            loading.start()
            try:
                wait_until(lambda: len(sent) > 10, "messages")
                assert broker.close_all("rst") > 0
                count = len(sent)
                wait_until(lambda: len(sent) > count + 10, "messages after the cut")
                rabbit.restart()
                count = len(sent)
                wait_until(lambda: len(sent) > count + 10, "messages after the restart")
            finally:
                over.set()
                loading.join()

            def done() -> set[int]:
                rows = stand.database.execute("select distinct number from orders where number > 100")
                return {int(row[0]) for row in rows}  # type: ignore[call-overload]

            wait_until(lambda: set(sent) <= done(), "every message that the broker had taken")
            assert worker.children() == children
            assert len(stand.backends()) <= len(children)
            assert worker.stop(60) == 0
        stand.wait_for_no_connection()


def test_a_message_that_is_acknowledged_late_runs_twice(stand: Stand, rabbit: RabbitServer, broker: TcpProxy) -> None:
    """If its connection is lost meanwhile: the broker delivers it again, and neither run knows of the other.

    Celery 5.4 gives the second one to the same child, after the first.
    """
    conf = {"task_default_queue": "amqp-late", "task_acks_late": True}
    with closing(Celery("client", broker=rabbit.url(), backend=stand.broker_url, set_as_current=False)) as client:
        client.conf.update(conf)
        own = replace(stand, client=client)
        env = {"SHOP_BROKER": f"amqp://guest:guest@{broker.host}:{broker.port}//"}
        with own.worker(concurrency=2, env=env, conf=conf) as worker:
            own.send("slow_request", 8.0)
            own.wait_for_entry("slow_request")
            broker.close_all("rst")
            own.wait_for_entry("slow_request", count=2)
            assert worker.stop(60) == 0
