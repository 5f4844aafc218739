"""A WorkerPools may be collected at any moment, and is told of nothing any more."""

from __future__ import annotations

import ast
import gc
import logging
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, signals
from celery.utils.dispatch import Signal

from workerpools import WorkerPools
from workerpools._celery import lifecycle
from workerpools._process import ends

pytestmark = pytest.mark.usefixtures("little_to_collect")

PACKAGE = Path(lifecycle.__file__).parents[1]
FOLLOWED: list[Signal] = [
    signals.worker_init,
    signals.worker_process_init,
    signals.worker_process_shutdown,
    signals.worker_shutting_down,
    signals.worker_shutdown,
]


def new_app() -> Celery:
    return Celery("collected", set_as_current=False)


class Told:
    """What lifecycle tells of; fails at whatever it is told to fail at."""

    def __init__(self, name: str, heard: list[str], fails: str = "") -> None:
        self.name, self.heard, self.fails = name, heard, fails
        self.failures: list[Exception] = []

    def hear(self, what: str) -> None:
        self.heard.append(f"{self.name} {what}")
        if what == self.fails:
            raise RuntimeError(what)

    def worker_starts(self, worker: Any) -> None:
        self.hear(f"starts {worker}")

    def process_starts(self) -> None:
        self.hear("process")

    def worker_stops(self) -> None:
        self.hear("stops")

    def worker_ended(self, worker: Any) -> None:
        self.hear(f"ended {worker}")

    def close(self) -> None:
        self.hear("close")

    def record_failure(self, error: Exception) -> None:
        self.failures.append(error)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of other tests is told anything."""
    monkeypatch.setattr(lifecycle, "_living", weakref.WeakValueDictionary())


@pytest.mark.usefixtures("alone")
def test_all_are_told_in_the_order_of_their_creation() -> None:
    """By each signal, with the worker where there is one; and at the interpreter's exit."""
    heard: list[str] = []
    told = [Told(name, heard) for name in "cab"]
    numbers = [lifecycle.connect(each) for each in told]
    assert numbers == sorted(set(numbers))
    for signal in FOLLOWED:
        signal.send(sender="W")
    lifecycle._at_exit()
    events = ["starts W", "process", "close", "stops", "ended W", "close"]
    assert heard == [f"{name} {event}" for event in events for name in "cab"]


@pytest.mark.usefixtures("alone")
def test_a_failure_is_the_own_one_of_who_failed(caplog: pytest.LogCaptureFixture) -> None:
    """The others are told all the same."""
    heard: list[str] = []
    first, second = Told("first", heard, fails="process"), Told("second", heard)
    for each in (first, second):
        lifecycle.connect(each)
    with caplog.at_level(logging.ERROR, "workerpools"):
        signals.worker_process_init.send(sender=None)
    assert heard == ["first process", "second process"]
    assert ([str(error) for error in first.failures], second.failures) == (["process"], [])
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("alone")
def test_who_is_collected_is_told_nothing() -> None:
    """And takes nothing along that the others need."""
    heard: list[str] = []
    gone, stays = Told("gone", heard), Told("stays", heard)
    lifecycle.connect(gone)
    lifecycle.connect(stays)
    del gone
    gc.collect()
    signals.worker_shutting_down.send(sender=None)
    assert heard == ["stays stops"]


def test_any_number_of_them_is_connected_once() -> None:
    """A process that makes and drops many of them pays for one."""
    WorkerPools(new_app())
    before = [len(signal.receivers) for signal in FOLLOWED]
    kept = [WorkerPools(new_app()) for _ in range(50)]
    assert [len(signal.receivers) for signal in FOLLOWED] == before
    del kept
    gc.collect()
    assert [len(signal.receivers) for signal in FOLLOWED] == before


def collect() -> None:
    """Have an app collected, and then what only it had kept."""
    for _ in range(3):
        gc.collect()


class NoLock:
    """Stands for a lock that somebody holds: whoever wants it would wait for ever."""

    def __enter__(self) -> None:
        raise AssertionError("a lock was taken")

    def __exit__(self, *_: object) -> None: ...

    def acquire(self, *_: object, **__: object) -> None:
        raise AssertionError("a lock was taken")


