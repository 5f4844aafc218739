"""The application of these tests: tasks over declared resources, and over those that settings make.

Configured by `SHOP_…` variables, because the library reads and checks every name that begins with `WORKERPOOLS_`.
"""

from __future__ import annotations

import contextvars
import json
import os
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import sqlalchemy
from celery import Celery, signals
from celery.exceptions import Ignore, Reject
from sqlalchemy import text

from tests.support import recorder
from tests.support.recorder import record
from workerpools import DatabaseTask, HTTPTask, PooledTask, RetryPolicy, WorkerPools
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

if os.environ.get("SHOP_TOUCHES"):
    recorder.install()

app = Celery("shop", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_RESULTS"])
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))

_authority = os.environ.get("SHOP_AUTHORITY")


pools = WorkerPools(app)


class ShopTask(PooledTask):
    """A base with a client, an engine and a session."""

    api = pools.add(
        HttpxClient(
            base_url=os.environ["SHOP_API"],
            verify=ssl.create_default_context(cafile=_authority) if _authority else True,
        )
    )
    # However slow the machine is, idle connections are trusted: what finds them dead is the task.
    db = pools.add(SQLAlchemyEngine(os.environ["SHOP_DATABASE"], check_after=600.0))
    session = TaskSession(db)
    # Tasks fail at once where nothing but the replay in the process is looked at.
    replay = RetryPolicy(max_retries=0)


class StockTask(PooledTask):
    """Another base: it shares the client with the first one and has an engine of its own."""

    api = ShopTask.api
    stock = pools.add(SQLAlchemyEngine(os.environ["SHOP_STOCK"], check_after=600.0))
    session = TaskSession(stock)
    replay = RetryPolicy(max_retries=0)


class ConfiguredTask(HTTPTask, DatabaseTask):
    """Nothing declared: both come from settings."""


INSERT = text("insert into orders (number, run) values (:number, :run)")
BACKEND = text("select pg_backend_pid()")


@signals.worker_process_init.connect(weak=False)
def process_starts(**_: object) -> None:
    """Connected after WorkerPools is: whatever it does at this signal is in the record by now."""
    record("process_init")


@signals.task_prerun.connect(weak=False)
def task_starts(**_: object) -> None:
    record("task")


def _look(task: Any, engine: Any, client: Any, token: str) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "backend": task.session.scalar(BACKEND),
        "right": client.get(f"/echo/{token}", params={"delay": "0.005"}).text == token,
        "size": engine.pool.size(),
        "engine": id(engine),
    }


@app.task(base=ShopTask, bind=True, name="shop.visit")
def visit(self: ShopTask, token: str) -> dict[str, Any]:
    """Use the client and the session once."""
    return _look(self, self.db, self.api, token)


@app.task(base=StockTask, bind=True, name="shop.stock")
def stock(self: StockTask, token: str) -> dict[str, Any]:
    """The same with the other base."""
    return _look(self, self.stock, self.api, token)


@app.task(base=ConfiguredTask, bind=True, name="shop.configured")
def configured(self: ConfiguredTask, token: str) -> dict[str, Any]:
    """The same with the resources that settings make."""
    return _look(self, self.engine, self.http, token)


@app.task(name="shop.plain")
def plain(token: str) -> int:
    """A task that uses no resource."""
    return os.getpid()


@app.task(base=ShopTask, bind=True, name="shop.order", max_retries=1)
def order(self: ShopTask, number: int, ending: str = "return", seconds: float = 0.0) -> int:
    """Write a row by way of psycopg2, then leave the body in one of many ways."""
    return _order(self, number, ending, seconds)


@app.task(base=StockTask, bind=True, name="shop.refill", max_retries=1)
def refill(self: StockTask, number: int, ending: str = "return", seconds: float = 0.0) -> int:
    """The same by way of psycopg 3."""
    return _order(self, number, ending, seconds)


@app.task(base=StockTask, bind=True, name="shop.catalogue")
def catalogue(self: StockTask, number: int) -> list[str]:
    """Return the columns of a table, by a statement that is prepared after a few tasks."""
    record("body", number)
    return list(self.session.execute(text("select * from catalogue")).keys())


def _order(self: Any, number: int, ending: str, seconds: float) -> int:
    record("body", number)
    retries = int(self.request.retries)
    self.session.execute(INSERT, {"number": number, "run": retries})
    record("order", number)
    if ending == "sleep":
        time.sleep(seconds)
    elif ending == "sleep in the database":
        self.session.execute(text("select pg_sleep(:seconds)"), {"seconds": seconds})
    elif ending == "fail":
        raise ValueError(f"order {number}")
    elif ending == "lose the session":
        _end(self.session.scalar(BACKEND), self.session.get_bind())
        self.session.execute(INSERT, {"number": number, "run": retries})
    elif ending == "fail and lose the session":
        with self.session.get_bind().begin() as connection:
            connection.execute(INSERT, {"number": number, "run": retries})
            _end(connection.scalar(BACKEND), connection.engine)
            raise ValueError(f"order {number}")
    elif ending == "sleep in a transaction":
        with self.session.get_bind().begin() as connection:
            connection.execute(INSERT, {"number": number, "run": retries})
            connection.execute(text("select pg_sleep(:seconds)"), {"seconds": seconds})
    elif ending == "retry" and retries == 0:
        raise self.retry(countdown=0)
    elif ending == "ignore":
        raise Ignore
    elif ending == "reject":
        raise Reject("no", requeue=False)
    elif ending == "exit":
        raise SystemExit(1)
    return os.getpid()


