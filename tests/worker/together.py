"""An application that uses much beside workerpools: other bases, wrappers of tasks, tracing, an error log."""

from __future__ import annotations

import json
import logging
import os
import threading
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import httpx
import sentry_sdk
import sqlalchemy
from celery import Celery, chord, current_task, shared_task, signals
from celery_once import AlreadyQueued, QueueOnce  # type: ignore[import-untyped]
from celery_singleton import Singleton  # type: ignore[import-untyped]
from flask import Flask, current_app
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from pydantic import BaseModel
from sentry_sdk.transport import Transport
from sentry_sdk.worker import BackgroundWorker
from sqlalchemy import text
from sqlalchemy.orm import Session

from tests.support.recorder import record
from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

broker = os.environ["SHOP_BROKER"]
app = Celery("shop", broker=broker, backend=os.environ["SHOP_RESULTS"])
app.conf.ONCE = {"backend": "celery_once.backends.Redis", "settings": {"url": broker, "default_timeout": 60}}
app.conf.singleton_backend_url = broker
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))
pools = WorkerPools(app)
web = Flask("storefront")


class LocalTransport(Transport):
    """Writes the task of each event into the record, in a thread, as Sentry's own transport sends it."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._thread = BackgroundWorker()

    def capture_envelope(self, envelope: Any) -> None:
        event = envelope.get_event()
        if event is not None:
            self._thread.submit(lambda: record("sentry event", event.get("tags", {}).get("celery_task_id")))

    def flush(self, timeout: float, callback: Any = None) -> None:
        self._thread.flush(timeout, callback)


sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", transport=LocalTransport, traces_sample_rate=1.0)


class Spans(SpanExporter):
    """Writes each span's name, task and success into the record."""

    def export(self, spans: Any) -> SpanExportResult:
        for span in spans:
            assert isinstance(span, ReadableSpan)
            attributes = span.attributes or {}
            task = attributes.get("messaging.message.id")
            parent = None if span.parent is None else span.parent.span_id
            record("span", [span.name, task, span.context.span_id, parent, span.status.is_ok])
        return SpanExportResult.SUCCESS


@signals.worker_process_init.connect(weak=False)
def trace(**_: object) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Spans()))
    CeleryInstrumentor().instrument(tracer_provider=provider)


class ShopTask(PooledTask):
    """A base with a client, an engine and a session."""

    abstract = True
    api = pools.add(HttpxClient(base_url=os.environ["SHOP_API"]))
    # However slow the machine is, idle connections are trusted: what finds them dead is the task.
    db = pools.add(SQLAlchemyEngine(os.environ["SHOP_DATABASE"], check_after=600.0))
    session = TaskSession(db)
    replay = RetryPolicy(replays=1, max_retries=2, backoff=0.2, backoff_max=0.2)


INSERT = text("insert into orders (number, run) values (:number, :run)")
_lost: set[int] = set()


def write_order(task: Any, number: int, trouble: str, *, first: bool = True) -> int:
    """Write a row, and once, after a little trouble: the server declines, the session is lost, the body raises."""
    record("body", number)
    session = task.session
    if trouble == "declined":
        declined = {"status": "503"} if first else {}
        task.api.get(f"/echo/{number}", params=declined).raise_for_status()
    elif trouble in ("lost", "reported") and number not in _lost:
        if trouble == "reported":
            logging.getLogger("shop").error("an event for Sentry")
        _lost.add(number)
        backend = session.scalar(text("select pg_backend_pid()"))
        with sqlalchemy.create_engine(task.db.url, poolclass=sqlalchemy.NullPool).connect() as other:
            other.execute(text("select pg_terminate_backend(:backend, 10000)"), {"backend": backend})
    elif trouble == "failed":
        raise ValueError(f"order {number}")
    session.execute(INSERT, {"number": number, "run": int(task.request.retries or 0)})
    return number


def _order(task: Any, number: int, trouble: str) -> int:
    return write_order(task, number, trouble, first=not task.request.retries)


class Order(BaseModel):
    """The argument of a task with ``pydantic=True``."""

    number: int
    trouble: str


class Receipt(BaseModel):
    """... and its result."""

    number: int


@app.task(base=ShopTask, bind=True, pydantic=True, name="shop.pydantic")
def pydantic(self: ShopTask, order: Order) -> Receipt:
    return Receipt(number=_order(self, order.number, order.trouble))


