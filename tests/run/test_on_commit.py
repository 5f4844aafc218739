"""Functions that wait for an attempt's commit: when they are called, in which order, and when they are not."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery.exceptions import Ignore, SoftTimeLimitExceeded
from kombu.exceptions import EncodeError, OperationalError
from sqlalchemy import event

from tests.support.databases import Database
from tests.support.shop import Shop, insert
from workerpools import ConfigurationError, NoAttemptError
from workerpools._run.attempts import Attempt
from workerpools.events import EventKind


@pytest.fixture
def shop(database: Database, proxy_to: Any) -> Iterator[Shop]:
    """An app whose database is reached through a proxy, and whose messages wait in the process."""
    made = Shop(database, "psycopg2", proxy=proxy_to(database), eager=False)
    yield made
    made.pools.close()


def sent(shop: Shop) -> list[Any]:
    """Return the ids of the messages that have left, in their order."""
    found = []
    with shop.app.connection_for_read() as connection:
        queue = connection.SimpleQueue(shop.app.conf.task_default_queue)
        while queue.qsize():
            message = queue.get(block=False)
            message.ack()
            found.append(message.headers["id"])
    return found


def test_the_order(shop: Shop) -> None:
    """Functions and messages, of the body and of one that it calls, after the last commit of several sessions."""
    _, other = shop.another()
    seen: list[Any] = []

    def note(what: str) -> None:
        seen.append((what, shop.rows()))

    @shop.task()
    def child(self: Any) -> None: ...

    @shop.task()
    def inside(self: Any) -> None:
        shop.pools.on_commit(lambda: note("second"))
        child.apply_async_on_commit(task_id="b")

    @shop.task(base=other)
    def nested(self: Any) -> None:
        insert(self.session, 3)
        shop.pools.on_commit(lambda: note("nested"))
        child.apply_async_on_commit(task_id="c")

    @shop.task(base=type("Both", (shop.base,), {"abstract": True, "second": other.session}))
    def task(self: Any) -> None:
        child.apply_async_on_commit(task_id="a")
        shop.pools.on_commit(lambda: note("first"))
        insert(self.session, 1)
        insert(self.second, 2)
        inside()
        nested.apply()
        assert sent(shop) == ["c"]

    task()
    # The nested task has a commit of its own.
    assert seen == [("nested", [3]), ("first", [1, 2, 3]), ("second", [1, 2, 3])]
    assert sent(shop) == ["a", "b"]


@pytest.mark.parametrize("ending", ["error", "ignore", "commit fails", "time limit"])
def test_what_is_rolled_back_drops_them(shop: Shop, ending: str) -> None:
    """Whatever ended it."""
    calls: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        shop.pools.on_commit(lambda: calls.append(1))
        task.delay_on_commit()
        insert(self.session, 1)
        if ending == "commit fails":
            insert(self.session, 1)
        else:
            raise {"error": ValueError, "ignore": Ignore, "time limit": SoftTimeLimitExceeded}[ending]()

    with pytest.raises(Exception):  # noqa: B017
        task()
    assert (calls, sent(shop), shop.rows()) == ([], [], [])


@pytest.mark.parametrize(("when", "runs"), [("before COMMIT", 2), ("COMMIT lost", 2), ("acknowledgement lost", 1)])
def test_a_replay_and_a_resolved_commit(shop: Shop, when: str, runs: int) -> None:
    """Those of the run that lasts are called, once."""
    calls: list[int] = []
    done: list[int] = []

    @shop.task()
    def child(self: Any) -> None: ...

    @shop.task()
    def task(self: Any) -> None:
        done.append(1)
        number = len(done)
        shop.pools.on_commit(lambda: calls.append(number))
        child.apply_async_on_commit(task_id=f"run {number}")
        insert(self.session, 1)
        if number == 1 and when == "before COMMIT":
            shop.proxy.close_all()
        elif number == 1:
            shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=when.startswith("ack"))
        insert(self.session, 2)

    task()
    assert (calls, sent(shop), shop.rows()) == ([runs], [f"run {runs}"], [1, 2])
    resolved = [event.kind for event in shop.events].count(EventKind.COMMIT_RESOLVED)
    assert resolved == (when != "before COMMIT")


def test_where_no_body_runs(shop: Shop) -> None:
    """At once; a mistake is raised."""
    calls: list[int] = []

    @shop.task()
    def child(self: Any, number: int) -> None: ...

    shop.pools.on_commit(lambda: calls.append(1))
    assert calls == [1]
    result = child.delay_on_commit(1)
    assert sent(shop) == [result.id]
    with pytest.raises(ZeroDivisionError):
        shop.pools.on_commit(lambda: 1 / 0)


def test_after_the_commit_no_attempt_runs(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """What a function uses then would never be committed; what it sends leaves; what it raises is logged."""
    caplog.set_level(logging.ERROR, "workerpools")
    calls: list[object] = []

    @shop.task()
    def child(self: Any) -> None: ...

    @shop.task(name="shop.uses")
    def task(self: Any) -> str:
        def uses() -> None:
            child.apply_async(task_id="a")
            shop.pools.on_commit(lambda: calls.append("inner"))
            insert(self.session, 2)

        shop.pools.on_commit(uses)
        shop.pools.on_commit(lambda: calls.append("next"))
        insert(self.session, 1)
        return "done"

    assert task() == "done"
    assert (calls, sent(shop), shop.rows()) == (["inner", "next"], ["a"], [1])
    (line,) = [record for record in caplog.records if record.getMessage().startswith("on_commit_failed")]
    assert "task=shop.uses" in line.getMessage()
    assert f"error={NoAttemptError.__name__}" in line.getMessage()


def test_a_broker_that_is_away(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """The commit stands and the task succeeds; the log names the message."""

    def refuse(*_: object, **__: object) -> None:
        raise OperationalError("no broker at amqp://u:secret@broker")

    @shop.task(name="shop.child", apply_async=refuse)
    def child(self: Any) -> None: ...

    @shop.task()
    def task(self: Any) -> None:
        insert(self.session, 1)
        child.delay_on_commit()

    task()
    assert (shop.rows(), sent(shop)) == ([1], [])
    assert "what=message 'shop.child' error=OperationalError" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("at", ["closing", "function"])
def test_a_limit_that_strikes_after_the_commit(shop: Shop, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit stands, so all that waited is called; then the limit is raised."""
    calls: list[str] = []

    def interrupt() -> None:
        raise SoftTimeLimitExceeded

    def close(self: Any, *, rollback: bool) -> None:
        whole(self, rollback=rollback)
        if not rollback:
            raise SystemExit

    whole = Attempt.close
    if at == "closing":
        monkeypatch.setattr(Attempt, "close", close)

    @shop.task()
    def task(self: Any) -> None:
        insert(self.session, 1)
        shop.pools.on_commit(lambda: calls.append("first"))
        if at == "function":
            shop.pools.on_commit(interrupt)
        task.apply_async_on_commit(task_id="a")

    with pytest.raises(SystemExit if at == "closing" else SoftTimeLimitExceeded):
        task()
    assert (calls, sent(shop), shop.rows()) == (["first"], ["a"], [1])


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_threads_of_the_body(shop: Shop, copied: bool, fails: bool) -> None:
    """They wait for the attempt that started them. What comes after its end waits no more."""
    calls: list[str] = []
    over = threading.Event()

    @shop.task(replay=False)
    def task(self: Any) -> None:
        before = threading.Event()

        def work() -> None:
            shop.pools.on_commit(lambda: calls.append("before"))
            before.set()
            over.wait(30)
            shop.pools.on_commit(lambda: calls.append("after"))

        context = contextvars.copy_context()
        threads.append(threading.Thread(target=context.run if copied else work, args=(work,) if copied else ()))
        threads[0].start()
        before.wait(30)
        insert(self.session, 1)
        assert calls == []
        if fails:
            raise ValueError

    threads: list[threading.Thread] = []
    if fails:
        with pytest.raises(ValueError):
            task()
    else:
        task()
    over.set()
    threads[0].join(30)
    # Without a context, nothing tells that the thread was of the attempt that failed.
    assert calls == ((["after"] if not copied else []) if fails else ["before", "after"])


