"""A resource: one value a process, opened on first use, closed once."""

from __future__ import annotations

import gc
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.forking import fork_in_script, run_in_fork
from workerpools import Adapter, ConfigurationError, Resource, WorkerPools
from workerpools._pools import holder as holder_module
from workerpools._run.delivery import Terms
from workerpools._run.loop import run
from workerpools.events import Event


class Client:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def pools() -> Iterator[WorkerPools]:
    with WorkerPools() as made:
        yield made


def test_declaring_opens_nothing(pools: WorkerPools) -> None:
    """Neither declaring nor looking at the class opens the value."""
    opened: list[Client] = []
    resource = pools.add(lambda: opened.append(Client()) or opened[-1], name="client")  # type: ignore[func-returns-value]

    class Base:
        client = resource

    assert hasattr(Base, "client")
    assert Base.client is resource
    assert opened == []
    assert Base().client is resource.get() is opened[0]


def test_threads_share_one_opening(pools: WorkerPools) -> None:
    """Twenty threads that ask at the same moment get the same value, opened once."""
    opened: list[Client] = []
    start = threading.Barrier(20)

    def make() -> Client:
        opened.append(Client())
        threading.Event().wait(0.05)
        return opened[-1]

    resource = pools.add(make, name="client")
    got: list[Client] = []

    def ask() -> None:
        start.wait()
        got.append(resource.get())

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1
    assert got == opened * 20


def test_closing_is_idempotent_and_the_next_use_opens_another(pools: WorkerPools) -> None:
    """A value is closed once, however often it is asked for."""
    resource = pools.add(Factory(), name="client")
    first = resource.get()
    pools.close()
    pools.close()
    resource.close()
    assert first.closed == 1
    assert resource.get() is not first


class Factory:
    def __call__(self) -> Client:
        return Client()


def test_a_failure_to_open_is_raised_with_the_name_and_not_remembered(pools: WorkerPools) -> None:
    """The library's own error comes out, with a note; the next use tries again."""
    failures = [ConnectionRefusedError("no")]

    def make() -> Client:
        if failures:
            raise failures.pop()
        return Client()

    resource = pools.add(make, name="client")
    with pytest.raises(ConnectionRefusedError) as caught:
        resource.get()
    assert "'client'" in caught.value.__notes__[0]
    assert isinstance(resource.get(), Client)


def test_a_factory_that_asks_for_itself_is_refused(pools: WorkerPools) -> None:
    """It would wait for itself for ever."""
    resource: Resource[Any] = pools.add(lambda: resource.get(), name="client")
    with pytest.raises(ConfigurationError, match="'client'"):
        resource.get()


