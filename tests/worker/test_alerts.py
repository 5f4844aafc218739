"""Each alert is provoked in a real worker, is told of in every way there is, and ends."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.support.proxy import TcpProxy
from tests.support.stand import PATIENCE, Stand, wait_until
from tests.support.worker import WorkerProcess
from tests.worker.test_seen import ask, look
from workerpools._celery.worker import EVENT
from workerpools._stats.snapshot import Alert

pytestmark = pytest.mark.worker

ALARMS = "tests.worker.alarms:app"

#: Everything is quick, and every rule but the one that is tried keeps still.
QUICK: dict[str, Any] = {
    "workerpools_alert_interval": 0.1,
    "workerpools_alert_sustained": 600.0,
    "workerpools_alert_acquire_wait": 60.0,
    "workerpools_alert_window": 600.0,
    "workerpools_alert_publish_after": 600.0,
    "workerpools_alert_clear_after": 0.5,
    "broker_connection_retry_on_startup": True,
}


def worker_of(stand: Stand, *args: str, pool: str = "threads", concurrency: int = 2, **conf: Any) -> WorkerProcess:
    settings = {**QUICK, **{f"workerpools_{name}": value for name, value in conf.items()}}
    return stand.worker(app=ALARMS, pool=pool, concurrency=concurrency, conf=settings, args=args)


def alerts(stand: Stand) -> dict[str, Alert]:
    """Return what ``inspect pools`` tells of alerts, by rule."""
    return {alert.rule: alert for alert in look(stand).alerts}


def changes(stand: Stand, rule: str, resource: str = "db") -> list[str]:
    """Return what the callback was told of a rule."""
    return [
        entry.event
        for entry in stand.entries("raised", "cleared")
        if (entry.detail["rule"], entry.detail["resource"]) == (rule, resource)
    ]


def wait_for(stand: Stand, worker: WorkerProcess, rule: str, *told: str, resource: str = "db") -> None:
    try:
        wait_until(lambda: changes(stand, rule, resource)[: len(told)] == list(told), f"{rule} {told}")
    except AssertionError as late:
        raise AssertionError(f"{late}; {stand.entries('raised', 'cleared')}; {worker.log()[-5000:]}") from None


@contextmanager
def listening(stand: Stand) -> Iterator[list[dict[str, Any]]]:
    """Collect the worker's events of ours."""
    found: list[dict[str, Any]] = []
    client = Celery("listener", broker=stand.broker_url, set_as_current=False)
    with client.connection_for_read() as connection:
        receiver = client.events.Receiver(connection, handlers={EVENT: found.append})
        ready, over = threading.Event(), threading.Event()

        def receive() -> None:
            with receiver.consumer_context() as (own, _, _):
                ready.set()
                while not over.is_set():
                    try:
                        own.drain_events(timeout=0.1)
                    except TimeoutError:
                        continue

        thread = threading.Thread(target=receive)
        thread.start()
        try:
            assert ready.wait(PATIENCE)
            yield found
        finally:
            over.set()
            thread.join(PATIENCE)
            client.close()


@pytest.mark.parametrize("pool", ["threads", "prefork", "solo"])
def test_a_busy_connection_pool(stand: Stand, pool: str) -> None:
    """One connection, a task that has it for a while: the alert comes while it does, in the log, as an event, to the
    callback and in the statistics, and it ends after the task has. The task of solo keeps the main loop from
    everything else meanwhile."""
    concurrency = 1 if pool == "solo" else 2
    with (
        listening(stand) as events,
        worker_of(stand, "-E", pool=pool, concurrency=concurrency, alert_sustained=0.4) as worker,
    ):
        result = stand.send("hold", 5.0)
        wait_for(stand, worker, "utilisation", "raised")
        assert not result.ready()
        if pool != "solo":
            alert = alerts(stand)["utilisation"]
            assert (alert.resource, alert.value, alert.threshold) == ("db", 1.0, 0.8)
            (entry,) = stand.entries("hold")
            assert alert.pid == entry.pid
            assert alert.to_dict() in [each.detail | {"value": 1.0} for each in stand.entries("raised")]
            told = ask(stand, "stats")["workerpools"]
            assert told["alerts"] == [f"utilisation: 1 of 1 connections of 'db' in use in process {entry.pid}"]
        result.get(timeout=PATIENCE)
        wait_for(stand, worker, "utilisation", "raised", "cleared")
        assert alerts(stand) == {}
        wait_until(lambda: len(events) == 2, "two events")
        raised, cleared = events
        assert (raised["type"], raised["state"], raised["rule"], raised["resource"]) == (
            *("pools-alert", "raised", "utilisation", "db"),
        )
        assert (cleared["state"], raised["process"]) == ("cleared", stand.entries("hold")[0].pid)
        assert raised["pid"] == worker.pid
        log = worker.log()
        assert re.search(
            r"WARNING.*alert_raised rule=utilisation resource=db pid=\d+ value=1 threshold=0.8 lasted=[\d.]+ 1 of 1",
            log,
        )
        assert re.search(r"INFO.*alert_cleared rule=utilisation resource=db", log)
        # A listener that fails is told of, and nothing else comes of it.
        assert "the alert listener <function fails" in log
        assert worker.stop() == 0


