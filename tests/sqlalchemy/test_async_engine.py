"""Tasks with an asynchronous engine and session, on a real server: what holds for the synchronous ones holds."""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tests.stats.counting import closed, eventually, stats
from tests.support.databases import Database
from tests.support.shop import NUMBERS, Shop
from tests.support.trips import trips
from workerpools import ConfigurationError, DeadlineExceeded, FailureKind, WorkerPools, classify
from workerpools.events import EventKind
from workerpools.sqlalchemy import AsyncSQLAlchemyEngine, AsyncTaskSession, SQLAlchemyEngine, TaskSession

pytest.importorskip("sqlalchemy", minversion="2.1")

DRIVERS = ["psycopg", "asyncpg"]


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


class AsyncShop(Shop):
    """A shop whose engine and session are asynchronous."""

    def __init__(self, database: Database, driver: str, proxy: Any) -> None:
        super().__init__()
        self.database, self.driver, self.proxy = database, driver, proxy
        database.execute("create table orders (id int primary key deferrable initially deferred)")
        self.name = self.with_options()

    def with_options(self, **options: Any) -> str:
        """Give the tasks to come an engine with other options; return its name."""
        url, name = self.database.through(self.proxy).url(self.driver), f"db{next(NUMBERS)}"
        # However slow the machine is, an idle connection is trusted: what finds it dead is the task.
        options = {"check_after": 600.0, **options}
        self.async_engine = engine = self.pools.add(AsyncSQLAlchemyEngine(url, **options), name=name)
        self._extend(db=engine, session=AsyncTaskSession(engine))
        return name

    def checked_out(self) -> int:
        pool = self.async_engine.get().pool
        assert isinstance(pool, sqlalchemy.pool.QueuePool)
        return pool.checkedout()


@pytest.fixture(params=DRIVERS)
def shop(request: pytest.FixtureRequest, database: Database, proxy_to: Any) -> Iterator[AsyncShop]:
    with closing(AsyncShop(database, request.param, proxy_to(database))) as made:
        yield made


async def insert(session: Any, number: int) -> None:
    await session.execute(text("insert into orders values (:number)"), {"number": number})


async def count(session: Any) -> int:
    return int(await session.scalar(text("select count(*) from orders")))


# --- the session -----------------------------------------------------------------------------------------------------


def test_one_session_per_attempt(shop: AsyncShop) -> None:
    """Committed when the body has returned, and rolled back when it fails; what gather() starts shares it."""
    seen: list[AsyncSession] = []

    async def step(session: AsyncSession, number: int) -> None:
        seen.append(session)
        await insert(session, number)

    @shop.task()
    async def task(self: Any, number: int, fails: bool = False) -> int:
        await asyncio.gather(step(self.session, number))
        assert await count(self.session) == number
        assert shop.rows() == list(range(1, number))
        if fails:
            raise ValueError("mine")
        return number

    assert [task(number) for number in (1, 2)] == [1, 2]
    with pytest.raises(ValueError, match="mine"):
        task(3, True)
    assert shop.rows() == [1, 2]
    assert len({id(session) for session in seen}) == 3
    assert shop.checked_out() == 0
    now = stats(shop.pools, shop.name)
    assert (now.open, now.value("opened"), now.value("reused"), now.in_use, now.value("leaks")) == (1, 1, 2, 0, 0)


def test_a_plain_body_has_it_too(shop: AsyncShop) -> None:
    """It is committed all the same, and used through pools.run()."""

    @shop.task()
    def task(self: Any, number: int) -> int:
        shop.pools.run(insert(self.session, number))
        return shop.pools.run(count(self.session))

    assert (task(1), shop.rows()) == (1, [1])


def test_another_loop_is_refused_by_name(shop: AsyncShop) -> None:
    """That of asyncio.run() in a plain body, with a cold engine and with a warm one."""

    @shop.task()
    def task(self: Any) -> int:
        return asyncio.run(count(self.session))

    @shop.task()
    async def warms(self: Any) -> int:
        return await count(self.session)

    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"'{shop.name}' lives on this process's own event loop.*pools\.run"):
            task()
        assert warms() == 0


