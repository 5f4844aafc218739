"""An application whose tasks send messages, and lose their sessions."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable
from typing import Any

from celery import Celery, chain, chord, group
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from tests.support.recorder import record
from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

broker = os.environ["SHOP_BROKER"]
app = Celery("messages", broker=broker, backend=broker)
app.conf.broker_connection_retry_on_startup = True
app.conf.result_chord_retry_interval = 0.1
pools = WorkerPools(app)


class MessagesTask(PooledTask):
    """A base with a session."""

    db = pools.add(SQLAlchemyEngine(os.environ["SHOP_DATABASE"], check_after=600.0))
    session = TaskSession(db)


@app.task(name="shop.child")
def child(number: int, *_: object) -> int:
    """Be seen to run."""
    record("child", number)
    return number


@app.task(base=MessagesTask, bind=True, name="shop.sends")
def sends(self: MessagesTask, number: int) -> None:
    """A body that another one calls."""
    child.delay(number)


def _in_thread(target: Callable[..., object], *args: Any) -> None:
    thread = threading.Thread(target=target, args=args)
    thread.start()
    thread.join()


#: Each sends the task `child` once or twice.
WAYS: dict[str, Callable[[Any, int], object]] = {
    "delay": lambda self, number: child.delay(number),
    "countdown": lambda self, number: child.apply_async((number,), countdown=0.01),
    "signature": lambda self, number: child.s(number).delay() and child.s(number).apply_async(),
    "by name": lambda self, number: self.app.send_task("shop.child", (number,)),
    "chain": lambda self, number: chain(child.si(number), child.si(number))(),
    "group": lambda self, number: group(child.si(number), child.si(number))(),
    "chord": lambda self, number: chord([child.si(number)], child.si(number))(),
    "thread": lambda self, number: _in_thread(child.delay, number),
    "copied context": lambda self, number: _in_thread(contextvars.copy_context().run, child.delay, number),
    "called": lambda self, number: sends(number),
    "applied": lambda self, number: sends.apply((number,)).get(disable_sync_subtasks=False),
    "retry without raising": lambda self, number: self.request.retries or self.retry(countdown=0, throw=False),
    "state": lambda self, number: self.update_state(state="PROGRESS", meta={"done": 1}),
    "event": lambda self, number: self.send_event("task-progress", done=1),
    "nothing": lambda self, number: None,
}


def insert(task: Any, number: int) -> None:
    record("body", number)
    task.session.execute(text("insert into orders values (:number, 0)"), {"number": number})


def lose(task: Any, number: int, once: str) -> None:
    """Lose the session, in the first run of its kind."""
    try:
        os.close(os.open(f"{os.environ['SHOP_ONCE']}/{once}-{number}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    task.session.execute(text("select pg_terminate_backend(pg_backend_pid())"))


@app.task(base=MessagesTask, bind=True, name="shop.parent")
def parent(self: MessagesTask, number: int, way: str) -> list[str]:
    """Send a message in one of many ways, then lose the session, once."""
    insert(self, number)
    WAYS[way](self, number)
    lose(self, number, "parent")
    return [str(effect) for effect in self.effects]


@app.task(base=MessagesTask, bind=True, name="shop.replaced")
def replaced(self: MessagesTask, number: int) -> Any:
    """Be replaced by another task."""
    insert(self, number)
    return self.replace(child.si(number))


_met = threading.Event()


@app.task(name="shop.meets")
def meets(*_: object) -> None:
    """Let `waits` go on."""
    _met.set()


@app.task(base=MessagesTask, bind=True, name="shop.waits")
def waits(self: MessagesTask, number: int) -> None:
    """Lose the session once another thread has run tasks and sent their callbacks."""
    insert(self, number)
    record("waits", number)
    _met.wait(30)
    lose(self, number, "waits")


class HoldingTask(MessagesTask):
    """Its bodies hold every message."""

    publish = "on_commit"


@app.task(base=MessagesTask, bind=True, name="shop.looks")
def looks(self: MessagesTask, number: int, what: str = "") -> list[Any]:
    """See what of its parent is there when it runs."""
    found = self.session.scalar(text("select count(*) from orders where number = :number"), {"number": number})
    record("looks", [number, what, found])
    return [number, what, found]


@app.task(base=HoldingTask, bind=True, name="shop.holding")
def holding(self: HoldingTask, number: int, way: str, ending: str = "lose") -> list[str]:
    """Send a message in one of many ways, then lose the session, once; or end in another way."""
    insert(self, number)
    WAYS[way](self, number)
    return _end(self, number, ending)


@app.task(base=HoldingTask, bind=True, name="shop.holding_replaced")
def holding_replaced(self: HoldingTask, number: int) -> Any:
    """Be replaced by another task."""
    insert(self, number)
    looks.delay(number, "dropped")
    return self.replace(group(child.si(number), child.si(number)))


@app.task(base=MessagesTask, bind=True, name="shop.defers")
def defers(self: MessagesTask, number: int, ending: str) -> list[str]:
    """Send three messages once it is committed, from here, a helper and a nested task, then end in one of many ways."""
    first = looks.delay_on_commit(number, "first")
    insert(self, number)
    _helper(number)
    third = looks.apply_async_on_commit((number,), {"what": "third"}, task_id=f"third-{self.request.id}")
    pools.on_commit(lambda: record("called", number))
    _end(self, number, ending)
    return [first.id, third.id]


@app.task(base=MessagesTask, bind=True, name="shop.defers_second")
def _second(self: MessagesTask, number: int) -> None:
    pools.on_commit(lambda: 1 / 0)
    looks.delay_on_commit(number, "second")


def _helper(number: int) -> None:
    _second(number)


def _end(task: Any, number: int, ending: str) -> list[str]:
    if ending == "lose":
        lose(task, number, "end")
    elif ending == "fail":
        raise ValueError(f"order {number}")
    elif ending == "retry" and not task.request.retries:
        raise task.retry(countdown=0)
    elif ending == "unencodable":
        looks.delay_on_commit(number, object())
    elif ending == "wrong call":
        looks.delay_on_commit()
    return [str(effect) for effect in task.effects]


class FilteringTask(MessagesTask):
    """Sends nothing while a run of it is in progress, as celery-singleton does."""

    replay = RetryPolicy(replays=0, max_retries=1, backoff=0.1)
    filters = True

    def apply_async(self, *args: Any, **options: Any) -> Any:
        if self.filters and self.request.id:
            return self.AsyncResult(self.request.id)
        return super().apply_async(*args, **options)


@app.task(base=FilteringTask, bind=True, name="shop.filtered")
def filtered(self: FilteringTask, number: int) -> int:
    """Lose the session in the first run; the retry is dropped."""
    insert(self, number)
    lose(self, number, "filtered")
    return number


@app.task(base=FilteringTask, bind=True, name="shop.unfiltered", filters=False)
def unfiltered(self: FilteringTask, number: int) -> int:
    """The same, and the retry is sent."""
    insert(self, number)
    lose(self, number, "filtered")
    return number


@app.task(
    base=MessagesTask,
    bind=True,
    name="shop.autoretried",
    autoretry_for=(OperationalError,),
    retry_kwargs={"max_retries": 1, "countdown": 0},
)
def autoretried(self: MessagesTask, number: int) -> None:
    """Send a message and lose the session, in every run."""
    insert(self, number)
    child.delay(number)
    self.session.execute(text("select pg_terminate_backend(pg_backend_pid())"))
