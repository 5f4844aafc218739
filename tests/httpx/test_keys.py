"""Requests with an idempotency key, in a body whose database session is lost: what the server sees."""

from __future__ import annotations

import contextvars
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from tests.support.databases import Database
from tests.support.shop import Shop, insert
from tests.support.upstream import EchoUpstream
from workerpools import ConfigurationError, NoAttemptError


@pytest.fixture
def shop(database: Database, proxy_to: Any, echo: EchoUpstream) -> Iterator[Shop]:
    """An app whose database is reached through a proxy, and an HTTP client."""
    made = Shop(database, "psycopg2", proxy=proxy_to(database))
    made.add_api(echo.url)
    yield made
    made.pools.close()


def keyed(**options: Any) -> dict[str, Any]:
    return {"headers": {"Idempotency-Key": str(uuid.uuid4())}, **options}


def _in_thread(target: Any) -> None:
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()


WAYS: dict[str, Any] = {
    "new key": lambda self: self.api.post("/echo/1", json={"cents": 5}, **keyed()),
    "two charges": lambda self: [self.api.post("/echo/1", **keyed()), self.api.post("/echo/1", **keyed())],
    "copied context": lambda self: _in_thread(
        partial(contextvars.copy_context().run, lambda: self.api.post("/echo/1", **keyed()))
    ),
    "derived": lambda self: self.api.post("/echo/1", headers={"Idempotency-Key": self.idempotency_key("charge")}),
    "derived, streamed": lambda self: self.api.post(
        "/echo/1", content=iter([b"5"]), headers={"Idempotency-Key": self.idempotency_key("charge")}
    ),
    "empty key": lambda self: self.api.post("/echo/1", headers={"Idempotency-Key": ""}),
    "thread": lambda self: _in_thread(lambda: self.api.post("/echo/1", **keyed())),
    "form with a file": lambda self: self.api.post("/echo/1", files={"f": b"x"}, **keyed()),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_charge_twice(shop: Shop, echo: EchoUpstream, way: str) -> None:
    """A replay sends the same requests under the same keys; where it could not, there is none."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        WAYS[way](self)
        insert(self.session, 1)
        if len(runs) == 1:
            shop.proxy.close_all()
        insert(self.session, 2)

    replayed = way in ("new key", "two charges", "copied context", "derived", "derived, streamed")
    if replayed:
        task()
    else:
        with pytest.raises(DBAPIError) as caught:
            task()
        assert "POST by 'api' had left already" in " ".join(caught.value.__notes__)
    charges = 2 if way == "two charges" else 1
    requests = echo.requests()
    keys = [each.idempotency_key for each in requests]
    assert len(keys) == charges * (2 if replayed else 1)
    assert len(set(keys)) == charges
    assert shop.rows() == ([1, 2] if replayed else [])


def test_a_derived_key(shop: Shop) -> None:
    """The same in each run of one task, another one in another task; it takes a body and a name."""

    @shop.task()
    def task(self: Any, name: str = "charge") -> str:
        return str(self.idempotency_key(name))

    first = [task.apply(task_id=task_id).get() for task_id in ("1", "1", "2")]
    assert (first[0] == first[1], first[0] == first[2]) == (True, False)
    assert task() != task()
    for name in ("", "  ", None):
        with pytest.raises(ConfigurationError, match="idempotency_key"):
            task(name)
    with pytest.raises(NoAttemptError):
        task.idempotency_key("charge")
