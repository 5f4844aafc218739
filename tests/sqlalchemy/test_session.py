"""TaskSession's options, and the ways to a session: its class, its engines, who commits, helpers without ``self``."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy
from celery import Celery
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, registry, scoped_session, sessionmaker

from tests.support.databases import Database, new_database
from tests.support.forking import run_in_fork
from tests.support.proxy import TcpProxy
from tests.support.shop import NUMBERS, Shop, insert
from workerpools import ConfigurationError, DatabaseTask, NoAttemptError, PooledTask, WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession, current_session


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)


class Counting(Session):
    """A user's class, whose names are those that an attempt uses for what it holds."""

    def __init__(self, *args: Any, tenant: str = "none", **options: Any) -> None:
        super().__init__(*args, **options)
        self.tenant = tenant
        self.owner = "the user"

    def finish(self) -> str:
        return "the user's"

    end = rollback_to = finish


class Slotted(Session):
    __slots__ = ("extra",)


class Demanding(Session):
    """Wants an argument of whoever derives from it."""

    def __init_subclass__(cls, *, shard: int) -> None:
        cls.shard = shard


def with_session(shop: Shop, **options: Any) -> type[PooledTask]:
    return type("Own", (shop.base,), {"abstract": True, "session": TaskSession(shop.engine, **options)})


# --- its class -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_", [Session, Counting, Slotted, Demanding])
def test_a_class_of_ones_own_is_one_per_attempt(shop: Shop, class_: type[Session]) -> None:
    """It is that class, committed when the body returns, rolled back otherwise, and ends with its attempt."""
    kept: list[Session] = []

    @shop.task(base=with_session(shop, class_=class_))
    def task(self: Any, number: int, fails: bool) -> None:
        kept.append(self.session)
        assert type(self.session) is class_
        insert(self.session, number)
        if fails:
            raise ZeroDivisionError

    task(1, False)
    with pytest.raises(ZeroDivisionError):
        task(2, True)
    assert shop.rows() == [1]
    assert kept[0] is not kept[1]
    for session in kept:
        assert isinstance(session, class_)
        for use in (lambda s: s.execute(text("select 1")), lambda s: s.begin(), lambda s: s.connection()):
            with pytest.raises(NoAttemptError, match=r"\.session: the run .*has ended"):
                use(session)
    assert shop.checked_out() == 0


def test_a_class_keeps_its_own_members_and_options(shop: Shop) -> None:
    """No name of ours hides one of the user's."""

    @shop.task(base=with_session(shop, class_=Counting, tenant="north", expire_on_commit=False))
    def task(self: Any) -> tuple[Any, ...]:
        insert(self.session, 1)
        return self.session.tenant, self.session.owner, self.session.finish(), self.session.expire_on_commit

    assert task() == ("north", "the user", "the user's", False)
    assert shop.rows() == [1]


def test_a_commit_of_the_class_is_the_attempts(shop: Shop) -> None:
    """A class that does more at COMMIT does it for the attempt, too."""

    class Audited(Session):
        def commit(self) -> None:
            insert(self, 100)
            super().commit()

    @shop.task(base=with_session(shop, class_=Audited))
    def task(self: Any) -> None:
        insert(self.session, 1)

    task()
    assert shop.rows() == [1, 100]