def test_waiting_for_another_thread_is_bounded(pools: WorkerPools, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factory that hangs fails the other threads in time."""
    monkeypatch.setattr(holder_module, "OPEN_TIMEOUT", 0.05)
    begun, go_on = threading.Event(), threading.Event()

    def make() -> Client:
        begun.set()
        go_on.wait(30)
        return Client()

    resource = pools.add(make, name="client")
    thread = threading.Thread(target=resource.get)
    thread.start()
    begun.wait(30)
    with pytest.raises(TimeoutError, match="'client'"):
        resource.get()
    go_on.set()
    thread.join()


def test_generators_are_closed_after_the_yield(pools: WorkerPools) -> None:
    """A generator function yields the value; what stands after it closes the value."""
    happened: list[str] = []

    def make() -> Iterator[Client]:
        happened.append("open")
        yield Client()
        happened.append("close")

    resource = pools.add(make, name="client")
    assert isinstance(resource.get(), Client)
    pools.close()
    assert happened == ["open", "close"]


class Opener(Client):
    """A client library's pool with methods that an adapter has, too."""

    def open(self) -> None: ...


@pytest.mark.parametrize("wrong", [Client, Client(), Opener, Opener(), 5, None])
def test_a_value_in_place_of_a_factory_is_refused(pools: WorkerPools, wrong: Any) -> None:
    """A client made at import would be shared by every process: it is refused, with what to do."""
    with pytest.raises(ConfigurationError, match="function"):
        pools.add(wrong)


def test_overrides_nest_and_reach_other_threads(pools: WorkerPools) -> None:
    """The innermost stand-in counts, in every thread, and is not closed."""
    resource = pools.add(Factory(), name="client")
    outer, inner = Client(), Client()
    got: list[Client] = []
    with resource.override(outer) as given:
        assert given is outer
        with resource.override(inner):
            thread = threading.Thread(target=lambda: got.append(resource.get()))
            thread.start()
            thread.join()
            assert "overridden" in repr(resource)
        assert resource.get() is outer
    assert got == [inner]
    assert resource.get() not in (outer, inner)
    assert outer.closed == inner.closed == 0


def test_a_close_that_hangs_does_not_hold_up_the_others(pools: WorkerPools) -> None:
    """Closing all is bounded, and a failure closes the others all the same."""
    release = threading.Event()
    healthy = pools.add(Factory(), name="healthy").get()

    def hang() -> Iterator[int]:
        yield 1
        release.wait(60)

    def fail() -> Iterator[int]:
        yield 1
        raise OSError("cannot close")

    pools.add(hang, name="a-hangs").get()
    pools.add(fail, name="b-fails").get()
    pools.close(timeout=0.1)
    assert healthy.closed == 1
    release.set()


def test_a_repr_for_a_bug_report(pools: WorkerPools) -> None:
    """The name, the adapter, the state and the process."""

    class Own(Adapter[Client]):
        def prepare(self) -> None: ...

        def open(self, opening: Any) -> Client:
            return Client()

        def close(self, value: Client, timeout: float) -> None: ...

    resource = pools.add(Own(), name="own")
    assert repr(resource) == f"<Resource 'own' Own closed pid={os.getpid()}>"
    resource.get()
    assert repr(resource) == f"<Resource 'own' Own open pid={os.getpid()}>"


def test_pools_go_with_its_last_user() -> None:
    """Receivers of signals hold a WorkerPools weakly."""
    pools = WorkerPools()
    pools.add(Factory(), name="client").get()
    ref = weakref.ref(pools)
    del pools
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("with_adapter", [False, True])
def test_what_a_function_needs_not_and_an_adapter_has(pools: WorkerPools, with_adapter: bool) -> None:
    """``close=`` beside a generator, and either option beside an adapter, is a mistake that is told at once."""

    def yielding() -> Iterator[Client]:
        yield Client()

    class Own(Adapter[Client]):
        def open(self, opening: Any) -> Client:
            return Client()

        def close(self, value: Client, timeout: float) -> None:
            """Nothing to do."""

    adapter: Any = Own() if with_adapter else yielding
    with pytest.raises(ConfigurationError, match=r"Own\(" if with_adapter else r"yielding, close="):
        pools.add(adapter, close=Client.close, name="client")
    assert pools.resources == []


def test_a_function_can_say_how_its_value_is_closed(pools: WorkerPools) -> None:
    """``close=`` is called in place of the value's own ``close()``."""
    ended: list[Client] = []
    resource = pools.add(lambda: Client(), name="client", close=ended.append)
    client = resource.get()
    pools.close()
    assert ended == [client]
    assert client.closed == 0


def test_a_child_discards_the_connections_it_is_told_of(pools: WorkerPools) -> None:
    """``connections=`` names the sockets inside a value; in a child they are the null device, and the first opening
    there tells of the discarded value once."""
    pairs: list[tuple[socket.socket, socket.socket]] = []

    def make() -> list[socket.socket]:
        pairs.append(socket.socketpair())
        return [pairs[-1][0]]

    events: list[Event] = []
    pools.subscribe(events.append)
    resource = pools.add(make, name="pair", close=lambda value: value[0].close(), connections=list)
    ours = resource.get()[0]

    def child() -> tuple[str, list[tuple[str, str]]]:
        del events[:]
        resource.get()
        resource.close()
        resource.get()
        return os.readlink(f"/proc/self/fd/{ours.fileno()}"), [(event.kind.value, event.resource) for event in events]

    target, told = run_in_fork(child)
    assert target == os.devnull
    assert told == [(kind, "pair") for kind in ("value_discarded", "value_opened", "value_closed", "value_opened")]
    ours.sendall(b"still here")
    assert pairs[0][1].recv(10) == b"still here"
    for _, theirs in pairs:
        theirs.close()


def test_closing_waits_for_the_attempts_that_use_these_resources_alone(pools: WorkerPools) -> None:
    """A WorkerPools is closed at once while an attempt of another one runs, and waits for one of its own."""
    own, other = pools.add(lambda: Client(), name="own"), WorkerPools()
    others = other.add(lambda: Client(), name="other")
    client = own.get()
    entered, leave = threading.Event(), threading.Event()

    def body(used: Resource[Client]) -> None:
        used.get()
        entered.set()
        leave.wait(30)

    terms: Any = None  # asked after a failure alone
    for used, closes in ((others, True), (own, False)):
        entered.clear()
        leave.clear()
        task = threading.Thread(target=lambda used=used: run(lambda: body(used), terms))
        task.start()
        assert entered.wait(30)
        closing = threading.Thread(target=pools.close, args=(60.0,))
        closing.start()
        closing.join(20 if closes else 0.3)
        assert closing.is_alive() is not closes
        assert client.closed == int(closes)
        leave.set()
        task.join(30)
        closing.join(30)
        assert client.closed == 1
        client = own.get()
    other.close()


@pytest.mark.parametrize("kind", ["function", "generator"])
def test_a_child_gets_a_value_of_its_own(pools: WorkerPools, kind: str) -> None:
    """And its sockets are not the parent's, where the adapter can tell which they are."""
    ours, theirs = socket.socketpair()

    def yielding() -> Iterator[socket.socket]:
        yield ours
        ours.sendall(b"bye")

    resource = pools.add(yielding if kind == "generator" else lambda: ours, name="socket")
    assert resource.get() is ours

    def child() -> bool:
        gc.collect()
        return not resource.is_open

    assert run_in_fork(child)
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    resource.get().sendall(b"still here")
    assert theirs.recv(10) == b"still here"
    theirs.close()


def test_a_child_that_ends_like_any_program_runs_no_clean_up_of_the_parent() -> None:
    """A suspended generator of the parent is not resumed when the child's interpreter is taken down."""
    assert fork_in_script(say_goodbye_in_a_generator, do_nothing, read_goodbye).parent == b""


def say_goodbye_in_a_generator() -> Any:
    ours, theirs = socket.socketpair()
    pools = WorkerPools()

    def make() -> Iterator[object]:
        try:
            # Nothing tells of the descriptor here: it stays open in the child.
            yield object()
        finally:
            ours.sendall(b"bye")

    resource = pools.add(make, name="unseen")
    resource.get()
    return pools, resource, theirs


def do_nothing(state: Any) -> None:
    """The child leaves without touching anything."""


def read_goodbye(state: Any) -> bytes:
    theirs = state[2]
    theirs.setblocking(False)
    try:
        return bytes(theirs.recv(10))
    except BlockingIOError:
        return b""


def test_values_close_in_the_reverse_order_of_their_opening(pools: WorkerPools) -> None:
    """Whatever their names: a value may need another one, which was open before, to close."""
    closed: list[str] = []

    def needs(*others: str) -> Callable[[], Iterator[str]]:
        def make() -> Iterator[str]:
            for other in others:
                resources[other].get()
            yield "value"
            closed.append(", ".join(others) or "nothing")

        return make

    resources = {"m": pools.add(needs(), name="m")}
    resources["a"] = pools.add(needs("m"), name="a")
    resources["z"] = pools.add(needs("a", "m"), name="z")
    resources["z"].get()
    pools.close()
    assert closed == ["a, m", "m", "nothing"]


def test_a_value_that_was_closed_in_an_attempt_is_not_used_again_there(pools: WorkerPools) -> None:
    """A body closes a resource that failed; its next use opens another, within the same run."""
    made: list[object] = []

    def make() -> object:
        made.append(object())
        return made[-1]

    resource = pools.add(make, name="client")

    def body() -> bool:
        first = resource.get()
        assert resource.get() is first
        resource.close()
        return resource.get() is made[-1] and len(made) == 2

    assert run(body, Terms())
