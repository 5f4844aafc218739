"""How many functions and files of the package lie on three ways: a warm task, a lost connection, a statistic?

A frame is a call of a Python function whose file belongs to the package, as `sys.setprofile` reports it: a generator
counts again each time it is resumed. Comprehensions are left out: since Python 3.12 they are no calls.

- **warm task**: a task with a SELECT and an INSERT, in Celery's tracer, with a time limit, in a process that publishes
  its statistics. The connection was used a moment ago.
- **lost connection**: the same task, whose connection ends between the two statements: from the driver's error to the
  decision whether the body runs again.
- **statistic**: one counter, from the warm task over the worker's reply to the document that Flower's page reads. A
  frame is on its way when it has the number in a variable or returns it, or calls a frame that does. Then the scripts
  of the page.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import re
import sys
import threading
from array import array
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import billiard
from celery import signals
from celery.worker import WorkController
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

import workerpools
from benchmarks.apps import common
from benchmarks.apps.common import READ, WRITE
from benchmarks.servers import Servers
from benchmarks.tracer import traced, worker_like
from workerpools import PooledTask, Resource, WorkerPools
from workerpools._run.delivery import decide
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

__all__ = ["BUDGET", "PACKAGE", "Step", "Way", "measure", "show"]

#: The most that each way may cross.
BUDGET: Mapping[str, Mapping[str, int]] = {
    "warm task": {"frames": 60},
    "lost connection": {"frames": 71, "files": 12},
    "statistic": {"files": 7, "scripts": 3},
}

#: The package's folder.
PACKAGE = Path(workerpools.__file__).parent

#: The soft time limit of the task, in seconds.
LIMIT = 30.0

_WARM_UPS = 5
#: How many warm tasks are traced; the one with the fewest frames counts.
_TIMES = 3
#: The counter's value that is followed: one that no other variable has.
_NUMBER = 2003
_INLINED = frozenset(("<listcomp>", "<dictcomp>", "<setcomp>"))
_PREFIX = f"{PACKAGE}/"


class Step(NamedTuple):
    """One call of a function of the package.

    Attributes:
        file: The function's file, relative to the package.
        function: Its qualified name where Python has one, else its name.
    """

    file: str
    function: str


@dataclass(frozen=True)
class Way:
    """What lies between two ends.

    Attributes:
        name: A key of :data:`BUDGET`.
        steps: The frames, in the order of their calls.
        scripts: The JavaScript files after them, relative to the package, as a browser finds them.
        counted: The figures that are meant, some of ``frames``, ``files``, ``moves`` (from one file to another) and
            ``scripts``.
    """

    name: str
    steps: Sequence[Step]
    scripts: Sequence[str] = ()
    counted: Sequence[str] = ("frames", "files", "moves")

    @property
    def counts(self) -> dict[str, int]:
        """The figures by their names."""
        found = {
            "frames": len(self.steps),
            "files": len({step.file for step in self.steps}),
            "moves": sum(before.file != after.file for before, after in pairwise(self.steps)),
            "scripts": len(self.scripts),
        }
        return {name: found[name] for name in self.counted}

    @property
    def over(self) -> dict[str, int]:
        """The figures that are above the budget."""
        budget = BUDGET[self.name]
        return {name: count for name, count in self.counts.items() if count > budget.get(name, count)}

    def lines(self) -> list[str]:
        """Return a line for each frame and each script."""
        return [*(f"{step.file}:{step.function}" for step in self.steps), *self.scripts]


class _Trace:
    """Profiles a block.

    Args:
        number: Keep only the frames on the way of this number.
    """

    def __init__(self, number: int | None = None) -> None:
        self.steps: list[Step] = []
        #: How many steps there were when the driver raised, and when the decision had been made.
        self.failed: int | None = None
        self.decided: int | None = None
        self._number = number
        self._open: dict[FrameType, int] = {}
        self._carriers: set[int] = set()

    def __enter__(self) -> _Trace:
        # Flower reads the replies in a thread.
        threading.setprofile(self._event)
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)
        if self._number is not None:
            self.steps = [step for number, step in enumerate(self.steps) if number in self._carriers]

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_exception":
            if self.failed is None and type(getattr(argument, "__self__", None)).__module__.startswith("psycopg"):
                self.failed = len(self.steps)
            return
        file, code = frame.f_code.co_filename, frame.f_code
        if not file.startswith(_PREFIX) or code.co_name in _INLINED:
            return
        if event == "call":
            self._open[frame] = len(self.steps)
            # Qualified since Python 3.11.
            self.steps.append(Step(file[len(_PREFIX) :], getattr(code, "co_qualname", code.co_name)))
        elif event == "return":
            if code is decide.__code__ and self.decided is None:
                self.decided = len(self.steps)
            place = self._open.pop(frame, None)
            if place is not None and self._number is not None and _has(self._number, (argument, frame.f_locals)):
                self._carriers.add(place)
                before = frame.f_back
                while before is not None and before not in self._open:
                    before = before.f_back
                if before is not None:
                    self._carriers.add(self._open[before])


def _has(number: int, value: object) -> bool:
    """Return whether ``value`` is ``number``, or a container or dataclass that has it."""
    if isinstance(value, (int, float)):
        return value == number
    if isinstance(value, Mapping):
        return any(_has(number, each) for each in value.values())
    if isinstance(value, (array, memoryview, tuple, list)):
        return any(_has(number, each) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return any(_has(number, getattr(value, each.name)) for each in fields(value))
    return False


def measure(servers: Servers) -> list[Way]:
    """Go the three ways."""
    app = common.make("paths")
    pools = WorkerPools(app)

    class ShopTask(PooledTask):
        abstract = True
        db = pools.add(SQLAlchemyEngine(servers.database()))
        session = TaskSession(db)

    @app.task(base=ShopTask, bind=True, name="warm", soft_time_limit=LIMIT)
    def warm(self: ShopTask, number: float) -> None:
        self.session.execute(READ, {"number": int(number)}).one()
        self.session.execute(WRITE, {"number": int(number)})

    losses: list[int] = []

    @app.task(base=ShopTask, bind=True, name="lost", soft_time_limit=LIMIT)
    def lost(self: ShopTask, number: float) -> None:
        backend = self.session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        if losses:
            losses.pop()
            servers.execute("postgres", f"SELECT pg_terminate_backend({backend}, 10000)")
        self.session.execute(WRITE, {"number": int(number)})

    def child(parent: Connection) -> None:
        with mock.patch.object(billiard.current_process(), "index", 0, create=True):
            signals.worker_process_init.send(sender=None)
        with worker_like(app):
            tasks, loss, counted = [_Trace() for _ in range(_TIMES)], _Trace(), _Trace(_NUMBER)
            call = traced(warm, soft_limit=LIMIT)
            for _ in range(_WARM_UPS):
                call()
            for task in tasks:
                with task:
                    call()
            call_lost = traced(lost, soft_limit=LIMIT)
            # What a process reads once, at its first loss, is not on the way of each.
            losses.append(1)
            call_lost()
            losses.append(1)
            with loss:
                call_lost()
            _use_until(_NUMBER - 1, pools, ShopTask.db)
            with counted:
                call()
        if loss.failed is None or loss.decided is None:
            raise RuntimeError("the connection was not lost, or nothing was decided about it")
        # What a collection or a timer adds to one of them is not on the way.
        least = min((task.steps for task in tasks), key=len)
        parent.send((least, loss.steps[loss.failed : loss.decided], counted.steps))
        # What a process has published of this moment ends with it.
        parent.recv()
        signals.worker_process_shutdown.send(sender=None)

    worker = WorkController(app=app, pool_cls="prefork", concurrency=1)
    with pools, _forked(child) as (process, results):
        task, loss, counted = results.recv()
        # Never started: the child is not its own.
        worker.pool = SimpleNamespace(info={"processes": [process.pid]})
        with _Trace(_NUMBER) as reply:
            told = worker.blueprint.info(worker)
        results.send(None)
    signals.worker_shutdown.send(sender=worker)
    document = _flower(told)
    with _Trace(_NUMBER) as page:
        shown = asyncio.run(document())
    if not _has(_NUMBER, shown):
        raise RuntimeError(f"Flower's document does not have the number {_NUMBER}: {shown}")
    return [
        Way("warm task", task),
        Way("lost connection", loss),
        Way("statistic", [*counted, *reply.steps, *page.steps], _scripts(), ("files", "scripts")),
    ]


@contextmanager
def _forked(function: Callable[[Connection], None]) -> Iterator[tuple[BaseProcess, Connection]]:
    """Run a function in a forked child until the block ends; yield the child, and what talks to it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def run() -> None:
        # Each side keeps one end, and so notices the other one's failure.
        ours.close()
        function(theirs)

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        ours.close()
        process.join()