def test_collecting_takes_no_lock_and_calls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the thread that the collector interrupts holds: here, all locks of the signals."""
    wrong: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", wrong.append)
    pools = WorkerPools(new_app())
    resource = pools.add(lambda: object(), name="api")
    resource.get()
    watched = [weakref.ref(pools), weakref.ref(resource)]
    for signal in FOLLOWED:
        monkeypatch.setattr(signal, "lock", NoLock())
    monkeypatch.setattr(ends.atexit, "unregister", lambda _: wrong.append("unregistered"))
    called: list[str] = []

    def follow(frame: Any, event: str, argument: object) -> None:
        if event == "call" and str(PACKAGE) in frame.f_code.co_filename:
            called.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)

    del pools, resource
    sys.setprofile(follow)
    try:
        collect()
    finally:
        sys.setprofile(None)
    assert [ref() for ref in watched] == [None, None]
    assert wrong == []
    # Tables that forget who is gone: a step on a dictionary.
    assert [each for each in called if "forget" not in each and "<lambda>" not in each] == []


def test_one_is_collected_while_another_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one of a process, whose receivers are being connected under the locks of the signals."""
    followed = (signals.before_task_publish, signals.after_task_publish, *FOLLOWED)
    for signal in followed:
        monkeypatch.setattr(signal, "receivers", [])
    collected: list[str] = []
    clear = Signal._clear_dead_receivers

    def collecting(signal: Signal) -> None:
        # Celery calls this under the lock. What is dropped there is made before.
        assert signal.lock.locked()
        dropped = weakref.ref(waiting.pop())
        collect()
        assert dropped() is None
        collected.append(signal.name)
        clear(signal)

    waiting = [WorkerPools(new_app()) for _ in followed]
    monkeypatch.setattr(lifecycle, "_connected", False)
    monkeypatch.setattr(Signal, "_clear_dead_receivers", collecting)
    made = threading.Thread(target=WorkerPools, daemon=True)
    made.start()
    made.join(30)
    assert not made.is_alive(), "deadlock"
    assert collected == [signal.name for signal in followed]


#: Makes one after the other while the collector runs wherever it likes.
RANDOM = """
import faulthandler, gc, random
from celery import Celery
from workerpools import WorkerPools

random.seed(1)
faulthandler.dump_traceback_later(60, exit=True)
for _ in range({rounds}):
    pools = WorkerPools(Celery("x", set_as_current=False))
    pools.add(lambda: object(), name="api").get()
    del pools
    gc.set_threshold(random.randint(1, 60), 1, 1)
    WorkerPools()
    gc.set_threshold(700, 10, 10)
print("made")
"""


@pytest.mark.skipif(sys.version_info < (3, 12), reason="before Python 3.12 the collector runs at allocations alone")
def test_the_collector_may_run_at_any_moment() -> None:
    """From Python 3.12 on it runs between any two instructions."""
    done = subprocess.run(
        [sys.executable, "-c", RANDOM.format(rounds=1000)], capture_output=True, text=True, timeout=90
    )
    assert (done.returncode, done.stdout) == (0, "made\n"), done.stderr


def finalizers(source: str) -> list[str]:
    """What a module has run when an object is collected."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "__del__":
            found.append("__del__")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            callback = len(node.args) > 1 or bool(node.keywords)
            # A Celery app has a method of that name, which completes its tasks.
            finalize = node.func.attr == "finalize" and ast.unparse(node.func.value) != "app"
            if finalize or (node.func.attr in ("ref", "WeakMethod", "proxy") and callback):
                found.append(ast.unparse(node.func))
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("weakref.finalize(a, b)", ["weakref.finalize"]),
        ("app.finalize()", []),
        ("weakref.ref(a, b)", ["weakref.ref"]),
        ("class A:\n    def __del__(self): ...", ["__del__"]),
        ("weakref.ref(a)", []),
    ],
)
def test_what_finalizers_are(source: str, found: list[str]) -> None:
    """What the next test looks for."""
    assert finalizers(source) == found


def test_no_finalizer_but_those_that_were_looked_at() -> None:
    """Two tables forget the key of what is gone, without a lock, and one class does nothing where the driver's would
    close connections: each one more is to be looked at like them."""
    found = {
        str(path.relative_to(PACKAGE)): each for path in PACKAGE.rglob("*.py") if (each := finalizers(path.read_text()))
    }
    assert found == {
        "_process/descriptors.py": ["weakref.ref"],
        "_process/fork.py": ["weakref.ref"],
        "redis/_pool.py": ["__del__"],
    }