def test_mistakes_are_raised_in_the_body(shop: Shop) -> None:
    """After the commit there would be nobody to tell."""

    @shop.task()
    def child(self: Any, number: int) -> None: ...

    @shop.task()
    def task(self: Any, *args: Any) -> None:
        insert(self.session, 1)
        child.delay_on_commit(*args)

    for args, error in (((), TypeError), ((object(),), EncodeError)):
        with pytest.raises(error):
            task(*args)
    assert (sent(shop), shop.rows()) == ([], [])
    with pytest.raises(ConfigurationError, match=r"shop\.odd: publish='later'; wanted: 'at_once' or 'on_commit'"):

        @shop.task(name="shop.odd", publish="later")
        def odd(self: Any) -> None: ...

        odd.bind(shop.app)


@pytest.mark.parametrize("held", [False, True])
def test_a_connection_of_the_bodys_own(shop: Shop, held: bool) -> None:
    """It is closed when the body has returned: a copy of it sends the message."""

    @shop.task()
    def child(self: Any) -> None: ...

    @shop.task(publish="on_commit" if held else "at_once")
    def task(self: Any) -> str:
        with shop.app.connection_for_write() as connection:
            if held:
                result = child.apply_async(connection=connection)
            else:
                result = child.apply_async_on_commit(connection=connection)
        event.listen(self.session, "after_commit", lambda _: before.extend(sent(shop)))
        insert(self.session, 1)
        return str(result.id)

    before: list[str] = []
    message = task()
    assert (before, sent(shop)) == ([], [message])