def test_a_long_wait(stand: Stand) -> None:
    """Two tasks for one connection: the alert comes while the second one waits, and again when it is known how long."""
    with worker_of(stand, alert_acquire_wait=0.5) as worker:
        sent = [stand.send("hold", 3.0) for _ in range(2)]
        wait_for(stand, worker, "acquire_wait", "raised")
        assert not all(result.ready() for result in sent)
        alert = alerts(stand)["acquire_wait"]
        assert alert.threshold == 0.5
        assert alert.value >= 0.5
        for result in sent:
            result.get(timeout=PATIENCE)
        wait_until(lambda: changes(stand, "acquire_wait")[-1] == "cleared", "the alert's end")
        assert set(changes(stand, "acquire_wait")) == {"raised", "cleared"}
        assert worker.stop() == 0


def test_a_cut_proxy_is_a_spike_of_new_connections(stand: Stand) -> None:
    """Each task has to open another connection, where one served all of them for a while before."""
    with TcpProxy(stand.database.host, stand.database.port) as proxy:
        conf = {**QUICK, "workerpools_alert_window": 2.0, "workerpools_alert_creation_floor": 3}
        env = {"SHOP_DATABASE": stand.database.through(proxy).url(), "SHOP_CONF": json.dumps(conf)}
        with stand.worker(app=ALARMS, pool="threads", concurrency=1, env=env) as worker:
            assert len({stand.call("touch") for _ in range(20)}) == 1
            # What is usual is known after two windows.
            time.sleep(5.0)

            def spikes() -> bool:
                stand.call("touch")
                proxy.close_all("rst")
                return bool(changes(stand, "creation_spike"))

            wait_until(spikes, "an alert")
            assert alerts(stand)["creation_spike"].value > 3
            wait_for(stand, worker, "creation_spike", "raised", "cleared")
            assert worker.stop() == 0


def test_an_empty_budget(stand: Stand) -> None:
    """It pays for one replay, which fails, too; successes fill it again."""
    with worker_of(stand, concurrency=1, retry_budget=5) as worker:
        stand.call("touch")
        stand.outcome("lose")
        wait_for(stand, worker, "budget_empty", "raised", resource="")
        assert "0 of 5 tokens left" in alerts(stand)["budget_empty"].message
        for _ in range(6):
            stand.call("touch")
        wait_for(stand, worker, "budget_empty", "raised", "cleared", resource="")
        assert worker.stop() == 0


def test_a_leak(stand: Stand) -> None:
    """What a task leaves open is told of in the task's process, and goes back: the next task finds it."""
    with worker_of(stand, pool="prefork", concurrency=1) as worker:
        stand.call("leak")
        wait_for(stand, worker, "leak_suspected", "raised")
        wait_for(stand, worker, "leak_suspected", "raised", resource="api")
        stand.call("touch")
        stand.call("leak")
        wait_for(stand, worker, "leak_suspected", "raised", "cleared")
        wait_for(stand, worker, "leak_suspected", "raised", "cleared", resource="api")
        child = worker.children()[0]
        lines = re.findall(
            r"WARNING/ForkPoolWorker.*connection_leaked resource=(\w+) pid=(\d+) (task=\S+)", worker.log()
        )
        assert sorted(lines) == sorted(
            [("api", str(child), "task=shop.leak"), ("db", str(child), "task=shop.leak")] * 2
        )
        assert worker.stop() == 0


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_connection_that_is_held_too_long(stand: Stand, pool: str) -> None:
    """The process that has it says where it was acquired, while the task hangs; the main process raises the alert."""
    with worker_of(stand, pool=pool, leak_after=0.5) as worker:
        result = stand.send("leak", 4.0)
        worker.wait_for_log("connection_held resource=db")
        worker.wait_for_log("connection_held resource=api")
        wait_for(stand, worker, "leak_suspected", "raised")
        assert not result.ready()
        assert "is in use for" in alerts(stand)["leak_suspected"].message
        result.get(timeout=PATIENCE)
        wait_until(lambda: changes(stand, "leak_suspected")[-1] == "cleared", "the alert's end")
        log = worker.log()
        assert log.count("connection_held resource=db") == log.count("connection_held resource=api") == 1
        assert re.search(
            r"connection_held resource=db pid=\d+ task=shop.leak held=[\d.]+ leak_after=0.5 at=.*alarms.py:", log
        )
        assert "Acquired at (most recent call last):" in log
        assert worker.stop() == 0