def test_a_session_that_has_ended(shop: AsyncShop) -> None:
    kept: list[AsyncSession] = []

    @shop.task()
    async def task(self: Any) -> None:
        kept.append(self.session)
        await insert(self.session, 1)

    task()
    with pytest.raises(Exception, match="the run of the task body that this session belonged to has ended"):
        shop.pools.run(count(kept[0]))
    assert shop.rows() == [1]


def test_a_caught_error_is_not_committed_in_silence(shop: AsyncShop) -> None:
    @shop.task()
    async def task(self: Any, nested: bool) -> None:
        await insert(self.session, 1)
        try:
            if nested:
                async with self.session.begin_nested():
                    await self.session.execute(text("select 1 / 0"))
            else:
                await self.session.execute(text("select 1 / 0"))
        except DBAPIError:
            pass

    with pytest.raises(PendingRollbackError):
        task(False)
    assert shop.rows() == []
    task(True)
    assert shop.rows() == [1]


class Own(AsyncSession):
    """A user's class, with an option of its own."""

    def __init__(self, *args: Any, tenant: str = "none", **options: Any) -> None:
        super().__init__(*args, **options)
        self.tenant = tenant


def test_ways_to_the_session(shop: AsyncShop) -> None:
    """Its class and options, the handle, a parameter, an override, and who commits."""
    declared = AsyncTaskSession(shop.async_engine, class_=Own, tenant="north", commit=False, expire_on_commit=False)
    base: Any = type("Other", (shop.base,), {"abstract": True, "session": declared})

    async def body(
        self: Any, number: int, commits: bool, session: Own = base.session.inject()
    ) -> tuple[bool, str, bool]:
        same = self.session is session is base.session.get()
        await insert(session, number)
        if commits:
            await session.commit()
        return same, session.tenant, session.sync_session.expire_on_commit

    @shop.task(base=base)
    def overridden(self: Any) -> bool:
        return bool(self.session is fake)

    task = shop.task(base=base)(body)
    assert [task(1, True), task(2, False)] == [(True, "north", False)] * 2
    assert shop.rows() == [1]
    fake: Any = object()
    with base.session.override(fake):
        assert overridden()


def test_a_mapped_class_and_a_second_engine(shop: AsyncShop) -> None:
    """``binds`` takes resources; a class that is not named goes to the session's own engine."""
    first, name = shop.async_engine, shop.with_options()
    base: Any = type(
        "Two", (shop.base,), {"abstract": True, "session": AsyncTaskSession(first, binds={Order: shop.async_engine})}
    )

    @shop.task(base=base)
    async def task(self: Any) -> int:
        self.session.add(Order(id=5))
        await self.session.flush()
        return await count(self.session)

    # The session's own connection does not see what the other has not committed.
    assert (task(), shop.rows()) == (0, [5])
    assert [stats(shop.pools, each).open for each in (shop.name, name)] == [1, 1]


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("does", ["nothing", "reads", "writes", "commits"])
def test_a_stale_connection(shop: AsyncShop, does: str) -> None:
    """The body runs again, unless it has committed."""
    runs: list[int] = []

    @shop.task()
    async def task(self: Any) -> int:
        runs.append(1)
        if does == "reads":
            await count(self.session)
        elif does in ("writes", "commits"):
            await insert(self.session, 1)
        if does == "commits":
            await self.session.commit()
        if len(runs) == 1:
            shop.proxy.close_all()
        return await count(self.session)

    shop.pools.run(warm(shop.async_engine.get()))
    if does == "commits":
        with pytest.raises(DBAPIError) as caught:
            task()
        assert f"COMMIT by '{shop.name}' had left already" in caught.value.__notes__[-1]
        assert (len(runs), shop.rows()) == (1, [1])
    else:
        assert task() == (1 if does == "writes" else 0)
        assert (len(runs), shop.replays()) == (2, 1)
    assert shop.checked_out() == 0