def test_listeners_of_the_class(shop: Shop) -> None:
    """Listeners of a class hear of the sessions of tasks."""
    heard: list[str] = []

    class Heard(Session):
        pass

    event.listen(Heard, "after_commit", lambda _: heard.append("commit"))

    @shop.task(base=with_session(shop, class_=Heard))
    def task(self: Any) -> None:
        insert(self.session, 1)

    task()
    assert heard == ["commit"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no SQLModel for Python 3.10 knows SQLAlchemy 2.1")
def test_sqlmodel(shop: Shop) -> None:
    """SQLModel's session has ``exec``."""
    import sqlmodel

    # Of this test's own: SQLModel's registry and its tables belong to the process.
    class Model(sqlmodel.SQLModel, registry=registry()):
        metadata = sqlalchemy.MetaData()

    class Hero(Model, table=True):
        __tablename__ = "orders"
        id: int = sqlmodel.Field(primary_key=True)

    @shop.task(base=with_session(shop, class_=sqlmodel.Session))
    def task(self: Any) -> list[int]:
        self.session.add(Hero(id=7))
        return [hero.id for hero in self.session.exec(sqlmodel.select(Hero)).all()]

    assert task() == [7]
    assert shop.rows() == [7]


def test_a_class_that_chooses_the_engine_itself(shop: Shop) -> None:
    """A routing session asks resources in its ``get_bind``, in each process for that process's engines."""
    replica, _ = shop.another()
    asked: list[str] = []

    class Routing(Session):
        def get_bind(self, *args: Any, **options: Any) -> Any:
            asked.append("asked")
            return replica.get()

    @shop.task(base=with_session(shop, class_=Routing))
    def task(self: Any) -> Any:
        insert(self.session, 1)
        return self.session.connection().engine is replica.get(), self.db is replica.get(), self.effects

    assert task() == (True, False, ())
    assert asked
    assert shop.rows() == [1]


@pytest.mark.parametrize(
    ("factory", "wanted"),
    [
        (sessionmaker(expire_on_commit=False), r"TaskSession\(resource, …\)"),
        (sessionmaker(class_=Counting), r"TaskSession\(resource, class_=Counting, …\)"),
        (scoped_session(sessionmaker(class_=Counting)), r"TaskSession\(resource, class_=Counting, …\)"),
        (scoped_session(lambda: Session()), r"TaskSession\(resource, …\)"),
        (sessionmaker, r"TaskSession\(resource, …\)"),
        (scoped_session, r"TaskSession\(resource, …\)"),
    ],
)
def test_factories_of_sessions(factory: Any, wanted: str) -> None:
    """Refused in either place, with what to write."""
    engine = WorkerPools().add(SQLAlchemyEngine("sqlite://"), name="db")
    for declare in (lambda: TaskSession(factory), lambda: TaskSession(engine, class_=factory)):
        with pytest.raises(ConfigurationError, match=rf"makes sessions of its own.*{wanted}$"):
            declare()


def test_what_is_no_class_of_sessions() -> None:
    """An instance, another class, and an asynchronous session."""
    from sqlalchemy.ext.asyncio import AsyncSession

    engine = WorkerPools().add(SQLAlchemyEngine("sqlite://"), name="db")
    for class_ in (Session(), AsyncSession, dict, None, "Session"):
        with pytest.raises(ConfigurationError, match=r"class_=.*wanted: sqlalchemy\.orm\.Session or a subclass"):
            TaskSession(engine, class_=class_)  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError, match=r"commit='no'; wanted: True or False"):
        TaskSession(engine, commit="no")  # type: ignore[call-overload]


def test_options_are_those_of_the_class() -> None:
    """Its own, and those of Session where it passes them on."""
    engine = WorkerPools().add(SQLAlchemyEngine("sqlite://"), name="db")

    class Strict(Session):
        def __init__(self, bind: Any, tenant: str) -> None:
            super().__init__(bind)

    TaskSession(engine, class_=Counting, tenant="north", autoflush=False)
    with pytest.raises(ConfigurationError, match=r"Counting has no option tennant \(did you mean tenant\?\)"):
        TaskSession(engine, class_=Counting, tennant="north")
    TaskSession(engine, class_=Strict, tenant="north")
    with pytest.raises(ConfigurationError, match=r"Strict has no option autoflush"):
        TaskSession(engine, class_=Strict, autoflush=False)


# --- several engines -------------------------------------------------------------------------------------------------


class Two:
    """A shop whose session has two engines, each behind a proxy of its own."""

    def __init__(self, shop: Shop, other: Database, proxy: TcpProxy, **options: Any) -> None:
        self.shop, self.other, self.proxies = shop, other, (shop.proxy, proxy)
        other.execute("create table items (id int primary key)")
        url = other.through(proxy).url(shop.driver)
        self.items = shop.pools.add(SQLAlchemyEngine(url, check_after=600.0, **options), name="items")
        session = TaskSession(shop.engine, binds={Item: self.items})
        self.base = type("Two", (shop.base,), {"abstract": True, "session": session})

    def rows(self) -> tuple[list[int], list[int]]:
        return self.shop.rows(), [int(row[0]) for row in self.other.execute("select id from items")]  # type: ignore[call-overload]


