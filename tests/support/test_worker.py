"""A real worker process: it starts, shows its children, stops in every way, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.support.inspect import children_of, is_alive
from tests.support.worker import WorkerFailed, WorkerProcess

APP = "tests.support.worker_app:app"

pytestmark = [pytest.mark.worker]


def caller(broker: str) -> Celery:
    """Return an application that sends the worker's tasks by name."""
    return Celery("caller", broker=broker, backend=broker)


def gone(*pids: int) -> bool:
    deadline = time.monotonic() + 5
    while any(map(is_alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_runs_tasks_and_stops_warmly(broker_url: str) -> None:
    """The worker runs tasks in its children and finishes what runs before a warm stop."""
    with WorkerProcess(APP, env={"SUPPORT_BROKER": broker_url}, events=True) as worker:
        children = worker.children()
        assert len(children) == 2
        app = caller(broker_url)
        assert app.send_task("tests.support.worker_app.pid").get(timeout=20) in children
        slow = app.send_task("tests.support.worker_app.nap", [1.0])
        worker.wait_for_log("received", 10)
        while worker.log().count("received") < 2:
            time.sleep(0.01)
        assert worker.stop() == 0
        assert slow.get(timeout=5) == "rested"
        assert gone(worker.pid, *children)
        assert "task events: ON" in worker.log()
    app.close()


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_other_execution_pools(pool: str, broker_url: str) -> None:
    """Without child processes the main process runs the tasks."""
    with WorkerProcess(APP, pool=pool, concurrency=1, env={"SUPPORT_BROKER": broker_url}) as worker:
        assert worker.children() == []
        app = caller(broker_url)
        assert app.send_task("tests.support.worker_app.pid").get(timeout=20) == worker.pid
        assert worker.stop() == 0
    app.close()


def test_cold_stop_drops_what_runs(broker_url: str) -> None:
    """A cold stop does not wait for a task of a minute."""
    with WorkerProcess(APP, env={"SUPPORT_BROKER": broker_url}) as worker:
        app = caller(broker_url)
        app.send_task("tests.support.worker_app.nap", [60.0])
        worker.wait_for_log("received", 10)
        children = worker.children()
        started = time.monotonic()
        worker.cold_stop(20)
        assert time.monotonic() - started < 20
    assert gone(worker.pid, *children)
    app.close()


def test_kill_ends_main_and_children() -> None:
    """SIGKILL of the worker as a whole leaves none of its processes."""
    with WorkerProcess(APP) as worker:
        children = worker.children()
        worker.kill()
        assert worker.returncode == -signal.SIGKILL
        assert gone(*children)


def test_leaving_the_context_ends_orphans_and_removes_files() -> None:
    """When only the main process was killed, its children are found and ended; no file stays, the log does."""
    with WorkerProcess(APP) as worker:
        children = worker.children()
        folder = worker._log_file().parent
        assert folder.parent == Path(tempfile.gettempdir())
        worker.kill(children=False)
    assert gone(*children)
    assert not folder.exists()
    assert " ready." in worker.log()


def test_an_exception_in_the_test_leaves_nothing() -> None:
    """A test that fails in the middle leaves no process."""
    with pytest.raises(ZeroDivisionError), WorkerProcess(APP) as worker:
        pids = [worker.pid, *worker.children()]
        raise ZeroDivisionError
    assert gone(*pids)
    assert not set(pids) & set(children_of())


def test_a_worker_that_does_not_start_fails_with_its_log() -> None:
    """The message holds what the worker said."""
    with pytest.raises(WorkerFailed, match=r"(?s)ended with .*no_such_module"), WorkerProcess("no_such_module:app"):
        pass


def test_two_workers_have_names_and_directories_of_their_own(tmp_path: Path, broker_url: str) -> None:
    """Workers of one application run side by side; nothing is written to the working directory."""
    env = {"SUPPORT_BROKER": broker_url}
    with (
        WorkerProcess(APP, concurrency=1, env=env, cwd=tmp_path) as one,
        WorkerProcess(APP, concurrency=1, env=env, cwd=tmp_path) as two,
    ):
        assert one.name != two.name
        assert os.getpgid(one.pid) == one.pid != os.getpgid(two.pid)
        assert os.getpgid(one.children()[0]) == one.pid
        app: Any = caller(broker_url)
        assert len(app.control.inspect(timeout=3).ping()) == 2
        app.close()
        assert (one.stop(), two.stop()) == (0, 0)
    assert list(tmp_path.iterdir()) == []
