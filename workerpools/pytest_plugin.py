"""Fixtures for tests of tasks. pytest loads them wherever this package is installed: they import nothing before use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    import httpx
    import sqlalchemy

    from workerpools import Resource

T = TypeVar("T")

__all__ = ["no_pool_leaks", "no_replays", "pool_override", "pool_requests", "pool_transaction"]


@pytest.fixture
def pool_override() -> Iterator[Callable[[Any, T], T]]:
    """Put a stand-in in the place of a value until the end of the test: ``pool_override(ShopTask.api, fake)``.

    It takes a resource or a session's declaration, and returns the stand-in, which stays the test's to close.
    """
    with ExitStack() as overridden:

        def override(handle: Any, fake: T) -> T:
            overridden.enter_context(handle.override(fake))
            return fake

        yield override


@pytest.fixture
def pool_requests(
    pool_override: Callable[[Any, Any], Any],
) -> Iterator[Callable[[Any, Callable[[httpx.Request], httpx.Response]], list[httpx.Request]]]:
    """Answer the requests of an httpx resource, and record them: ``sent = pool_requests(ShopTask.api, answer)``.

    ``answer`` is called with each ``httpx.Request`` and returns an ``httpx.Response``, or raises. A stand-in with the
    base URL, headers, time-outs and hooks of the resource's client calls it; nothing is sent.
    """
    with ExitStack() as opened:

        def record(handle: Any, answer: Callable[[httpx.Request], httpx.Response]) -> list[httpx.Request]:
            import httpx

            sent: list[httpx.Request] = []

            def answered(request: httpx.Request) -> httpx.Response:
                sent.append(request)
                return answer(request)

            client = handle.get()
            same = ("base_url", "headers", "params", "timeout", "event_hooks", "follow_redirects", "auth")
            cls: Any = httpx.AsyncClient if isinstance(client, httpx.AsyncClient) else httpx.Client
            fake = cls(transport=httpx.MockTransport(answered), **{name: getattr(client, name) for name in same})
            if cls is httpx.Client:
                opened.enter_context(fake)
            pool_override(handle, fake)
            return sent

        yield record


@pytest.fixture
def pool_transaction() -> Iterator[Callable[[Resource[sqlalchemy.Engine]], sqlalchemy.Connection]]:
    """Roll back what a test writes: ``connection = pool_transaction(ShopTask.db)``.

    Until the end of the test every session, also that of an eager task within a task, uses this one connection, whose
    transaction is rolled back then. What a body commits is a savepoint: the test reads it on the connection, and a
    body that fails loses it. ``self.db`` gives the connection, too: ``self.db.begin()`` does not work there.
    """
    with ExitStack() as opened:

        def begin(resource: Resource[sqlalchemy.Engine]) -> sqlalchemy.Connection:
            connection = opened.enter_context(resource.get().connect())
            transaction = connection.begin()
            opened.callback(transaction.rollback)
            # Sessions begin savepoints of their own in one (Session.join_transaction_mode).
            connection.begin_nested()
            opened.enter_context(resource.override(connection))  # type: ignore[arg-type]
            return connection

        yield begin


@pytest.fixture
def no_pool_leaks() -> Iterator[None]:
    """Fail the test if it leaves a connection in use, in this process."""
    import gc

    from workerpools._celery.lifecycle import living

    def in_use() -> dict[Any, int]:
        return {resource: len(resource.meter.leases) for pools in living() for resource in pools.resources}

    def left() -> dict[str, int]:
        more = {resource.name: found - before.get(resource, 0) for resource, found in in_use().items()}
        return {name: number for name, number in sorted(more.items()) if number > 0}

    before = in_use()
    yield
    if left():
        # What nothing refers to has come back, but for cycles.
        gc.collect()
    if listed := ", ".join(f"{name}: {number}" for name, number in left().items()):
        pytest.fail(f"connections that the test left in use: {listed}", pytrace=False)


@pytest.fixture
def no_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise every failure at once: no body runs again in this test."""
    monkeypatch.setattr("workerpools._celery.request.TaskTerms.policy", None)