@pytest.fixture
def two(shop: Shop, postgres_server: Any, proxy_to: Any) -> Iterator[Two]:
    with new_database(postgres_server) as other:
        yield Two(shop, other, proxy_to(other))
        shop.close()


@pytest.mark.parametrize("key", ["class", "table", "base"])
def test_engines_by_model(shop: Shop, two: Two, key: str) -> None:
    """A mapped class, a table or a base class, as for Session; engines are those of the process."""
    keys: dict[str, Any] = {"class": Item, "table": Item.__table__, "base": Base}
    session = TaskSession(shop.engine, binds={keys[key]: two.items})

    @shop.task(base=type("Bound", (shop.base,), {"abstract": True, "session": session}))
    def task(self: Any) -> list[str]:
        self.session.add(Item(id=2))
        self.session.flush()
        if key != "base":
            self.session.add(Order(id=1))
        insert(self.session, 3)

        def child() -> str:
            return str(self.session.get_bind(Item) is two.items.get() and self.session.scalars(text("select 1")).one())

        return [run_in_fork(child), str(self.session.get_bind(Item) is two.items.get())]

    assert task() == ["1", "True"]
    assert two.rows() == ([1, 3] if key != "base" else [3], [2])


def test_engines_of_a_session_follow_their_overrides(shop: Shop, two: Two) -> None:
    """Like the session's own engine."""
    fake = sqlalchemy.create_engine("sqlite://", poolclass=sqlalchemy.StaticPool)
    Base.metadata.create_all(fake)

    @shop.task(base=two.base)
    def task(self: Any) -> None:
        self.session.add_all([Order(id=1), Item(id=2)])

    with two.items.override(fake):
        task()
    assert two.rows() == ([1], [])
    with fake.connect() as connection:
        assert connection.scalar(text("select id from items")) == 2
    fake.dispose()


@pytest.mark.parametrize("how", ["server never got it", "server got it", "lost between the two"])
def test_a_second_commit_that_is_lost_is_no_replay(shop: Shop, two: Two, how: str) -> None:
    """A session commits its engines one after the other: what the first COMMIT did stands, and is not done again."""
    runs: list[int] = []
    commits = itertools.count(1)

    @shop.task(base=two.base)
    def task(self: Any) -> None:
        runs.append(1)
        self.session.add_all([Order(id=len(runs)), Item(id=len(runs))])

    def second(chunk: bytes) -> bool:
        return b"COMMIT" in chunk and next(commits) == 2

    def end_of(other: TcpProxy) -> Callable[[bytes], bool]:
        def on_first(chunk: bytes) -> bool:
            if b"COMMIT" in chunk and next(commits) == 1:
                other.close_all()
            return False

        return on_first

    for proxy, other in (two.proxies, two.proxies[::-1]):
        if how == "lost between the two":
            proxy.cut_when(end_of(other))
        else:
            proxy.cut_when(second, deliver=how == "server got it")
    if how == "server got it":
        task()
        assert two.rows() == ([1], [1])
    else:
        with pytest.raises(OperationalError) as caught:
            task()
        assert sorted(map(len, two.rows())) == [0, 1]
        committed = "db" if two.rows()[0] else "items"
        assert any(f"COMMIT by '{committed}' had left already" in note for note in caught.value.__notes__)
    assert len(runs) == 1
    assert shop.replays() == 0
    assert shop.checked_out() == 0


def test_a_second_commit_that_the_server_refuses(shop: Shop, two: Two, caplog: pytest.LogCaptureFixture) -> None:
    """Its error is raised, a note and a line say what was committed before."""
    body = "begin raise exception ''refused at commit''; end"
    refusals = 0
    for database, table in ((shop.database, "orders"), (two.other, "items")):
        database.execute(f"create function refuse() returns trigger language plpgsql as '{body}'")
        database.execute(
            f"create constraint trigger refuse after insert on {table} deferrable initially deferred"
            f" for each row when (new.id = 13) execute function refuse()"
        )

    @shop.task(base=two.base)
    def task(self: Any, order: int, item: int) -> None:
        self.session.add_all([Order(id=order), Item(id=item)])

    # SQLAlchemy commits in no particular order: tried until the refusal was the second one.
    for number in range(20, 60):
        caplog.clear()
        with pytest.raises(sqlalchemy.exc.DBAPIError, match="refused at commit") as caught:
            task(13, number)
        by_items = "COMMIT by 'items'"
        notes = [note for note in getattr(caught.value, "__notes__", []) if "not undone" in note]
        told = [record.getMessage() for record in caplog.records if "failed_after_commit" in record.getMessage()]
        stands = bool(two.other.execute("select 1 from items where id = %s", number))
        refusals += stands
        assert notes == (
            ["workerpools: COMMIT by 'items' had left before this was raised, and is not undone."] * stands
        )
        assert [line.partition(" error=")[2] for line in told] == (
            [f"{type(caught.value).__name__} effects={by_items}"] * stands
        )
        if refusals:
            break
    assert refusals


