"""on_open: called with every value opened, before its first use; and a warning of what was attached elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from tests.support.forking import run_in_fork
from workerpools import Adapter, ConfigurationError, WorkerPools
from workerpools.adapter import Opening


class Line:
    def __init__(self) -> None:
        self.hooks: list[str] = []
        self.closed = 0


class Lines(Adapter[Line]):
    """An adapter of anybody's: it needs no more than the attribute."""

    def __init__(self, on_open: Any = None, *, keeps: bool = True) -> None:
        self.on_open = on_open
        self.opened: list[Line] = []
        self._keeps = keeps

    def open(self, opening: Opening) -> Line:
        self.opened.append(Line())
        return self.opened[-1]

    def close(self, value: Line, timeout: float) -> None:
        value.closed += 1

    def recycle(self, value: Line, since: float) -> bool:
        return self._keeps

    def attached(self, value: Line) -> Iterable[tuple[str, object]]:
        return [(f"hook {hook}", hook) for hook in value.hooks]

    event_attributes = ("dispatch",)


@pytest.fixture
def pools() -> Iterator[WorkerPools]:
    with WorkerPools() as made:
        yield made


def test_each_value_is_prepared_before_its_first_use(pools: WorkerPools) -> None:
    """Once for each, also for one that replaces another."""
    prepared: list[Line] = []
    adapter = Lines(prepared.append, keeps=False)
    resource = pools.add(adapter, name="line")
    assert prepared == []
    first = resource.get()
    assert resource.get() is first
    resource.recycle()
    second = resource.get()
    resource.close()
    third = resource.get()
    assert prepared == [first, second, third] == adapter.opened


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError("mine"), Interrupt("mine")])
def test_a_failure_is_one_of_opening(pools: WorkerPools, error: BaseException) -> None:
    """The value is closed, the error comes out as it is and names the resource, and the next use tries again."""
    failures = [error]

    def prepare(value: Line) -> None:
        if failures:
            raise failures.pop()

    adapter = Lines(prepare)
    resource = pools.add(adapter, name="line")
    with pytest.raises(type(error)) as caught:
        resource.get()
    assert caught.value is error
    notes = "\n".join(error.__notes__)
    assert "on_open failed" in notes
    assert isinstance(error, Interrupt) or "'line'" in notes
    assert [line.closed for line in adapter.opened] == [1]
    assert not resource.is_open
    assert resource.get() is adapter.opened[1]
    assert adapter.opened[1].closed == 0


def test_a_value_that_cannot_be_closed_either(pools: WorkerPools, caplog: pytest.LogCaptureFixture) -> None:
    """The first error is the one that counts."""

    class Stuck(Lines):
        def close(self, value: Line, timeout: float) -> None:
            raise RuntimeError("stuck")

    def prepare(value: Line) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        pools.add(Stuck(prepare), name="line").get()
    assert "could not close a value" in caplog.text


def test_it_cannot_use_the_resource_itself(pools: WorkerPools) -> None:
    """Which is not there yet: the value is the argument."""
    resource: Any = None
    adapter = Lines(lambda value: resource.get())
    resource = pools.add(adapter, name="line")
    with pytest.raises(ConfigurationError, match="on_open uses the resource itself"):
        resource.get()


def test_several_functions_are_called_in_one(pools: WorkerPools) -> None:
    """A list is refused where it is declared."""
    with pytest.raises(ConfigurationError, match=r"Lines: on_open is \[.*to call several, call them in one function"):
        pools.add(Lines([print, print]), name="line")


def test_events_are_not_for_a_handle(pools: WorkerPools) -> None:
    """What a library asks its targets for says where to attach instead."""
    with pytest.raises(ConfigurationError, match=r"line is the handle.*Lines\(on_open=…\)"):
        hasattr(pools.add(Lines(), name="line"), "dispatch")


def lost(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_what_was_attached_is_lost_at_the_fork(pools: WorkerPools, caplog: pytest.LogCaptureFixture) -> None:
    """The child says so once, when it opens its own value; what on_open attached is there again."""

    def prepare(value: Line) -> None:
        value.hooks.append("ours")

    resource = pools.add(Lines(prepare), name="line")
    resource.get().hooks += ["theirs", "another"]

    def child() -> tuple[list[str], list[str]]:
        hooks = resource.get().hooks
        resource.close()
        resource.get()
        return hooks, lost(caplog)

    hooks, warnings = run_in_fork(child)
    assert hooks == ["ours"]
    assert len(warnings) == 1
    assert "'line'" in warnings[0]
    assert "(hook theirs, hook another)" in warnings[0]
    assert "Lines(on_open=…)" in warnings[0]
    assert lost(caplog) == []


def test_a_grandchild_hears_of_it(pools: WorkerPools, caplog: pytest.LogCaptureFixture) -> None:
    """The process between used nothing."""
    resource = pools.add(Lines(), name="line")
    resource.get().hooks.append("theirs")

    def child() -> list[str]:
        resource.get()
        return lost(caplog)

    assert len(run_in_fork(lambda: run_in_fork(child))) == 1


def test_nothing_is_said_where_nothing_was_attached(pools: WorkerPools, caplog: pytest.LogCaptureFixture) -> None:
    """By on_open alone."""
    resource = pools.add(Lines(lambda value: value.hooks.append("ours")), name="line")
    resource.get()

    def child() -> list[str]:
        resource.get()
        return lost(caplog)

    assert run_in_fork(child) == []


def test_what_was_attached_is_lost_with_a_replaced_value(pools: WorkerPools, caplog: pytest.LogCaptureFixture) -> None:
    """Said once for each resource."""
    resource = pools.add(Lines(keeps=False), name="line")
    for _ in range(3):
        resource.get().hooks.append("theirs")
        resource.recycle()
        resource.get()
    assert len(lost(caplog)) == 1


def test_an_adapter_that_cannot_tell(pools: WorkerPools, caplog: pytest.LogCaptureFixture) -> None:
    """Its value works."""

    class Broken(Lines):
        def attached(self, value: Line) -> Iterable[tuple[str, object]]:
            raise RuntimeError("broken")

    assert isinstance(pools.add(Broken(), name="line").get(), Line)
    assert "could not list what is attached" in caplog.text