def _end(backend: int, engine: sqlalchemy.Engine) -> None:
    """Have the server end a session, from another one, and wait until it has."""
    ending = text("select pg_terminate_backend(:backend, 10000)")
    # Without a pool: an idle connection of it would stay open until the garbage collector finds the engine, among those
    # that a test counts.
    with sqlalchemy.create_engine(engine.url, poolclass=sqlalchemy.NullPool).connect() as connection:
        connection.execute(ending, {"backend": backend})


@app.task(
    base=ShopTask,
    bind=True,
    name="shop.patient",
    replay=RetryPolicy(replays=1, max_retries=20, backoff=0.4, backoff_max=0.4),
)
def patient(self: ShopTask, number: int) -> int:
    """Goes back to the broker when the database is away."""
    return _order(self, number, "return", 0.0)


@app.task(base=ShopTask, bind=True, name="shop.impatient", replay=RetryPolicy(max_retries=1, backoff=0.2))
def impatient(self: ShopTask, number: int, method: str) -> int:
    """The same, but not for long, and after a request."""
    record("body", number)
    self.api.request(method, f"/echo/{number}").raise_for_status()
    self.session.execute(INSERT, {"number": number, "run": 0})
    return os.getpid()


@app.task(
    base=StockTask,
    bind=True,
    name="shop.stubborn",
    autoretry_for=(sqlalchemy.exc.OperationalError,),
    retry_kwargs={"max_retries": 2, "countdown": 0},
    replay=RetryPolicy(replays=2, max_retries=20, backoff=0.1),
)
def stubborn(self: StockTask, number: int) -> int:
    """Loses its session in every run, and asks Celery for retries of that error."""
    return _order(self, number, "lose the session", 0.0)


@app.task(base=StockTask, bind=True, name="shop.once", replay=False)
def once(self: StockTask, number: int) -> int:
    """Loses its session, and is never run again."""
    return _order(self, number, "lose the session", 0.0)


@app.task(base=ShopTask, bind=True, name="shop.pay")
def pay(self: ShopTask, number: int, method: str, key: str | None = None) -> int:
    """Send a request, and only then use the database, on a connection that may be dead by then."""
    record("body", number)
    headers = {"Idempotency-Key": key} if key else {}
    self.api.request(method, f"/echo/{number}", headers=headers).raise_for_status()
    self.session.execute(INSERT, {"number": number, "run": 0})
    return os.getpid()


@app.task(base=ShopTask, bind=True, name="shop.slow_request")
def slow_request(self: ShopTask, seconds: float) -> int:
    """Be in the middle of a request, with a transaction open, for a while."""
    self.session.scalar(BACKEND)
    record("slow_request")
    self.api.get("/echo/slow", params={"delay": str(seconds)}).raise_for_status()
    return os.getpid()


@app.task(base=ShopTask, bind=True, name="shop.late_request")
def late_request(self: ShopTask, seconds: float) -> float | None:
    """Do something else for a while, and use a resource only then; return what remained."""
    time.sleep(seconds)
    self.api.get("/echo/late").raise_for_status()
    return self.deadline.remaining()


@app.task(base=ShopTask, bind=True, name="shop.decline", replay=True)
def decline(self: ShopTask, number: int, seconds: float) -> int:
    """Be told to come again in a while, the first time."""
    record("body", number)
    declined = {"status": "503", "retry_after": str(seconds)} if self.request.retries == 0 else {}
    self.api.get(f"/echo/{number}", params=declined).raise_for_status()
    return os.getpid()


_over = threading.Event()
_handed_on: set[int] = set()
_executor = ThreadPoolExecutor(1, thread_name_prefix="module")


@app.task(base=ShopTask, bind=True, name="shop.hand_on")
def hand_on(self: ShopTask, number: int, to: str) -> int:
    """Have a thread send a request as soon as :func:`release` lets it; lose the session meanwhile, once."""
    record("body", number)

    def late() -> None:
        _over.wait(30)
        self.api.post(f"/echo/{number}").raise_for_status()

    if to in ("thread", "daemon"):
        threading.Thread(target=late, name="late", daemon=to == "daemon").start()
    elif to == "copied context":
        threading.Thread(target=contextvars.copy_context().run, args=(late,), name="late").start()
    elif to == "executor":
        _executor.submit(late)
    elif to == "greenlet":
        import_module("gevent").spawn(late)
    elif to == "joined executor":
        with ThreadPoolExecutor(2) as executor:
            executor.submit(self.api.get, f"/echo/{number}")
    self.session.execute(INSERT, {"number": number, "run": 0})
    if number not in _handed_on:
        _handed_on.add(number)
        _end(self.session.scalar(BACKEND), self.session.get_bind())
    self.session.execute(INSERT, {"number": number, "run": 1})
    return os.getpid()


@app.task(name="shop.release")
def release() -> None:
    """Let the threads of :func:`hand_on` go on."""
    _over.set()


_meeting = threading.Barrier(4)


@app.task(base=ShopTask, bind=True, name="shop.meet")
def meet(self: ShopTask, number: int, fails: bool = False) -> dict[str, Any]:
    """Four of these run at the same time, each with a transaction open, or none comes to its end."""
    self.session.execute(INSERT, {"number": number, "run": 0})
    _meeting.wait(30)
    visible = self.session.scalar(text("select count(*) from orders where number between 9000 and 9999"))
    self.api.get(f"/echo/{number}").raise_for_status()
    _meeting.wait(30)
    if fails:
        raise ValueError(f"order {number}")
    return {
        "thread": threading.get_ident(),
        "session": id(self.session),
        "backend": self.session.scalar(BACKEND),
        "visible": visible,
    }


if os.environ.get("SHOP_PARENT"):
    from tests.worker import parent

    parent.open_now(ShopTask)
