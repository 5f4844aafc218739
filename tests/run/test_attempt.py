"""An attempt's sessions on a real database: committed when the body returned, undone on every other way out."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from greenlet import GreenletExit
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import Session

from tests.support.forking import run_in_fork
from tests.support.shop import NUMBERS, Shop, insert
from workerpools import NoAttemptError
from workerpools.sqlalchemy import TaskSession

WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "called directly": lambda task, number: task(number),
    "eager": lambda task, number: task.delay(number).get(),
    "apply": lambda task, number: task.apply((number,)).get(),
    "run": lambda task, number: task.run(number),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["bound", "unbound", "class"])
def test_what_the_body_did_is_committed_when_it_returned(shop: Shop, way: str, kind: str) -> None:
    """However the body is run, and whatever kind of task it is."""
    if kind == "class":

        class Put(shop.base):  # type: ignore[name-defined, misc]
            name = f"put{next(NUMBERS)}"

            def run(self, number: int) -> int:
                insert(self.session, number)
                return number

        task = shop.app.register_task(Put())
    elif kind == "bound":

        @shop.task()
        def task(self: Any, number: int) -> int:
            insert(self.session, number)
            return number

    else:

        @shop.task(bind=False)
        def task(number: int) -> int:
            insert(task.session, number)
            return number

    assert WAYS[way](task, 7) == 7
    assert shop.rows() == [7]
    assert shop.checked_out() == 0


@pytest.mark.parametrize("way", ["called directly", "eager"])
@pytest.mark.parametrize(
    "error",
    [
        ValueError("body"),
        Retry("later"),
        Ignore(),
        Reject("no", requeue=False),
        SoftTimeLimitExceeded(),
        SystemExit(1),
        KeyboardInterrupt(),
        GreenletExit(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_other_way_out_undoes_it(shop: Shop, error: BaseException, way: str) -> None:
    """The row is absent, the connection is back in its pool, outside any transaction, and the error is the same."""

    @shop.task()
    def task(self: Any, number: int) -> None:
        insert(self.session, number)
        raise error

    if way == "eager" and isinstance(error, (Retry, Ignore, Reject)):
        # Eager mode turns these into a state of the result.
        assert task.apply((1,)).state in ("RETRY", "IGNORED", "REJECTED")
    else:
        with pytest.raises(type(error)) as caught:
            WAYS[way](task, 1)
        assert caught.value is error
    assert shop.rows() == []
    assert shop.checked_out() == 0
    assert shop.database.execute("select count(*) from pg_stat_activity where state like 'idle in%'") == [(0,)]


def test_a_failure_to_commit_is_a_failure_of_the_attempt(shop: Shop) -> None:
    """A constraint that is checked at COMMIT fails the task, and ``autoretry_for`` sees it."""
    runs: list[int] = []

    @shop.task(autoretry_for=(IntegrityError,), max_retries=2, retry_backoff=False, default_retry_delay=0)
    def task(self: Any, number: int) -> str:
        runs.append(number)
        insert(self.session, number)
        if len(runs) < 3:
            insert(self.session, number)
        return "done"

    assert task.delay(1).get() == "done"
    assert len(runs) == 3
    assert shop.rows() == [1]


def test_a_session_that_the_body_spoilt_fails_the_attempt(shop: Shop) -> None:
    """An error that the body caught, but did not roll back, does not become a silent success."""

    @shop.task()
    def task(self: Any) -> None:
        insert(self.session, 1)
        try:
            self.session.execute(text("select 1/0"))
        except sqlalchemy.exc.DataError:
            return

    with pytest.raises(PendingRollbackError, match=r"'db' was aborted"):
        task()
    assert shop.rows() == []
    assert shop.checked_out() == 0


def test_a_savepoint_makes_an_error_harmless(shop: Shop) -> None:
    """What the body rolled back itself does not spoil the rest."""

    @shop.task()
    def task(self: Any) -> None:
        insert(self.session, 1)
        with pytest.raises(sqlalchemy.exc.DataError), self.session.begin_nested():
            self.session.execute(text("select 1/0"))

    task()
    assert shop.rows() == [1]


@pytest.mark.parametrize("begun", ["before", "by it"])
def test_what_a_commits_listener_does_in_another_session_is_committed(shop: Shop, begun: str) -> None:
    """An audit session, say: the listener may be the first to use it, or it may have been committed already."""

    class Audited(shop.base):  # type: ignore[name-defined, misc]
        abstract = True
        audit = TaskSession(shop.engine)

    @shop.task(base=Audited)
    def task(self: Any) -> None:
        if begun == "before":
            insert(self.audit, 1)
        event.listen(self.session, "after_commit", lambda _: insert(self.audit, 3))
        insert(self.session, 2)

    task()
    assert shop.rows() == ([1, 2, 3] if begun == "before" else [2, 3])
    assert shop.checked_out() == 0


def test_listeners_that_begin_a_transaction_at_every_commit_fail_the_attempt(shop: Shop) -> None:
    """They would be committed for ever otherwise; what they began last is undone, and not in silence."""
    numbers = itertools.count(1)

    class Audited(shop.base):  # type: ignore[name-defined, misc]
        abstract = True
        audit = TaskSession(shop.engine)

    @shop.task(base=Audited)
    def task(self: Any) -> None:
        one, other = self.session, self.audit
        event.listen(one, "after_commit", lambda _: insert(other, next(numbers)))
        event.listen(other, "after_commit", lambda _: insert(one, next(numbers)))
        insert(one, next(numbers))

    with pytest.raises(RuntimeError, match="at every commit"):
        task()
    assert shop.checked_out() == 0


def test_a_task_called_as_a_function_joins_the_attempt(shop: Shop) -> None:
    """One session, one commit: the caller's failure undoes what the callee did."""
    seen: list[Any] = []

    @shop.task(bind=False)
    def inner(number: int) -> None:
        seen.append(inner.session)
        insert(inner.session, number)

    @shop.task()
    def outer(self: Any, fail: bool) -> None:
        inner(1)
        inner.run(2)
        seen.append(self.session)
        if fail:
            raise ValueError("after the call")

    with pytest.raises(ValueError, match="after the call"):
        outer.delay(True).get()
    assert shop.rows() == []
    outer.delay(False).get()
    assert shop.rows() == [1, 2]
    assert seen[0] is seen[1] is seen[2] is not seen[3]