def test_what_is_no_resource_of_an_engine() -> None:
    """An engine of the declaring process would be everybody's: refused, with what to write."""
    pools = WorkerPools()
    db, engine = pools.add(SQLAlchemyEngine("sqlite://"), name="db"), sqlalchemy.create_engine("sqlite://")
    with pytest.raises(ConfigurationError, match=r"bind= is the first argument.*binds=\{Model: resource\}"):
        TaskSession(db, bind=engine)
    for wrong in (engine, SQLAlchemyEngine("sqlite://"), None, "sqlite://"):
        with pytest.raises(ConfigurationError, match=r"binds=\{Item: \w+\}; wanted: a resource.*pools\.add"):
            TaskSession(db, binds={Item: wrong})  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match=r"binds has the key 'items'; wanted: a mapped class"):
        TaskSession(db, binds={"items": db})
    with pytest.raises(ConfigurationError, match="binds is a list"):
        TaskSession(db, binds=[(Item, db)])  # type: ignore[call-overload]


# --- who commits -----------------------------------------------------------------------------------------------------


def test_a_body_that_commits_itself(shop: Shop) -> None:
    """What it has not committed when it returns is rolled back; what it has committed is an effect."""

    @shop.task(base=with_session(shop, commit=False))
    def task(self: Any) -> list[str]:
        for number in (1, 2):
            insert(self.session, number)
            self.session.commit()
        insert(self.session, 3)
        return [str(effect) for effect in self.effects]

    assert task() == ["COMMIT by 'db'"] * 2
    assert shop.rows() == [1, 2]
    assert shop.checked_out() == 0


@pytest.mark.parametrize(
    ("what", "level"),
    [
        ("added", "WARNING"),
        ("deleted", "WARNING"),
        ("changed", "WARNING"),
        ("flushed", "DEBUG"),
        ("read", "DEBUG"),
        ("", ""),
    ],
)
def test_uncommitted_changes_are_told_once(shop: Shop, what: str, level: str, caplog: pytest.LogCaptureFixture) -> None:
    """As a warning where changes are certainly lost; reading after the last COMMIT is no reason for one."""
    caplog.set_level(logging.DEBUG, "workerpools")

    @shop.task(base=with_session(shop, commit=False), name="shop.imports")
    def task(self: Any) -> None:
        self.session.add(Order(id=1))
        self.session.flush()
        order = self.session.get(Order, 1)
        self.session.rollback() if what == "" else None
        if what == "added":
            self.session.add(Order(id=2))
        elif what == "deleted":
            self.session.delete(order)
        elif what == "changed":
            order.id = 3
        elif what == "read":
            self.session.rollback()
            self.session.scalar(text("select 1"))

    for _ in range(2):
        task()
    told = [record for record in caplog.records if "shop.imports returned" in record.getMessage()]
    assert [record.levelname for record in told] == [level] * bool(level)
    assert shop.rows() == []


def test_a_lost_connection_before_the_bodys_commit_is_replayed(shop: Shop) -> None:
    """As with a session that the attempt commits, until the first COMMIT."""
    runs: list[int] = []

    @shop.task(base=with_session(shop, commit=False))
    def task(self: Any, after: bool) -> None:
        runs.append(1)
        insert(self.session, len(runs))
        if after:
            self.session.commit()
        if len(runs) == 1:
            shop.proxy.close_all()
        insert(self.session, len(runs) + 10)
        self.session.commit()

    task(False)
    assert shop.rows() == [2, 12]
    runs.clear()
    shop.database.execute("delete from orders")
    with pytest.raises(OperationalError):
        task(True)
    assert shop.rows() == [1]


