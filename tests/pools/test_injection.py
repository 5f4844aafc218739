"""A parameter whose default is ``inject()`` gets the value in each run, and is no argument of a message."""

from __future__ import annotations

import dis
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import celery
import pytest
from celery import Celery, Task, shared_task, signals
from pydantic import BaseModel, ConfigDict
from sqlalchemy import text
from sqlalchemy.orm import Session

from workerpools import ConfigurationError, DatabaseTask, PooledTask, WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession, current_session

app = Celery("injection", broker="memory://", set_as_current=False)
pools = WorkerPools(app)
opened: list[int] = []


class Client:
    """Counts its uses."""

    uses = 0

    def get(self) -> int:
        self.uses += 1
        return self.uses


def make_client() -> Client:
    opened.append(os.getpid())
    return Client()


class ShopTask(PooledTask):
    abstract = True
    api = pools.add(make_client)
    db = pools.add(SQLAlchemyEngine("sqlite://", connect_args={"check_same_thread": False}))
    session = TaskSession(db)


class Order(BaseModel):
    """An argument, and with the injected parameters beside it."""

    model_config = ConfigDict(frozen=True)
    number: int


def result(order: Any, api: Any, session: Session) -> Any:
    """What every body below returns."""
    assert session is current_session()
    number = getattr(order, "number", order)
    return [number, api, session.scalar(text("select 7"))]


def plain(name: str) -> Any:
    @app.task(base=ShopTask, name=name)
    def body(order: int, api: Client = ShopTask.api.inject(), session: Session = ShopTask.session.inject()) -> Any:
        return result(order, api, session)

    return body


def bound(name: str) -> Any:
    @app.task(base=ShopTask, bind=True, name=name)
    def body(
        self: ShopTask,
        order: int,
        api: Client = ShopTask.api.inject(),
        session: Session = ShopTask.session.inject(),
    ) -> Any:
        assert isinstance(self, ShopTask)
        assert session is self.session
        return result(order, api, session)

    return body


def shared(name: str) -> Any:
    @shared_task(base=ShopTask, name=name)
    def body(order: int, api: Client = ShopTask.api.inject(), session: Session = ShopTask.session.inject()) -> Any:
        return result(order, api, session)

    app.finalize()
    return app.tasks[name]


def class_based(called: str) -> Any:
    class Sync(ShopTask):
        name = called

        def run(
            self, order: int, api: Client = ShopTask.api.inject(), session: Session = ShopTask.session.inject()
        ) -> Any:
            assert session is self.session
            return result(order, api, session)

    return app.register_task(Sync())


def pydantic(name: str) -> Any:
    @app.task(base=ShopTask, pydantic=True, name=name)
    def body(order: Order, api: Client = ShopTask.api.inject(), session: Session = ShopTask.session.inject()) -> Any:
        assert isinstance(order, Order)
        return result(order, api, session)

    return body


def keyword_only(name: str) -> Any:
    @app.task(base=ShopTask, name=name)
    def body(order: int, *, api: Client = ShopTask.api.inject(), session: Session = ShopTask.session.inject()) -> Any:
        return result(order, api, session)

    return body


def decorated(name: str) -> Any:
    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    @app.task(base=ShopTask, bind=True, name=name)
    @logged
    def body(
        self: ShopTask,
        order: int,
        api: Client = ShopTask.api.inject(),
        session: Session = ShopTask.session.inject(),
    ) -> Any:
        return result(order, api, session)

    return body


def other_base(name: str) -> Any:
    @app.task(base=PooledTask, autoretry_for=(KeyError,), name=name)
    def body(order: int, api: Client = ShopTask.api.inject(), session: Session = ShopTask.session.inject()) -> Any:
        return result(order, api, session)

    return body


DECLARED = [plain, bound, shared, class_based, keyword_only, decorated, other_base]
# Celery 5.4 has no pydantic=True, and 5.5 does not know annotations that are strings.
DECLARED += [pydantic] if celery.VERSION >= (5, 6) else []


@pytest.fixture(scope="module", params=DECLARED, ids=lambda declare: declare.__name__)
def task(request: pytest.FixtureRequest) -> Any:
    return request.param(f"injection.{request.param.__name__}")


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    ShopTask.api.close()