def _use_until(number: int, pools: WorkerPools, db: Resource[Any]) -> None:
    """Check an open connection out until that has happened ``number`` times."""
    [stats] = [each for each in pools.stats().processes[0].resources if each.name == db.name]
    for _ in range(number - int(stats.value("reused"))):
        db.get().connect().close()


def _flower(told: Mapping[str, Any]) -> Callable[[], Coroutine[Any, Any, object]]:
    """Return a function that returns the document of Flower's page, where a worker replies ``told``."""
    from flower import urls

    from workerpools.flower import install

    install()
    handlers: list[Any] = urls.handlers
    page = next(handler for handler in handlers if getattr(handler, "name", None) == "workerpools_data")
    connection = SimpleNamespace(ensure_connection=lambda **_: None)
    stats = SimpleNamespace(stats=lambda: {"worker@here": told})
    flower = SimpleNamespace(
        capp=SimpleNamespace(
            connection_or_acquire=lambda: nullcontext(connection), control=SimpleNamespace(inspect=lambda **_: stats)
        ),
        events=SimpleNamespace(state=SimpleNamespace(workers={})),
        options=SimpleNamespace(inspect_timeout=1000.0, purge_offline_workers=None),
        workers={},
    )
    sent: list[object] = []

    class Request(page.handler_class):  # type: ignore[misc, name-defined]
        application, current_user = flower, True

        def __init__(self) -> None:
            self.initialize(**page.kwargs)

        def set_header(self, name: str, value: object) -> None:
            pass

        def finish(self, chunk: object = None) -> None:
            sent.append(chunk)

    async def document() -> object:
        await Request().get()
        return sent[0]

    return document