# --- helpers without self --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["called directly", "eager"])
def test_the_session_of_the_class(shop: Shop, way: str) -> None:
    """The attempt's, whichever way it is asked for first; in nested attempts the innermost."""
    own = with_session(shop)

    @shop.task(base=own)
    def inner(self: Any) -> int:
        assert own.session.get() is self.session
        return id(self.session)

    @shop.task(base=own)
    def outer(self: Any) -> None:
        first = own.session.get()
        assert first is self.session
        assert inner() == id(first)
        assert inner.apply().get(disable_sync_subtasks=False) != id(first)
        assert own.session.get() is first
        insert(own.session.get(), 1)

    outer() if way == "called directly" else outer.delay().get()
    assert shop.rows() == [1]


def test_the_session_of_a_class_that_the_task_does_not_have(shop: Shop) -> None:
    """It belongs to the attempt all the same."""
    own = with_session(shop)

    @shop.task(base=PooledTask)
    def task(self: Any) -> None:
        insert(own.session.get(), 1)

    task()
    assert shop.rows() == [1]


def test_the_session_of_settings_is_that_of_the_tasks_app(database: Database, postgres_server: Any) -> None:
    """Not of the app that happens to be the current one."""
    with new_database(postgres_server) as other:
        names = []
        for each in (database, other):
            app = Celery(f"shop{next(NUMBERS)}", set_as_current=False)
            app.conf.workerpools_database_url = each.url()
            with closing(WorkerPools(app)):

                @app.task(base=DatabaseTask, shared=False, name=f"settings{next(NUMBERS)}")
                def task() -> Any:
                    first = DatabaseTask.session.get()
                    assert first is current_session()
                    return first.scalar(text("select current_database()"))

                names.append(task())
        assert names == [database.name, other.name]


ASK: list[Callable[[Any], Any]] = [lambda own: own.session.get(), lambda own: current_session()]


@pytest.mark.parametrize("ask", ASK, ids=["get", "current_session"])
def test_outside_an_attempt(shop: Shop, ask: Callable[[Any], Any]) -> None:
    """Where no body runs, and in a thread that a body started."""
    own = with_session(shop)
    with pytest.raises(NoAttemptError, match=r"(session\.get|current_session)\(\) belongs to one run of a task body"):
        ask(own)
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            ask(own)
        except NoAttemptError as error:
            errors.append(error)

    @shop.task(base=own)
    def task(self: Any) -> None:
        self.session.execute(text("select 1"))
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    task()
    assert len(errors) == 1


@pytest.mark.parametrize("ask", ASK, ids=["get", "current_session"])
def test_overrides_are_honoured(shop: Shop, ask: Callable[[Any], Any]) -> None:
    """A test's session stands in for helpers, too."""
    own = with_session(shop)

    @shop.task(base=own)
    def task(self: Any) -> bool:
        return ask(own) is self.session is fake

    with Session() as fake, own.session.override(fake):
        assert task()


def test_a_methods_arguments_on_the_handle(shop: Shop) -> None:
    """``Session.get()`` is meant."""
    own: Any = with_session(shop)
    with pytest.raises(TypeError, match=r"session\.get\(\) takes no arguments; write .*session\.get\(\)\.get\(…\)"):
        own.session.get(Order, 1)


def test_the_only_session(shop: Shop) -> None:
    """The one that was used, or the only one that is declared; in each attempt its own."""
    own = with_session(shop)

    @shop.task(base=own)
    def fresh(self: Any) -> int:
        found = current_session()
        assert found is self.session
        return id(found)

    @shop.task(base=own)
    def task(self: Any) -> None:
        insert(current_session(), 1)
        assert fresh() == id(self.session) != fresh.apply().get(disable_sync_subtasks=False)
        assert current_session() is self.session

    task()
    assert shop.rows() == [1]