@contextmanager
def eager() -> Iterator[None]:
    app.conf.task_always_eager = True
    try:
        yield
    finally:
        app.conf.task_always_eager = False


def test_a_run_gets_the_values(task: Any) -> None:
    """The process's client, and the session of the attempt."""
    order = {"number": 1} if "pydantic" in task.name else 1
    client = ShopTask.api.get()
    assert task(order) == [1, client, 7]
    assert task(order=order) == [1, client, 7]
    assert task.apply((order,)).get() == [1, client, 7]
    assert task.s(order).apply().get() == [1, client, 7]
    with eager():
        assert task.delay(order).get() == [1, client, 7]


def test_an_argument_comes_first(task: Any) -> None:
    """In direct and eager calls; nothing is opened for it."""
    order, fake = {"number": 1} if "pydantic" in task.name else 1, Client()
    before = len(opened)
    assert task(order, api=fake) == [1, fake, 7]
    assert task(order, api=None) == [1, None, 7]
    assert task.apply((order,), {"api": fake}).get() == [1, fake, 7]
    with eager():
        # Celery encodes the arguments, also where it sends nothing.
        assert task.delay(order, api="fake").get() == [1, "fake", 7]
    if "keyword" not in task.name:
        assert task(order, fake) == [1, fake, 7]
    assert len(opened) == before
    with ShopTask.api.override(fake):
        assert task(order) == [1, fake, 7]


def test_no_message_carries_it(task: Any) -> None:
    """``delay(1)`` is complete; what the worker injects is refused where the message would be sent."""
    order = {"number": 1} if "pydantic" in task.name else 1
    sent: list[Any] = []

    def publishes(body: Any, **_: Any) -> None:
        sent.append(body[:2])

    signals.before_task_publish.connect(publishes)
    try:
        task.delay(order)
    finally:
        signals.before_task_publish.disconnect(publishes)
    assert sent == [((order,), {})]
    for name in ("api", "session"):
        with pytest.raises(TypeError, match=rf"{task.name}\(\) takes its parameter '{name}' from ShopTask\.{name} in"):
            task.delay(order, **{name: None})
        with pytest.raises(TypeError, match=f"parameter '{name}'"):
            task.delay_on_commit(order, **{name: None})
    with pytest.raises(TypeError, match="'api'" if "keyword" not in task.name else "positional argument"):
        task.delay(order, None)
    if "pydantic" not in task.name and "class" not in task.name and "decorated" not in task.name:
        # Celery's own check, as ever.
        with pytest.raises(TypeError, match="missing 1 required"):
            task.delay()
        with pytest.raises(TypeError, match="unexpected keyword argument 'unknown'"):
            task.delay(1, unknown=2)


