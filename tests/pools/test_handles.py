"""A handle that is taken for its value says so; and it stays an object like any other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from celery import Celery

from workerpools import Adapter, DatabaseTask, FailureKind, HTTPTask, PooledTask, WorkerPools
from workerpools.adapter import Failure, Opening, Sent, current
from workerpools.bases import from_settings
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession
from workerpools.testing import run_attempt


class Handles(PooledTask):
    pools = WorkerPools()
    api = pools.add(HttpxClient())
    db = pools.add(SQLAlchemyEngine("sqlite://"))
    session = TaskSession(db)


def test_a_handle_called_like_its_value() -> None:
    """The message tells the handle from the value."""
    api: Any = Handles.api
    for ask in (lambda: api.get("/orders/7"), lambda: api.get(url="/orders/7")):
        with pytest.raises(TypeError, match=r"Handles\.api is the handle.*Handles\.api\.get\(\)\.get\(…\)"):
            ask()


@pytest.mark.parametrize(
    ("attribute", "hint"),
    [
        ("db.connect", r"Handles\.db is the handle.*Handles\.db\.get\(\)\.connect.*self\.db\.connect"),
        ("session.execute", r"Handles\.session is the declaration.*self\.session\.execute"),
    ],
)
def test_a_handle_used_like_its_value(attribute: str, hint: str) -> None:
    """An AttributeError as before, and a hint."""
    handle, _, name = attribute.partition(".")
    with pytest.raises(AttributeError, match=hint) as caught:
        getattr(getattr(Handles, handle), name)
    assert caught.value.name == name


def test_a_handle_from_settings_used_like_its_value() -> None:
    """The bases without a declaration are no different."""
    http: Any = HTTPTask.http
    session: Any = DatabaseTask.session
    with pytest.raises(AttributeError, match=r"http\.get\(\)\.post"):
        http.post("/orders")
    with pytest.raises(AttributeError, match=r"self\.session\.execute"):
        session.execute("SELECT 1")


class _Board(Adapter[list[str]]):
    """An adapter with a class attribute and a method for each thing that a resource asks its adapter for."""

    kind = "board"
    unseen_effects = True
    server = ("board.example.com", 7)

    def open(self, opening: Opening) -> list[str]:
        return []

    def close(self, value: list[str], timeout: float) -> None: ...

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Failure | None:
        return Failure(FailureKind.STALE, Sent.NOTHING) if isinstance(error, KeyError) else None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> _Board:
        return cls()


def test_what_an_adapter_says_holds_where_settings_configure_it() -> None:
    """Its uses are effects, its errors are classified, its server is known."""
    app = Celery("board", set_as_current=False)
    resource = from_settings(_Board).resource_for(app, "board")
    assert (resource.adapter.server, resource.kind) == (_Board.server, "board")
    seen: list[str] = []

    def body() -> None:
        resource.get().append("written")
        running = current()
        assert running is not None
        seen.extend(map(str, running.effects))
        raise KeyError("lost")

    with pytest.raises(KeyError) as caught:
        run_attempt(body)
    assert seen == ["a use of 'board'"]
    assert "a use of 'board'" in caught.value.__notes__[-1]
    assert run_attempt(resource.get) == ["written"]


@pytest.mark.parametrize("handle", [Handles.api, Handles.session, HTTPTask.http])
def test_a_hint_breaks_no_protocol(handle: Any) -> None:
    """What asks for an attribute to learn if it is there gets a plain no."""
    assert not hasattr(handle, "connect")
    assert not hasattr(handle, "__deepcopy__")
    assert getattr(handle, "_repr_html_", None) is None
    empty = type(handle).__new__(type(handle))
    assert not hasattr(empty, "connect")
    assert not hasattr(empty, "_overrides")
    assert type(copy.copy(handle)) is type(handle)
    # Which error, and its wording, depend on the first of its attributes that cannot be, and on Python's version.
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError), match=r"pickle|local object") as caught:
        pickle.dumps(Handles.api)
    assert "is the handle" not in str(caught.value)


def test_a_property_that_fails_tells_its_own_error() -> None:
    """Not that the attribute is missing."""

    class Nameless(HttpxClient):
        def describe(self) -> str:
            raise AttributeError("mine")

    resource = WorkerPools(Celery("handles", set_as_current=False)).add(Nameless(), name="x")
    resource._holder.given = None
    with pytest.raises(AttributeError, match=r"^mine$"):
        assert resource.name