async def warm(engine: AsyncEngine) -> None:
    async with engine.connect():
        pass


@pytest.mark.parametrize("deliver", [False, True], ids=["server never got it", "server got it"])
@pytest.mark.parametrize("whose", ["attempt", "body", "engine"])
def test_a_lost_commit_is_resolved(shop: AsyncShop, deliver: bool, whose: str) -> None:
    """Committed: the task has succeeded. Aborted: its body runs again. One row either way."""
    runs: list[int] = []

    @shop.task()
    async def task(self: Any) -> str:
        runs.append(1)
        if whose == "engine":
            async with self.db.begin() as connection:
                await insert(connection, 1)
        else:
            await insert(self.session, 1)
        if whose == "body":
            await self.session.commit()
        return "done"

    cut = shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=deliver, how="fin", reply_wait=1.0)
    assert task() == "done"
    assert (cut.fired, len(runs), shop.rows()) == (1, 1 if deliver else 2, [1])
    told = [event.detail for event in shop.events if event.kind is EventKind.COMMIT_RESOLVED]
    assert told == ["outcome=committed" if deliver else "outcome=aborted"]
    assert shop.checked_out() == 0


def test_a_lost_commit_that_cannot_be_resolved(shop: AsyncShop) -> None:
    shop.with_options(resolve_commit=False)

    @shop.task()
    async def task(self: Any) -> None:
        await insert(self.session, 1)

    shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=True, how="fin", reply_wait=1.0)
    with pytest.raises(DBAPIError) as caught:
        task()
    failure = classify(caught.value)
    assert failure is not None
    assert failure.kind is FailureKind.INDETERMINATE
    assert shop.rows() == [1]


# --- the deadline ----------------------------------------------------------------------------------------------------


def active(shop: AsyncShop) -> int:
    return int(
        str(
            shop.database.execute(
                "select count(*) from pg_stat_activity"
                " where pid <> pg_backend_pid() and datname = current_database() and state = 'active'"
            )[0][0]
        )
    )


@pytest.mark.parametrize("how", ["server", "silent", "pool", "raw"])
def test_the_deadline(shop: AsyncShop, how: str) -> None:
    """It ends a statement on the server, and every wait; the task fails with its time limit."""
    if how == "pool":
        shop.with_options(pool_size=1, max_overflow=0)

    @shop.task(soft_time_limit=1.0)
    async def task(self: Any) -> None:
        if how == "silent":
            shop.proxy.blackhole()
            await count(self.session)
        elif how == "pool":
            async with self.db.connect():
                await self.db.connect()
        elif how == "raw":
            raw = await (await self.session.connection()).get_raw_connection()
            await raw.driver_connection.execute("select pg_sleep(30)")
        else:
            await self.session.execute(text("select pg_sleep(30)"))

    @shop.task()
    async def afterwards(self: Any) -> int:
        return await count(self.session)

    assert afterwards() == 0
    began = time.monotonic()
    with pytest.raises((SoftTimeLimitExceeded, DeadlineExceeded)):
        task.apply().get()
    assert 0.7 < time.monotonic() - began < 4.0
    shop.proxy.pass_through()
    eventually(lambda: active(shop) == 0, 3.0)
    assert afterwards() == 0
    assert shop.checked_out() == 0


def test_a_statement_that_the_body_itself_gives_up(shop: AsyncShop) -> None:
    """It is cancelled on the server, its connection is not used again, and the body goes on."""

    @shop.task()
    async def task(self: Any) -> int:
        with pytest.raises(asyncio.TimeoutError):
            async with self.db.connect() as connection:
                await asyncio.wait_for(connection.execute(text("select pg_sleep(30)")), 0.2)
        return await count(self.session)

    assert task() == 0
    eventually(lambda: active(shop) == 0, 3.0)
    now = stats(shop.pools, shop.name)
    assert (shop.checked_out(), now.in_use, now.value("leaks")) == (0, 0, 0)
    assert now.open == 1