def test_opened_by_the_first_run() -> None:
    """Declaring and calling with an argument open nothing; each process opens its own."""

    @app.task(base=PooledTask, name="injection.pid")
    def pid(api: Client = ShopTask.api.inject()) -> int:
        return opened[-1]

    assert not ShopTask.api.is_open
    assert pid() == os.getpid()
    assert ShopTask.api.is_open
    if (child := os.fork()) == 0:
        os._exit(0 if pid() == os.getpid() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_failed_run_rolls_back_and_a_nested_call_joins() -> None:
    """The attempt is that of any body: one session, committed or rolled back with it."""
    seen: list[Session] = []

    @app.task(base=ShopTask, name="injection.inner")
    def inner(session: Session = ShopTask.session.inject()) -> None:
        seen.append(session)

    @app.task(base=ShopTask, name="injection.outer")
    def outer(session: Session = ShopTask.session.inject()) -> None:
        inner()
        inner.run()
        assert seen == [session, session]
        session.execute(text("select 1"))
        raise KeyError

    with pytest.raises(KeyError):
        outer()
    assert not seen[0].in_transaction()


def test_from_settings() -> None:
    """The value is that of the task's own app."""
    other = Celery("other", set_as_current=False)
    other.conf.workerpools_database_url = "sqlite://"

    @other.task(base=PooledTask, name="injection.settings")
    def body(engine: Any = DatabaseTask.engine.inject(), session: Any = DatabaseTask.session.inject()) -> None:
        assert session.get_bind() is engine
        assert engine is DatabaseTask.engine.resource_for(other).get()

    body()
    body.apply().get()
    WorkerPools.of(other).close()


def test_the_pools_serve_the_app() -> None:
    """As those of the task's own attributes."""
    late = WorkerPools()
    handle = late.add(make_client, name="late")
    assert not late.has_app

    @app.task(base=PooledTask, name="injection.late")
    def body(api: Client = handle.inject()) -> None: ...

    body()
    assert late.has_app
    late.close()


def test_a_body_that_annotations_replace() -> None:
    """``task_annotations`` may bring another body."""
    other = Celery("annotated", set_as_current=False)

    def run(api: Client = ShopTask.api.inject()) -> Any:
        return api

    other.conf.task_annotations = {"injection.annotated": {"run": staticmethod(run)}}

    @other.task(base=ShopTask, name="injection.annotated")
    def body() -> None: ...

    other.finalize()
    assert body() is ShopTask.api.get()


def undecorated(api: Any = ShopTask.api.inject()) -> Any:
    """A helper, or the body of a task that is no PooledTask."""
    return api


@pytest.mark.parametrize(
    "use",
    [
        lambda api: api.get("/"),
        lambda api: api["sku"],
        lambda api: api(),
        lambda api: list(api),
        lambda api: api.__enter__(),
        lambda api: hasattr(api, "get"),
    ],
)
def test_a_default_that_nobody_replaced(use: Callable[[Any], object]) -> None:
    """Every use says what to do instead, in a helper and in another base's body."""

    other = Celery("celerys_own", set_as_current=False)

    @other.task(name="injection.celerys_own", base=Task)
    def task(api: Any = ShopTask.api.inject()) -> Any:
        return use(api)

    for call in (lambda: use(undecorated()), task):
        with pytest.raises(ConfigurationError, match=r"ShopTask\.api\.inject\(\) is still.*ShopTask\.api\.get\(\)"):
            call()


def test_the_default_is_quiet() -> None:
    """What looks at defaults sees a text that is the same in every process, and no attributes."""
    default = undecorated()
    assert repr(default) == "ShopTask.api.inject()"
    assert repr(ShopTask.session.inject()) == "ShopTask.session.inject()"
    assert not hasattr(default, "__wrapped__")
    assert getattr(default, "_repr_html_", None) is None
    help_text = io.StringIO()
    print(f"{functools.partial(undecorated)!r} {dis.code_info(undecorated)}", file=help_text)
    assert not ShopTask.api.is_open


def test_positional_only_is_refused() -> None:
    """When the task is created; it is not registered then."""
    other = Celery("only", set_as_current=False)

    # Not for every later app of the process.
    @other.task(base=ShopTask, name="injection.only", shared=False)
    def body(api: Client = ShopTask.api.inject(), /) -> None: ...

    with pytest.raises(ConfigurationError, match=r"injection\.only: the parameter 'api' is positional-only.*'/'"):
        other.finalize()
    assert "injection.only" not in other.tasks


def instructions(call: Callable[[], object]) -> int:
    """Return how many bytecodes a call executes; the first two calls are not counted."""
    counted = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal counted
        frame.f_trace_opcodes = True
        counted += event == "opcode"
        return trace

    call()
    call()
    former = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(former)
    return counted


def frames(call: Callable[[], object]) -> int:
    """Return how many functions a call calls."""
    counted = 0

    def profile(_: object, event: str, __: object) -> None:
        nonlocal counted
        counted += event == "call"

    call()
    former = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(former)
    return counted


def test_cost() -> None:
    """A frame more than ``self`` and two dozen bytecodes a parameter; nothing for who injects nothing."""

    @app.task(base=ShopTask, name="injection.cost")
    def injects(api: Client = ShopTask.api.inject(), session: Session = ShopTask.session.inject()) -> Any:
        return api, session

    @app.task(base=ShopTask, bind=True, name="injection.cost_self")
    def uses_self(self: ShopTask) -> Any:
        return self.api, self.session

    injects()
    uses_self()
    assert frames(injects) - frames(uses_self) <= 1
    assert instructions(injects) - instructions(uses_self) <= 100
    # The body itself is what the attempt calls.
    original = [cell.cell_contents for cell in uses_self.run.__closure__ if hasattr(cell.cell_contents, "__self__")]
    assert [each.__func__ for each in original if each.__name__ == "uses_self"] == [type(app.tasks[uses_self.name]).run]