class OnceTask(QueueOnce, ShopTask):  # type: ignore[misc]
    """celery-once."""

    abstract = True


@app.task(base=OnceTask, bind=True, name="shop.once")
def once(self: OnceTask, number: int, trouble: str) -> int:
    return _order(self, number, trouble)


class SingletonTask(Singleton, ShopTask):  # type: ignore[misc]
    """celery-singleton; a retry passes, because it holds the lock itself."""

    abstract = True

    def apply_async(self, *args: Any, **options: Any) -> Any:
        if options.get("retries"):
            return ShopTask.apply_async(self, *args, **options)
        return super().apply_async(*args, **options)


@app.task(base=SingletonTask, bind=True, name="shop.singleton")
def singleton(self: SingletonTask, number: int, trouble: str) -> int:
    return _order(self, number, trouble)


class LockedTask(Singleton, ShopTask):  # type: ignore[misc]
    """celery-singleton as it is: it takes a retry for a duplicate, and sends nothing."""

    abstract = True


@app.task(base=LockedTask, bind=True, name="shop.locked")
def locked(self: LockedTask, number: int, trouble: str) -> int:
    return _order(self, number, trouble)


class ContextTask(ShopTask):
    """What Flask's pattern for Celery says."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with web.app_context():
            return self.run(*args, **kwargs)


@app.task(base=ContextTask, bind=True, name="shop.flask")
def flask(self: ContextTask, number: int, trouble: str) -> int:
    assert current_app.name == "storefront"
    return _order(self, number, trouble)


@shared_task(base=ShopTask, bind=True, name="shop.shared")
def shared(self: ShopTask, number: int, trouble: str) -> int:
    return _order(self, number, trouble)


@app.task(base=ShopTask, name="shop.injected")
def injected(
    number: int,
    trouble: str,
    api: httpx.Client = ShopTask.api.inject(),
    *,
    db: sqlalchemy.Engine = ShopTask.db.inject(),
    session: Session = ShopTask.session.inject(),
) -> int:
    """Without ``self``."""
    return _order(SimpleNamespace(api=api, db=db, session=session, request=current_task.request), number, trouble)


class ClassBased(ShopTask):
    """A task that is a class."""

    name = "shop.class"

    def run(self, number: int, trouble: str) -> int:
        return _order(self, number, trouble)


app.register_task(ClassBased())


# A result with children outlives the client's connection, and opens another one when it is freed.
@app.task(name="shop.send", trail=False)
def send(name: str, *arguments: Any) -> list[str]:
    """Send a task from a process that has its class; return its id, or none where celery-once refuses it."""
    with suppress(AlreadyQueued):
        return [app.tasks[f"shop.{name}"].delay(*arguments).id]
    return []


@app.task(name="shop.total")
def total(numbers: list[int]) -> int:
    record("total", numbers)
    return sum(numbers)


@app.task(name="shop.chord", trail=False)
def start_chord(members: list[tuple[int, str]]) -> str:
    """Start a chord; return the id of its body."""
    return str(chord(app.tasks["shop.class"].s(*member) for member in members)(total.s()).id)


@app.task(name="shop.after")
def after(number: int) -> int:
    return number + 1


@app.task(name="shop.chain", trail=False)
def start_chain(number: int, trouble: str) -> str:
    """Start a chain; return the id of its last task."""
    return str((app.tasks["shop.class"].s(number, trouble) | after.s())().id)


@app.task(base=ShopTask, bind=True, name="shop.visit")
def visit(self: ShopTask, token: str) -> int:
    """Use both."""
    self.session.scalar(text("select 1"))
    self.api.get(f"/echo/{token}").raise_for_status()
    return os.getpid()


@app.task(base=ShopTask, bind=True, name="shop.hold", acks_late=True)
def hold(self: ShopTask, number: int, seconds: float) -> int:
    """Be in the middle of a transaction for a while."""
    self.session.execute(INSERT, {"number": number, "run": 0})
    record("hold", number)
    threading.Event().wait(seconds)
    return number


@app.task(base=ShopTask, bind=True, name="shop.tick")
def tick(self: ShopTask) -> None:
    """What beat sends."""
    self.session.scalar(text("select 1"))
    record("tick")


if find_spec("celery_batches"):
    import_module("tests.worker.batches")
