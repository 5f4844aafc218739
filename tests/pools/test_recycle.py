"""Recycling: what is asked for is seen by every process, and a value is not replaced under those who use it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from tests.pools.test_resource import Client
from tests.support.forking import run_in_fork
from workerpools import Adapter, ConfigurationError, Resource, WorkerPools
from workerpools._run.attempts import current
from workerpools._run.delivery import Terms
from workerpools._run.loop import run
from workerpools.events import Event


class Nested(Terms):
    """Those of a task that is in the middle of another one, where one attempt runs inside of another."""

    stack = [SimpleNamespace(called_directly=False), SimpleNamespace(called_directly=False)]

    def requests(self) -> list[Any]:
        return self.stack

    def is_control(self, error: BaseException) -> bool:
        return True


TERMS = Nested()


@pytest.fixture
def pools() -> Iterator[WorkerPools]:
    with WorkerPools() as made:
        yield made


@pytest.fixture
def client(pools: WorkerPools) -> Resource[Client]:
    return pools.add(lambda: Client(), name="client")


def attempt(body: Callable[[], Any]) -> Any:
    """Run ``body`` as a task body is run."""
    return run(body, TERMS)


def test_a_name_that_no_resource_has_is_refused(pools: WorkerPools, client: Resource[Client]) -> None:
    """With the names that there are."""
    pools.add(lambda: Client(), name="other")
    assert pools.recycle() == ["client", "other"]
    assert pools.recycle("other") == ["other"]
    with pytest.raises(ConfigurationError, match="no resource is named 'db'; the resources: client, other"):
        pools.recycle("db")


def test_what_is_not_open_has_nothing_to_recycle(pools: WorkerPools, client: Resource[Client]) -> None:
    """The first use opens, and the next one does not open another."""
    pools.recycle()
    first = client.get()
    assert client.get() is first
    assert first.closed == 0


# A value whose adapter leaves it to us.


def test_the_next_attempt_has_another_value(pools: WorkerPools, client: Resource[Client]) -> None:
    """The old one is closed before, as nobody uses it; one that was not asked for stays."""
    other = pools.add(lambda: Client(), name="other")
    told: list[Event] = []
    pools.subscribe(told.append)
    first, others = attempt(client.get), attempt(other.get)
    client.recycle()
    assert first.closed == 0
    second = attempt(client.get)
    assert second is not first
    assert (first.closed, second.closed) == (1, 0)
    assert attempt(client.get) is second
    assert attempt(other.get) is others
    stats = next(each for each in pools.stats().totals() if each.name == "client")
    assert (stats.value("closed", "recycled"), stats.value("opened"), stats.open) == (1, 2, 1)
    assert [event.kind.value for event in told if event.resource == "client"] == [
        "value_opened",
        "value_recycled",
        "value_opened",
    ]


def test_an_attempt_keeps_the_value_it_has_begun_with(client: Resource[Client], pools: WorkerPools) -> None:
    """In its own thread alone, and for a task that it calls, and for one that runs inside of it."""

    def body() -> None:
        first = client.get()
        pools.recycle()
        assert client.get() is first
        # As ``.apply()`` does in a body: an attempt of its own.
        assert attempt(lambda: client.get() is first)
        assert client.get() is first
        assert first.closed == 0
        used.append(first)

    used: list[Client] = []
    attempt(body)
    assert attempt(client.get) is not used[0]
    assert used[0].closed == 1


def test_an_attempt_of_another_thread_keeps_its_value(client: Resource[Client], pools: WorkerPools) -> None:
    """The next attempt has another value at once; the old one is closed with the last attempt that began with it."""
    begun, go_on = threading.Barrier(3), threading.Event()

    def body() -> tuple[Client, Client]:
        first = client.get()
        begun.wait(30)
        assert go_on.wait(30)
        return first, client.get()

    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(attempt, body) for _ in range(2)]
        begun.wait(30)
        pools.recycle()
        second = attempt(client.get)
        # Asked again while the first value is still in use: another one takes the second one's place.
        pools.recycle()
        third = attempt(client.get)
        assert third is not second
        assert second.closed == 1
        go_on.set()
        seen = {value for each in running for value in each.result(30)}
    (first,) = seen
    assert first is not second
    assert first.closed == 1
    assert attempt(client.get) is third
    assert third.closed == 0


@pytest.mark.parametrize("late", [False, True], ids=["before it is known to be used", "after"])
def test_a_value_is_replaced_as_another_thread_begins_to_use_it(client: Resource[Client], late: bool) -> None:
    """Whoever comes first, nobody is given a closed one, and none is left open."""

    class Values(dict[Any, Any]):
        """Has the value replaced as it is noted."""

        def __setitem__(self, key: Any, value: Any) -> None:
            if late:
                super().__setitem__(key, value)
            if not replaced:
                with ThreadPoolExecutor(1) as other:
                    client.recycle()
                    replaced.append(other.submit(attempt, client.get).result())
            super().__setitem__(key, value)

    def body() -> None:
        running = current()
        assert running is not None
        running.values = Values()
        assert client.get() is replaced[0]
        assert replaced[0].closed == 0

    first = attempt(client.get)
    assert attempt(client.get) is first
    replaced: list[Client] = []
    attempt(body)
    assert (first.closed, replaced[0].closed) == (1, 0)


def test_a_value_that_was_given_out_outside_of_attempts_is_closed_with_the_rest(
    pools: WorkerPools, client: Resource[Client]
) -> None:
    """Nothing tells whether it is in use: it is not closed under a thread that works with it."""
    first = client.get()
    pools.recycle()
    second = client.get()
    assert second is not first
    assert first.closed == 0
    pools.close()
    assert (first.closed, second.closed) == (1, 1)
    assert client.get().closed == 0


def test_many_threads_lose_nothing(pools: WorkerPools) -> None:
    """Recycled over and over under sixteen threads: nobody ever holds a closed value, and each is closed once."""
    made: list[Client] = []

    def make() -> Client:
        made.append(Client())
        return made[-1]

    resource = pools.add(make, name="client")
    stop = threading.Event()

    def body() -> bool:
        first = resource.get()
        time.sleep(0.0005)
        again = resource.get()
        return first is again and first.closed == 0

    def work() -> list[bool]:
        return [attempt(body) for _ in range(60)]

    def recycle() -> None:
        while not stop.wait(0.001):
            pools.recycle()

    recycling = threading.Thread(target=recycle)
    recycling.start()
    with ThreadPoolExecutor(16) as threads:
        results = [threads.submit(work) for _ in range(16)]
        right = [answer for each in results for answer in each.result(60)]
    stop.set()
    recycling.join(30)
    assert len(right) == 960
    assert all(right)
    assert len(made) > 10
    assert [client.closed for client in made if client is not resource.get()] == [1] * (len(made) - 1)


def test_a_child_that_is_forked_meanwhile_reaches_nothing_of_its_parent(pools: WorkerPools) -> None:
    """Neither the present value nor one that is used to its end."""
    peers: list[socket.socket] = []

    def make() -> socket.socket:
        ours, theirs = socket.socketpair()
        peers.append(theirs)
        return ours

    resource = pools.add(make, name="socket")

    def body() -> None:
        first = resource.get()
        pools.recycle()
        with ThreadPoolExecutor(1) as threads:
            second = threads.submit(attempt, resource.get).result(30)
        assert resource.get() is first
        assert second is not first

        def child() -> list[object]:
            inherited = [os.readlink(f"/proc/self/fd/{each.fileno()}") for each in (first, second)]
            own = resource.get()
            pools.close()
            return [*inherited, own in (first, second), own.fileno()]

        assert run_in_fork(child) == [os.devnull, os.devnull, False, -1]
        for ours, theirs in zip((first, second), peers, strict=True):
            ours.sendall(b"still here")
            assert theirs.recv(10) == b"still here"

    attempt(body)
    for each in peers:
        each.close()


# A value whose adapter sees to it.


class Pool(Adapter[Client]):
    """Replaces its connections itself."""

    def __init__(self, answer: Any = True) -> None:
        self.answer = answer
        self.recycled: list[Client] = []

    def open(self, opening: Any) -> Client:
        self.opening = opening
        return Client()

    def close(self, value: Client, timeout: float) -> None:
        value.close()

    def recycle(self, value: Client, since: float) -> bool:
        assert since <= time.monotonic()
        self.recycled.append(value)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return bool(self.answer)


def test_an_adapter_that_recycles_keeps_its_value(pools: WorkerPools) -> None:
    """It is asked once, at the next use, in the middle of an attempt or not."""
    adapter = Pool()
    resource = pools.add(adapter, name="pool")

    def body() -> None:
        first = resource.get()
        pools.recycle()
        pools.recycle()
        assert adapter.recycled == []
        assert resource.get() is resource.get() is first
        assert adapter.recycled == [first]

    attempt(body)
    (first,) = adapter.recycled
    assert attempt(resource.get) is first
    assert first.closed == 0
    assert adapter.recycled == [first]


def test_a_value_that_is_used_without_its_resource_is_recycled(pools: WorkerPools) -> None:
    """Its adapter says when it is used."""
    adapter = Pool()
    first = pools.add(adapter, name="pool").get()
    adapter.opening.notice()
    assert adapter.recycled == []
    pools.recycle()
    adapter.opening.notice()
    adapter.opening.notice()
    assert adapter.recycled == [first]


@pytest.mark.parametrize("answer", [False, ValueError("no")])
def test_an_adapter_that_cannot_has_its_value_replaced(pools: WorkerPools, answer: Any) -> None:
    """As if it had never been asked; what it raised is in the log, not in the task."""
    resource = pools.add(Pool(answer), name="pool")
    first = attempt(resource.get)
    pools.recycle()
    assert attempt(resource.get) is not first
    assert first.closed == 1


def test_an_adapter_that_derives_from_nothing_has_its_value_replaced(pools: WorkerPools) -> None:
    """Such a one need not know of recycling."""

    class Plain:
        def prepare(self) -> None: ...
        def open(self, opening: object) -> Client:
            return Client()

        def close(self, value: Client, timeout: float) -> None:
            value.close()

        def describe(self) -> str:
            return "plain"

    resource: Resource[Client] = pools.add(Plain(), name="plain")  # type: ignore[arg-type]
    first = attempt(resource.get)
    resource.recycle()
    assert attempt(resource.get) is not first


def test_a_time_limit_during_recycling_is_not_swallowed(pools: WorkerPools) -> None:
    """It ends the task; the next use does what was left undone."""

    class SoftTimeLimitExceeded(Exception):
        pass

    adapter = Pool()
    resource = pools.add(adapter, name="pool")
    first = attempt(resource.get)
    pools.recycle()
    adapter.answer = SoftTimeLimitExceeded()
    with pytest.raises(SoftTimeLimitExceeded):
        resource.get()
    adapter.answer = True
    assert attempt(resource.get) is first
    assert len(adapter.recycled) == 2