def test_a_stopped_child_publishes_nothing(stand: Stand) -> None:
    """SIGSTOP: the child lives, and tells nothing any more. One that merely has nothing to do is not accused."""
    with worker_of(stand, pool="prefork", alert_publish_after=0.3) as worker:
        victim, idle = worker.children()
        os.kill(victim, signal.SIGSTOP)
        try:
            wait_for(stand, worker, "publish_stopped", "raised", resource="")
            alert = alerts(stand)["publish_stopped"]
            assert (alert.pid, alert.resource) == (victim, "")
            assert str(idle) not in alert.message
        finally:
            os.kill(victim, signal.SIGCONT)
        wait_for(stand, worker, "publish_stopped", "raised", "cleared", resource="")
        assert worker.stop() == 0


def test_a_killed_child_ends_its_alert(stand: Stand) -> None:
    """With SIGKILL, in the middle of what raised it."""
    with worker_of(stand, pool="prefork", alert_sustained=0.4, retry_budget=5) as worker:
        stand.send("hold", 600.0)
        wait_for(stand, worker, "utilisation", "raised")
        os.kill(stand.entries("hold")[0].pid, signal.SIGKILL)
        wait_for(stand, worker, "utilisation", "raised", "cleared")
        wait_until(lambda: len(look(stand).processes) == 2, "its successor")
        assert worker.stop() == 0


def test_alerts_can_be_turned_off(stand: Stand) -> None:
    """With an interval of 0 nobody looks."""
    with worker_of(stand, alert_interval=0, alert_sustained=0.0) as worker:
        stand.call("hold", 1.5)
        stand.call("leak")
        assert alerts(stand) == {}
        assert stand.entries("raised") == []
        assert "connection_leaked" in worker.log()
        assert worker.stop() == 0


@pytest.mark.parametrize("setting", ["alert_utilisation", "alert_acquire_wait", "alert_interval", "leak_after"])
def test_a_malformed_threshold_keeps_a_worker_from_starting(stand: Stand, setting: str) -> None:
    """With a message that names the setting."""
    worker = stand.worker(app=ALARMS, pool="solo", conf={**QUICK, f"workerpools_{setting}": -3})
    worker.start()
    try:
        assert worker.wait() != 0
        assert f"ConfigurationError: workerpools_{setting} is -3; wanted: " in worker.log()
    finally:
        worker.close()


@pytest.mark.parametrize("pool", ["prefork", "solo", "threads"])
def test_a_broker_without_an_event_loop(stand: Stand, tmp_path: Path, pool: str) -> None:
    """Celery's timer is a thread of its own there, and alerts are looked for all the same."""
    for name in ("messages", "control"):
        (tmp_path / name).mkdir()
    options = {
        "data_folder_in": str(tmp_path / "messages"),
        "data_folder_out": str(tmp_path / "messages"),
        "control_folder": str(tmp_path / "control"),
    }
    conf = {**QUICK, "workerpools_alert_sustained": 0.4, "broker_transport_options": options}
    env = {"SHOP_BROKER": "filesystem://", "SHOP_CONF": json.dumps(conf)}
    client = Celery("files", broker="filesystem://", set_as_current=False)
    client.conf.broker_transport_options = options
    with stand.worker(app=ALARMS, pool=pool, concurrency=1, env=env) as worker:
        client.send_task("shop.hold", (3.0,))
        wait_for(stand, worker, "utilisation", "raised", "cleared")
        assert worker.stop() == 0
    client.close()