def test_soft_limits_struck_at_random(shop: AsyncShop) -> None:
    """Whatever is interrupted, connecting too: what is left is what is counted, and the next task has a connection."""
    chance = random.Random(7)

    @shop.task()
    async def task(self: Any) -> None:
        while True:
            await insert(self.session, 1)
            async with self.db.begin() as connection:
                await connection.execute(text("select 1"))
            await self.session.rollback()

    def strike(*_: object) -> None:
        raise SoftTimeLimitExceeded

    def sessions() -> int:
        ours = "datname = current_database() and application_name like 'workerpools %'"
        return int(str(shop.database.execute(f"select count(*) from pg_stat_activity where {ours}")[0][0]))

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for number in range(40):
            if number % 4 == 0:
                shop.async_engine.close()
            with pytest.raises(SoftTimeLimitExceeded):
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.001, 0.1))
                task()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    now = stats(shop.pools, shop.name)
    assert (now.in_use, now.pending, shop.rows()) == (0, 0, [])
    gc.collect()
    eventually(lambda: sessions() == stats(shop.pools, shop.name).open <= 2, 5.0)


# --- a clean connection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaves", "left"),
    [
        ("set search_path to nowhere", "select current_setting('search_path') = 'nowhere'"),
        ("set role pg_monitor", "select current_user = 'pg_monitor'"),
        ("select pg_advisory_lock(7)", "select exists (select from pg_locks where locktype = 'advisory')"),
        ("create temp table kept (a int)", "select to_regclass('pg_temp.kept') is not null"),
    ],
)
def test_what_a_task_left_is_gone_for_the_next(shop: AsyncShop, leaves: str, left: str) -> None:
    @shop.task()
    async def task(self: Any, statement: str) -> list[Any]:
        found = (await self.session.execute(text(statement))).scalar() if "select" in statement else None
        if found is None:
            await self.session.execute(text(statement))
        return [found, await self.session.scalar(text("select pg_backend_pid()"))]

    _, first = task(leaves)
    assert task(left) == [False, first]


# --- its connections -------------------------------------------------------------------------------------------------


def test_a_transaction_takes_one_trip_per_statement_and_one(shop: AsyncShop) -> None:
    """The deadline, the reset of the session and the question for the id are on board."""

    @shop.task(soft_time_limit=30)
    async def task(self: Any, number: int) -> int:
        await insert(self.session, number)
        return await count(self.session)

    assert task.apply((1,)).get() == 1
    with trips(shop.proxy) as sent:
        assert task.apply((2,)).get() == 2
    # asyncpg has no pipeline: the reset, BEGIN, the deadline and the question go alone.
    assert len(sent) == {"psycopg": 3, "asyncpg": 7}[shop.driver], sent


def test_lifetimes_and_recycling(shop: AsyncShop) -> None:
    name = shop.with_options(max_lifetime=0.2, max_lifetime_jitter=0.0)

    @shop.task()
    async def task(self: Any) -> int:
        return int(await self.session.scalar(text("select pg_backend_pid()")))

    first = task()
    time.sleep(0.25)
    second = task()
    assert first != second
    shop.pools.recycle()
    assert task() != second
    assert closed(shop.pools, name) == {"lifetime": 1, "recycled": 1}


def test_an_idle_connection_is_checked(shop: AsyncShop) -> None:
    """A dead one is replaced before the body has it."""
    name = shop.with_options(check_after=0.0)

    @shop.task()
    async def task(self: Any) -> int:
        return await count(self.session)

    assert [task(), task()] == [0, 0]
    shop.proxy.close_all()
    assert task() == 0
    now = stats(shop.pools, name)
    assert (shop.replays(), now.value("failed_checks"), now.open) == (0, 1, 1)
    assert closed(shop.pools, name) == {"stale": 1}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "dropped"])
