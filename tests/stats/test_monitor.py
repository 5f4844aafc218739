"""Looking, telling, and going on whatever happens."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import Any

import pytest
from celery import Celery

from tests.support.forking import run_in_fork, start_child
from workerpools import WorkerPools
from workerpools._celery import worker as worker_steps
from workerpools._celery.worker import monitor_of
from workerpools._stats.alerts import log, stopped_among
from workerpools._stats.rules import Thresholds
from workerpools._stats.snapshot import Alert

QUICK = Thresholds(sustained=0.0, clear_after=0.0)


class Busy:
    """A resource whose only connection is in use."""

    def __init__(self) -> None:
        self.pools = WorkerPools(Celery("monitored", set_as_current=False))
        self.meter = self.pools.add(lambda: None, name="db").meter
        self.meter.limited(1)

    def use(self) -> None:
        self.lease = self.meter.taken()

    def end(self) -> None:
        self.lease.returned()


def test_what_changes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """To the log, to each listener, to who looks at the statistics, and to the caller."""
    busy, told = Busy(), list[tuple[str, bool]]()

    @busy.pools.on_alert
    def fails(alert: Alert, raised: bool) -> None:
        raise ValueError("the listener")

    busy.pools.on_alert(lambda alert, raised: told.append((alert.rule, raised)))
    monitor = monitor_of(busy.pools, QUICK)
    with caplog.at_level(logging.INFO, "workerpools.alerts"):
        assert monitor.look(None) == []
        busy.use()
        ((alert, raised),) = monitor.look(None)
        assert raised
        assert busy.pools.stats().alerts == (alert,)
        assert monitor.look(None) == []
        busy.end()
        ((ended, raised),) = monitor.look(None)
    assert not raised
    assert (ended.rule, ended.since) == (alert.rule, pytest.approx(alert.since, abs=1.0))
    assert busy.pools.stats().alerts == ()
    assert told == [("utilisation", True), ("utilisation", False)]
    first, failed, second, failed_again = caplog.records
    pid = os.getpid()
    assert first.getMessage().startswith(
        f"alert_raised rule=utilisation resource=db pid={pid} value=1 threshold=0.8 lasted="
    )
    assert first.getMessage().endswith(f"1 of 1 connections of 'db' in use in process {pid}")
    assert (first.levelname, second.levelname) == ("WARNING", "INFO")
    assert first.__dict__["workerpools_rule"] == "utilisation"
    assert second.getMessage().startswith("alert_cleared rule=utilisation resource=db")
    assert failed.exc_info is not None
    assert failed_again.exc_info is not None


def test_a_forked_child_has_no_alerts() -> None:
    """They are the parent's."""
    busy = Busy()
    busy.use()
    monitor_of(busy.pools, QUICK).look(None)
    assert run_in_fork(lambda: len(busy.pools.stats().alerts)) == 0
    assert len(busy.pools.stats().alerts) == 1


def test_a_failure_is_logged_and_the_next_look_is_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for as long as it is the same."""
    busy = Busy()
    busy.use()
    (app,) = busy.pools._apps

    class Worker:
        consumer = None

    worker: Any = Worker()
    worker.app = app
    step = worker_steps.AlertsStep(worker)
    monkeypatch.setattr(worker_steps, "children", lambda worker: 1 / 0)
    with caplog.at_level(logging.ERROR, "workerpools.alerts"):
        for _ in range(3):
            step.look(worker)
    assert [record.getMessage() for record in caplog.records] == ["alert check failed; it will be retried"]
    monkeypatch.undo()
    step.look(worker)
    assert step._failure == ""


def test_an_event_that_cannot_be_sent_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The broker is away: the alert is told in the other ways."""

    class Dispatcher:
        def send(self, kind: str, **fields: Any) -> None:
            sent.append((kind, fields))
            raise OSError("away")

    class Worker:
        class consumer:
            event_dispatcher = Dispatcher()

    sent: list[Any] = []
    with caplog.at_level(logging.WARNING, "workerpools.alerts"):
        worker_steps._send(Worker, Alert("utilisation", "db", 7, 1.0, 1.0, 0.8, "busy"), True)
    ((kind, fields),) = sent
    assert kind == "pools-alert"
    # Every event has a pid and a timestamp of its own.
    assert fields == {
        "state": "raised",
        "rule": "utilisation",
        "resource": "db",
        "process": 7,
        "since": 1.0,
        "value": 1.0,
        "threshold": 0.8,
        "message": "busy",
    }
    assert "could not send the alert" in caplog.text


def test_a_line_about_the_whole_worker(caplog: pytest.LogCaptureFixture) -> None:
    """Names no resource and no process."""
    with caplog.at_level(logging.WARNING, "workerpools.alerts"):
        log(Alert("publish_stopped", since=time.time() - 5, value=2, message="2 children"), raised=True)
    assert caplog.messages[0].startswith("alert_raised rule=publish_stopped value=2 threshold=0 lasted=")


def test_stopped_processes_are_known() -> None:
    """By what Linux tells of them; one that sleeps, one that is gone and this one are none."""
    child = start_child(lambda: time.sleep(60))
    try:
        assert stopped_among([child.pid, os.getpid(), 2**22 + 1]) == frozenset()
        os.kill(child.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while stopped_among([child.pid, os.getpid()]) != {child.pid}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        os.close(child.answers)