def test_none_or_several_sessions(shop: Shop) -> None:
    """It is not guessed which one is meant."""
    members = {"abstract": True, "report": TaskSession(shop.engine)}
    both = type("Both", (with_session(shop),), members)

    @shop.task(base=PooledTask, name="shop.none")
    def none(self: Any) -> Any:
        return current_session()

    @shop.task(base=both, name="shop.both")
    def task(self: Any, *used: str) -> bool:
        for name in used:
            getattr(self, name).execute(text("select 1"))
        return current_session() is getattr(self, used[0])

    with pytest.raises(ConfigurationError, match=r"shop\.none declares no TaskSession .*ShopTask\.session\.get\(\)$"):
        none()
    with pytest.raises(
        ConfigurationError,
        match=r"shop\.both declares several sessions \(Both\.report, Own\.session\); say which: Both\.report\.get\(\)$",
    ):
        task()
    assert task("report")
    with pytest.raises(
        ConfigurationError,
        match=r"shop\.both has used several sessions \(Both\.report, Own\.session\); say which: Both\.report\.get\(\)$",
    ):
        task("session", "report")


# --- after the commit ------------------------------------------------------------------------------------------------


def test_a_listener_that_raises_after_the_commit(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """The row stands and the task fails, once, whatever the listener's error: a note and a line say what stands."""
    runs: list[int] = []

    def listener(kind: str) -> None:
        if kind == "bug":
            raise ZeroDivisionError
        with shop.engine.get().connect() as connection:
            connection.execute(text("select pg_terminate_backend(pg_backend_pid())"))

    @shop.task(name="shop.hook")
    def task(self: Any, kind: str, number: int) -> None:
        runs.append(number)
        event.listen(self.session, "after_commit", lambda _: listener(kind))
        insert(self.session, number)

    with pytest.raises(ZeroDivisionError) as caught:
        task("bug", 1)
    assert caught.value.__notes__ == ["workerpools: COMMIT by 'db' had left before this was raised, and is not undone."]
    assert [record.getMessage() for record in caplog.records if record.name == "workerpools.replay"] == [
        "failed_after_commit task=shop.hook error=ZeroDivisionError effects=COMMIT by 'db'"
    ]
    with pytest.raises(OperationalError) as lost:
        task("connection", 2)
    assert any("COMMIT by 'db' had left already" in note for note in lost.value.__notes__)
    assert runs == [1, 2]
    assert shop.rows() == [1, 2]
    assert shop.checked_out() == 0


def test_a_body_that_fails_before_its_commit_is_not_told(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever commits in the body knows; and of a transaction that was undone there is nothing to say."""

    @shop.task()
    def task(self: Any, commits: bool) -> None:
        insert(self.session, int(commits))
        if commits:
            self.session.commit()
        raise ZeroDivisionError

    for commits in (False, True):
        with pytest.raises(ZeroDivisionError) as caught:
            task(commits)
        assert not hasattr(caught.value, "__notes__")
    assert not [record for record in caplog.records if record.name == "workerpools.replay"]


# --- asynchronous drivers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drivername", "wanted"),
    [
        ("postgresql+asyncpg", r"postgresql\+psycopg2://"),
        ("postgresql+psycopg_async", r"postgresql\+psycopg2://"),
        ("mysql+aiomysql", r"mysql\+pymysql://"),
        ("mysql+asyncmy", r"mysql\+pymysql://"),
        ("oracle+oracledb_async", r"oracle\+oracledb://"),
        ("sqlite+aiosqlite", "sqlite://"),
    ],
)
def test_asynchronous_drivers(drivername: str, wanted: str) -> None:
    """Refused at the declaration, without the password; whether the driver is installed does not matter."""
    with pytest.raises(
        ConfigurationError, match=rf"{drivername.partition('+')[2]}' is an asynchronous driver.*write {wanted}"
    ) as caught:
        SQLAlchemyEngine(f"{drivername}://app:hunter2@db/shop?password=hunter3")
    assert f"({drivername}://app@db/shop)" in str(caught.value)
    assert "hunter" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="asynchronous driver"):
        SQLAlchemyEngine(sqlalchemy.make_url(f"{drivername}://app@db/shop"))


@pytest.mark.parametrize("drivername", ["postgresql+psycopg", "postgresql+nodriver", "nodialect", "mysql+mysqldb"])
def test_other_drivers_are_left_to_the_opening(drivername: str) -> None:
    """What cannot be loaded fails where it is opened, as before."""
    SQLAlchemyEngine(f"{drivername}://app@db/shop")