def test_a_connection_that_was_not_given_back(shop: AsyncShop, kept: bool) -> None:
    """It is told as a leak, and taken back at the end of its attempt; the garbage collector finds nothing to say."""
    keeper: list[Any] = []

    @shop.task()
    async def task(self: Any) -> None:
        connection = await self.db.connect()
        await insert(connection, 1)
        if kept:
            keeper.append(connection)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task()
        gc.collect()
    assert [str(each.message) for each in caught if "garbage" in str(each.message)] == []
    now = stats(shop.pools, shop.name)
    assert (shop.checked_out(), now.in_use, now.value("leaks"), now.open) == (0, 0, 1, 1)
    assert shop.rows() == []


def test_several_connections_at_once(shop: AsyncShop) -> None:
    """Each caller waits for its own turn, not for the loop."""
    name = shop.with_options(pool_size=1, max_overflow=1)

    async def use(engine: AsyncEngine) -> int:
        async with engine.connect() as connection:
            return int(await connection.scalar(text("select 1 from pg_sleep(0.05)")))

    @shop.task()
    async def task(self: Any) -> list[int]:
        return await asyncio.gather(*(use(self.db) for _ in range(6)))

    assert task() == [1] * 6
    now = stats(shop.pools, name)
    assert (now.value("opened"), now.value("reused"), now.in_use, now.open) == (2, 4, 0, 1)


def test_a_connect_that_is_cancelled_anywhere(shop: AsyncShop) -> None:
    """It says nothing on the loop, and keeps no connection."""
    said: list[dict[str, Any]] = []

    async def connect() -> None:
        async with shop.async_engine.get().connect():
            pass

    async def cancelled_after(steps: int) -> None:
        connecting = asyncio.create_task(connect())
        for _ in range(steps):
            await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.wait([connecting])

    async def cancel_anywhere() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: said.append(context))
        try:
            for steps in range(20):
                await cancelled_after(steps)
                await shop.async_engine.get().dispose()
            await asyncio.sleep(0.05)
            gc.collect()
        finally:
            loop.set_exception_handler(None)

    shop.pools.run(cancel_anywhere())
    assert not said
    assert shop.checked_out() == 0
    eventually(lambda: shop.proxy.open == 0)


Use = Callable[[Any], Any]


async def executes(driver: Any) -> None:
    await driver.execute("insert into orders values (7)")


async def copies(driver: Any) -> None:
    if hasattr(driver, "copy_records_to_table"):
        await driver.copy_records_to_table("orders", records=[(7,)])
        return
    async with driver.cursor() as cursor, cursor.copy("copy orders from stdin") as copy:
        await copy.write_row((7,))


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("use", [executes, copies])
def test_past_the_engine(shop: AsyncShop, use: Use, commits: bool) -> None:
    """What is committed on the driver's own connection is an effect; what is not is replayed.

    asyncpg's connection does not tell: whatever is done on it is an effect.
    """
    told = shop.driver == "psycopg"
    runs: list[int] = []

    @shop.task()
    async def task(self: Any) -> int:
        runs.append(1)
        raw = await (await self.session.connection()).get_raw_connection()
        await use(raw.driver_connection)
        if commits and told:
            await raw.driver_connection.commit()
        if len(runs) == 1:
            shop.proxy.close_all()
        return await count(self.session)

    if commits or not told:
        with pytest.raises(DBAPIError) as caught:
            task()
        assert "had left already" in caught.value.__notes__[-1]
        assert (len(runs), 7 in shop.rows()) == (1, commits or not told)
    else:
        assert (task(), len(runs)) == (1, 2)


def test_streamed_rows(shop: AsyncShop) -> None:
    @shop.task()
    async def task(self: Any) -> int:
        rows = await self.session.stream(text("select generate_series(1, 5000)"))
        return sum([row[0] async for row in rows])

    assert task() == sum(range(1, 5001))