def _scripts() -> list[str]:
    """Return the scripts that Flower's page loads: those that its templates name, and what these import."""
    folder = PACKAGE / "flower"
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.html")))
    found = dict.fromkeys(re.findall(r"<script\b[^>]*\bsrc=[^>]*'([\w.-]+\.js)'", pages))
    waiting = list(found)
    while waiting:
        source = (folder / "static" / waiting.pop(0)).read_text(encoding="utf-8")
        for name in re.findall(r"""\bfrom\s+["']\./([\w./-]+\.js)["']""", source):
            if name not in found:
                found[name] = None
                waiting.append(name)
    return [f"flower/static/{name}" for name in found]


def show(ways: Sequence[Way], *, listed: bool = False, console: Console | None = None) -> None:
    """Print the figures as a table.

    Args:
        ways: What was measured.
        listed: Print each frame before.
        console: Where; standard output if None.
    """
    console = console or Console()
    for way in ways if listed else ():
        console.print(f"{way.name}:", style="bold")
        for line in way.lines():
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    table = Table("way", "frames", "files", "moves", "scripts", "budget", "holds")
    for way in ways:
        table.add_row(
            way.name,
            *(str(way.counts.get(name, "")) for name in ("frames", "files", "moves", "scripts")),
            ", ".join(f"{most} {name}" for name, most in BUDGET[way.name].items()),
            "[bold]no[/bold]" if way.over else "yes",
        )
    console.print(table)
