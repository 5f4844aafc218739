"""Names of resources: taken from the attribute, refused where they collide or hide something of Celery's."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from celery import Task

from workerpools import ConfigurationError, HTTPTask, PooledTask, WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession


def make() -> object:
    return object()


def test_the_attribute_names_the_resource() -> None:
    """Unless a name was given; the first attribute counts."""
    pools = WorkerPools()
    shared = pools.add(make)

    class First(PooledTask):
        api = shared
        other = pools.add(make, name="named")

    class Second(PooledTask):
        again = shared

    assert (First.api.name, First.other.name, Second.again.name) == ("api", "named", "api")


def test_two_resources_of_one_name_are_refused() -> None:
    """Given twice, or taken twice."""
    pools = WorkerPools()

    class First(PooledTask):
        api = pools.add(make)

    with pytest.raises(ConfigurationError, match="'api'"):
        pools.add(make, name="api")
    with pytest.raises(ConfigurationError, match=r"Second\.api"):

        class Second(PooledTask):
            api = pools.add(make)

    class Third(PooledTask):
        api = WorkerPools().add(make)


@pytest.mark.parametrize("name", ["api", "other cache", "api (settings)", "käse", "a" * 56, "ä" * 28, "x.y-z/1"])
def test_names_that_can_be_published(name: str) -> None:
    """One line of text."""
    assert WorkerPools().add(make, name=name).name == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "'' is empty"),
        (" api", "leading or trailing spaces"),
        ("api ", "leading or trailing spaces"),
        ("a\nb", "printable"),
        ("a\x00b", "printable"),
        ("a\u2028b", "printable"),
        ("\ud800", "printable"),
        ('a"b', "printable characters other than"),
        ("a=b", "printable characters other than"),
        ("a" * 57, "takes 57 bytes in UTF-8, more than the 56 that"),
        ("ä" * 29, "takes 58 bytes"),
        (7, "7 is not a string"),
        (b"api", "a value of the type bytes is not a string"),
    ],
)
def test_names_that_cannot_be_published(name: Any, said: str) -> None:
    """They would be cut in shared memory, or break a line; nothing is declared then."""
    pools = WorkerPools()
    with pytest.raises(ConfigurationError, match=rf"^pools\.add\(…, name=…\): .*{said}"):
        pools.add(make, name=name)
    assert pools.resources == []


def test_an_attribute_that_cannot_be_published() -> None:
    """Its name is the resource's."""
    pools = WorkerPools()
    name = "a" * 57
    with pytest.raises(ConfigurationError, match=rf"^Base\.{name}: .*takes 57 bytes"):
        type("Base", (PooledTask,), {name: pools.add(make)})
    assert pools.resources == []


@pytest.mark.parametrize("name", ["request", "retry", "name", "app", "run", "backend", "delay", "max_retries"])
def test_hiding_an_attribute_of_celery_is_refused(name: str) -> None:
    """At class creation, with the error itself, on every Python."""
    # Without getattr(): Task.app would bind the class itself, for all later tests.
    inspect.getattr_static(Task, name)
    pools = WorkerPools()
    engine = pools.add(SQLAlchemyEngine("sqlite://"), name="engine")
    for value in (pools.add(make), TaskSession(engine), HTTPTask.http):
        with pytest.raises(ConfigurationError, match=name):
            type("Base", (PooledTask,), {name: value})


def test_a_base_may_replace_a_resource_of_its_parent() -> None:
    """A subclass of HTTPTask with a client of its own is a declaration like any other."""
    pools = WorkerPools()

    class Own(HTTPTask):
        http: Any = pools.add(make)

    assert Own.http.name == "http"