def test_a_task_applied_in_a_body_has_an_attempt_of_its_own(shop: Shop) -> None:
    """``.apply()`` commits by itself, and the caller's failure leaves it committed."""
    seen: list[Any] = []

    @shop.task()
    def inner(self: Any, number: int) -> None:
        seen.append(self.session)
        insert(self.session, number)

    @shop.task()
    def outer(self: Any) -> None:
        inner.apply((1,)).get(disable_sync_subtasks=False)
        seen.append(self.session)
        insert(self.session, 2)
        raise ValueError("after the call")

    with pytest.raises(ValueError, match="after the call"):
        outer()
    assert shop.rows() == [1]
    assert seen[0] is not seen[1]


def test_a_retry_in_eager_mode_is_an_attempt_of_its_own(shop: Shop) -> None:
    """``self.retry()`` runs the body again inside the first attempt, which is undone."""

    @shop.task(max_retries=1, default_retry_delay=0)
    def task(self: Any, number: int) -> str:
        insert(self.session, number)
        if self.request.retries == 0:
            self.retry(args=(number + 1,))
        return "done"

    task.apply((1,)).get()
    assert shop.rows() == [2]


def test_threads_have_attempts_of_their_own(shop: Shop) -> None:
    """The task object is shared by threads; sessions are not."""
    sessions: set[int] = set()
    everyone = threading.Barrier(4)

    @shop.task()
    def task(self: Any, number: int) -> None:
        insert(self.session, number)
        sessions.add(id(self.session))
        everyone.wait(30)

    shop.engine.close()
    threads = [threading.Thread(target=task, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sessions) == 4
    assert shop.rows() == [0, 1, 2, 3]
    assert shop.checked_out() == 0


def test_a_session_outside_a_body_is_refused(shop: Shop) -> None:
    """With an error that says where it belongs, before it says what else may be wrong."""

    @shop.task()
    def task(self: Any) -> None: ...

    with pytest.raises(
        NoAttemptError,
        match=r"session belongs to one run.*Use it in the body itself.*thread.*base must be a PooledTask$",
    ):
        task.session  # noqa: B018


def test_a_body_that_forks_keeps_its_transaction(shop: Shop) -> None:
    """A child in the middle of a body gets a session of its own; the body's transaction commits untouched."""

    @shop.task()
    def task(self: Any) -> tuple[int, int]:
        insert(self.session, 1)

        def child() -> int:
            insert(self.session, 2)
            backend = self.session.execute(text("select pg_backend_pid()")).scalar_one()
            self.session.rollback()
            return int(backend)

        theirs = run_in_fork(child)
        return theirs, int(self.session.execute(text("select pg_backend_pid()")).scalar_one())

    theirs, ours = task()
    assert theirs != ours
    assert shop.rows() == [1]


def test_an_attempt_that_uses_no_session_opens_none(shop: Shop) -> None:
    """A task whose body touches nothing costs no connection."""
    shop.engine.close()

    @shop.task()
    def task(self: Any) -> int:
        return 1

    assert task.delay().get() == 1
    assert not shop.engine.is_open


def test_a_session_can_be_overridden(shop: Shop) -> None:
    """A test's own session stands in, and no attempt commits, rolls back or closes it."""
    done: list[str] = []

    class Fake(Session):
        def commit(self) -> None:
            done.append("commit")

        def rollback(self) -> None:
            done.append("rollback")

        def close(self) -> None:
            done.append("close")

    @shop.task()
    def task(self: Any, fails: bool) -> Any:
        if fails:
            raise ValueError
        return self.session

    fake = Fake()
    with shop.base.session.override(fake):
        assert task(False) is fake
        with pytest.raises(ValueError):
            task(True)
    assert done == []
    assert task(False) is not fake