def test_credentials_and_connections_of_ones_own(shop: AsyncShop) -> None:
    """A plain function for the one, ``async_creator`` for the other."""
    database, url = shop.database, sqlalchemy.make_url(shop.database.url(shop.driver))
    asked: list[int] = []

    def credentials() -> tuple[str, str]:
        asked.append(1)
        return database.user, database.password

    async def opened() -> Any:
        asked.append(1)
        if shop.driver == "asyncpg":
            import asyncpg

            return await asyncpg.connect(database.dsn)
        import psycopg

        return await psycopg.AsyncConnection.connect(database.dsn)

    for number, options in enumerate(({"credentials": credentials}, {"async_creator": opened})):
        wrong = url.set(password="wrong").render_as_string(hide_password=False)
        engine = shop.pools.add(AsyncSQLAlchemyEngine(wrong, **options), name=f"own{number}")

        async def use(value: AsyncEngine) -> int:
            async with value.connect() as connection:
                return await count(connection)

        assert shop.pools.run(use(engine.get())) == 0
        assert len(asked) == number + 1
        assert stats(shop.pools, f"own{number}").open == 1


# --- refused where they are declared ---------------------------------------------------------------------------------

URL = "postgresql+psycopg://app:hunter2@db/shop"


def resource(adapter: Any) -> Any:
    return WorkerPools().add(adapter, name="db")


@pytest.mark.parametrize(
    ("declare", "wanted"),
    [
        (lambda: SQLAlchemyEngine("postgresql+asyncpg://app:hunter2@db/shop"), "declare an AsyncSQLAlchemyEngine"),
        (
            lambda: SQLAlchemyEngine("postgresql+psycopg_async://app:hunter2@db/shop"),
            "declare an AsyncSQLAlchemyEngine",
        ),
        (lambda: AsyncSQLAlchemyEngine("postgresql+psycopg2://app:hunter2@db/shop"), "or declare a SQLAlchemyEngine"),
        (lambda: AsyncSQLAlchemyEngine("mysql+pymysql://app:hunter2@db/shop"), "or declare a SQLAlchemyEngine"),
        (lambda: AsyncSQLAlchemyEngine("sqlite+aiosqlite://"), r"'aiosqlite' is not among.*postgresql\+asyncpg://"),
        (lambda: AsyncSQLAlchemyEngine("postgresql+asyncpg://app:hunter2@db/shop", pgbouncer=True), "needs psycopg 3"),
        (lambda: AsyncSQLAlchemyEngine(URL, poolclass=sqlalchemy.NullPool), "poolclass= is not taken.*async_creator="),
        (lambda: AsyncSQLAlchemyEngine(URL, pool_size=-1), "^AsyncSQLAlchemyEngine: pool_size"),
        (lambda: AsyncSQLAlchemyEngine(URL, check_aftr=1), "^AsyncSQLAlchemyEngine: .*did you mean check_after"),
        (lambda: TaskSession(resource(AsyncSQLAlchemyEngine(URL))), "declare an AsyncTaskSession"),
        (lambda: AsyncTaskSession(resource(SQLAlchemyEngine(URL))), "declare a TaskSession"),
        (lambda: TaskSession(resource(SQLAlchemyEngine(URL)), class_=AsyncSession), "declare an AsyncTaskSession"),
        (lambda: AsyncTaskSession(resource(AsyncSQLAlchemyEngine(URL)), class_=Session), "declare a TaskSession"),
        (lambda: AsyncTaskSession(async_sessionmaker()), r"AsyncTaskSession\(resource, …\)"),
        (lambda: AsyncTaskSession(resource(AsyncSQLAlchemyEngine(URL)), autocomit=True), "no option autocomit"),
    ],
)
def test_what_is_refused(declare: Any, wanted: str) -> None:
    """By the name of what to write instead, and without the password."""
    with pytest.raises(ConfigurationError, match=wanted) as caught:
        declare()
    assert "hunter" not in str(caught.value)
