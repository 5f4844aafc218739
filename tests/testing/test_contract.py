"""The contract notices an adapter that breaks it."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

import pytest
from pymemcache.client.base import PooledClient

from tests.support.memcached import MemcachedServer
from tests.thirdparty import memcached as thirdparty
from tests.thirdparty.memcached import Memcached
from tests.thirdparty.test_memcached import TestContract as Contract
from workerpools import Failure, WorkerPools
from workerpools.adapter import Effect, Opening
from workerpools.testing import TcpProxy

SECRET = "pass-of-the-cache"


def nothing(*arguments: Any, **options: Any) -> Any:
    return None


class OpensEarly(Memcached):
    def prepare(self) -> None:
        self.early = socket.create_connection(self.server)


class LongKind(Memcached):
    kind = "distributed cache"


class ShowsAll(Memcached):
    def describe(self) -> str:
        return f"Memcached {self.server} as {SECRET}"


class ToldNothingOf(Memcached):
    """Does not report by one method of its opening."""

    method = ""
    answer: Any = None

    def open(self, opening: Opening) -> PooledClient:
        setattr(opening, self.method, lambda *arguments, **options: self.answer)
        return super().open(opening)


class NoFailures(ToldNothingOf):
    method = "failed"


class NoEffects(ToldNothingOf):
    method = "effect"
    answer = Effect("nothing")


class NoClosing(ToldNothingOf):
    method = "disconnected"


class NoDescriptors(Memcached):
    def open(self, opening: Opening) -> PooledClient:
        opening.connected = lambda connection, detail="": opening.opened(detail)  # type: ignore[method-assign]
        opening.descriptors.connecting = nothing  # type: ignore[method-assign]
        return super().open(opening)


class NoDrain(Memcached):
    def close(self, value: PooledClient, timeout: float) -> None:
        super().close(value, 0.0)


class EndlessDrain(Memcached):
    def close(self, value: PooledClient, timeout: float) -> None:
        super().close(value, 5.0)


class NoClose(Memcached):
    def close(self, value: PooledClient, timeout: float) -> None:
        self.kept = value


class NoRecycle(Memcached):
    def recycle(self, value: PooledClient, since: float) -> bool:
        return True


class RoughRecycle(Memcached):
    def recycle(self, value: PooledClient, since: float) -> bool:
        value.close()
        return True


class Blames(Memcached):
    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Failure | None:
        return Failure(error.args[0], error.args[1])


class NoLeases(Memcached):
    def open(self, opening: Opening) -> PooledClient:
        class Lease:
            acquired = gave_up = returned = staticmethod(nothing)

        opening.wait = Lease  # type: ignore[assignment]
        return super().open(opening)


class NoReturn(Memcached):
    def open(self, opening: Opening) -> PooledClient:
        value = super().open(opening)
        value.client_pool._ended = nothing
        return value


class Repeats(Memcached):
    """Takes everything for repeatable."""

    def open(self, opening: Opening) -> PooledClient:
        self.before = thirdparty.REPEATABLE
        thirdparty.REPEATABLE = self.before | {b"incr"}  # type: ignore[misc]
        return super().open(opening)

    def close(self, value: PooledClient, timeout: float) -> None:
        thirdparty.REPEATABLE = self.before  # type: ignore[misc]
        super().close(value, timeout)


class Patient(Memcached):
    """Does not know of the deadline."""

    def open(self, opening: Opening) -> PooledClient:
        self.before = thirdparty._clamped
        thirdparty._clamped = lambda timeout: timeout
        return super().open(opening)

    def close(self, value: PooledClient, timeout: float) -> None:
        thirdparty._clamped = self.before
        super().close(value, timeout)


class Wraps(Memcached):
    """Raises errors of its own."""

    def open(self, opening: Opening) -> PooledClient:
        value = super().open(opening)
        connect = thirdparty._Connection._connect

        class Unavailable(Exception):
            pass

        class Wrapping(thirdparty._Connection):
            def _connect(self) -> None:
                try:
                    connect(self)
                except OSError as error:
                    raise Unavailable from error

        make = value.client_class
        value.client_class = lambda *arguments, **options: Wrapping(*make.args, *arguments, **options)
        return value


def run(contract: Contract, test: Callable[..., None], server: tuple[str, int]) -> None:
    """Call one test of the contract as pytest does."""
    with ExitStack() as stack:
        proxy = stack.enter_context(TcpProxy(*server))
        pools = WorkerPools()
        stack.callback(pools.close, 1.0)
        resource = pools.add(contract.adapter(*proxy_address(proxy)), name="contract")
        given = {"proxy": proxy, "pools": pools, "resource": resource}
        wanted = inspect.signature(test).parameters
        if "resource" not in wanted:
            pools.shared.resources.remove(resource)
            del pools.shared.names["contract"]
        test(**{name: given[name] for name in wanted})


def proxy_address(proxy: TcpProxy) -> tuple[str, int]:
    return proxy.host, proxy.port


BROKEN = [
    (OpensEarly, "declaring_opens_nothing"),
    (LongKind, "what_an_adapter_says_of_itself"),
    (ShowsAll, "no_secret_is_shown"),
    (NoDescriptors, "fork_while_idle"),
    (NoDescriptors, "fork_while_in_use"),
    (NoDrain, "close_waits_for_work_in_flight"),
    (EndlessDrain, "close_is_bounded"),
    (NoClose, "use_after_close_opens_again"),
    (NoFailures, "dead_idle_connection_costs_no_failure"),
    (NoFailures, "an_error_reaches_the_body_unchanged"),
    (Wraps, "an_error_reaches_the_body_unchanged"),
    (NoFailures, "a_lost_answer_to_a_write"),
    (Repeats, "a_lost_answer_to_a_write"),
    (NoEffects, "an_effect_forbids_a_replay"),
    (Repeats, "an_effect_forbids_a_replay"),
    (Blames, "classify_never_raises"),
    (Patient, "deadline_over_a_silent_connection"),
    (Patient, "deadline_while_connecting"),
    (NoLeases, "statistics"),
    (NoReturn, "statistics"),
    (NoClosing, "statistics"),
    (NoReturn, "many_threads_use_it_at_once"),
    (NoLeases, "a_connection_that_is_left_in_use_is_a_leak"),
    (NoRecycle, "recycle"),
    (RoughRecycle, "recycle_leaves_work_in_flight_alone"),
]


@pytest.mark.parametrize(("broken", "name"), BROKEN, ids=lambda each: getattr(each, "__name__", each))
def test_a_broken_adapter_fails(memcached: MemcachedServer, broken: type[Memcached], name: str) -> None:
    """Each way to break it is noticed by the test that is about it; the adapter as it is passes."""

    class Checked(Contract):
        secret = SECRET
        made: type[Memcached] = Memcached

        def adapter(self, host: str, port: int) -> Memcached:
            return self.made(host, port)

    contract = Checked()
    contract.memcached = memcached
    memcached.ask("set count 0 0 1\r\n0")
    server = (memcached.host, memcached.port)
    test = getattr(contract, f"test_{name}")
    run(contract, test, server)
    contract.made = broken
    # What pytest takes for a failure: an assertion that does not hold, or any other error.
    with pytest.raises((Exception, pytest.fail.Exception)):
        run(contract, test, server)


def test_every_test_of_the_contract_was_seen_to_fail() -> None:
    """But for what a resource itself holds, whatever its adapter is."""
    tests = {name.removeprefix("test_") for name in dir(Contract) if name.startswith("test_")}
    assert tests - {name for _, name in BROKEN} == {"one_value_per_process"}


def test_proxy_stops_and_starts_on_its_port(memcached: MemcachedServer) -> None:
    """What is open stays; what is new is refused meanwhile."""
    with TcpProxy(memcached.host, memcached.port) as proxy:
        address = proxy_address(proxy)
        with closing(socket.create_connection(address, 2.0)) as client:
            proxy.wait_for(lambda proxy: proxy.open == 1)
            proxy.stop()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address, 2.0)
            client.sendall(b"version\r\n")
            assert client.recv(100).startswith(b"VERSION")
            proxy.start()
            with closing(socket.create_connection(address, 2.0)):
                proxy.wait_for(lambda proxy: proxy.open == 2)
            proxy.wait_for(lambda proxy: proxy.open == 1)
            proxy.cut()
            assert client.recv(100) == b""
            assert (proxy.open, proxy.accepted) == (0, 2)


def test_proxy_is_silent_and_resumes(memcached: MemcachedServer) -> None:
    """Nothing is lost that was held back; an answer is lost once."""
    with ExitStack() as stack:
        proxy = stack.enter_context(TcpProxy(memcached.host, memcached.port))
        client = stack.enter_context(closing(socket.create_connection(proxy_address(proxy), 5.0)))
        proxy.wait_for(lambda proxy: proxy.open == 1)
        proxy.silence(new=False)
        client.sendall(b"version\r\n")
        proxy.wait_for(lambda proxy: proxy.held == 1)
        with closing(socket.create_connection(proxy_address(proxy), 5.0)) as other:
            other.sendall(b"version\r\n")
            assert other.recv(100).startswith(b"VERSION")
        with pytest.raises(TimeoutError):
            proxy.wait_for(lambda proxy: proxy.held == 0, 0.01)
        proxy.resume()
        assert client.recv(100).startswith(b"VERSION")
        proxy.lose_answer(b"version")
        client.sendall(b"version\r\n")
        assert client.recv(100) == b""
        assert proxy.lost == 1
