"""Every break of a connection to Redis, at every moment, with each driver: the commands of the table."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from demo_tasks.servers import ValkeyServer, Workspace
from demo_tasks.servers.binaries import valkey_program
from tests.chaos import table
from tests.chaos.breaks import ENDINGS, repair
from tests.chaos.shop import ChaosShop, run_to_the_end
from tests.chaos.table import Cell
from tests.support.cuts import Direction
from tests.support.faults import crash
from tests.support.proxy import TcpProxy
from tests.support.services import require_program
from tests.support.stand import wait_until
from workerpools.adapter import run_coroutine
from workerpools.redis import AsyncRedisClient, RedisClient, _exchange

COUNT = "return redis.call('INCR', KEYS[1])"
#: A value whose middle is in another chunk than its beginning.
_LARGE = b"x" * 300_000


@pytest.fixture(scope="module")
def servers(workspace: Workspace) -> Iterator[list[ValkeyServer]]:
    """Two servers of these tests' own, with one password."""
    require_program(valkey_program)
    with ValkeyServer(workspace, name="chaos-first") as first, ValkeyServer(workspace, name="chaos-second") as second:
        second.stop()
        second.password = first.password
        second.start()
        yield [first, second]


@dataclass
class RedisSite:
    """A shop, its servers, and the proxy that its connections go through."""

    shop: ChaosShop
    servers: list[ValkeyServer]
    proxy: TcpProxy
    cache: Any
    own: list[Any]
    _undo: ExitStack = field(default_factory=ExitStack)

    def arm(self, broken: str, moment: str) -> None:
        """Have it broken at that moment of the next delivery; called when the client has been used."""
        if moment == table.CONNECTING:
            self.cache.close()
        if broken == "pool full":
            pipeline = self.cache.get().pipeline()
            done(pipeline.watch("n"))
            self._undo.callback(lambda: done(pipeline.reset()))
        elif broken == "restart":
            self.servers[0].stop()
            self.servers[0].start()
        elif broken == "restart slow":
            if moment == table.CONNECTING:
                self.proxy.close_all()
            else:
                self._end(ENDINGS["FIN"], moment)
            self.proxy.stop()
        elif broken.startswith("failover"):
            self._fail_over(for_long=broken == "failover for long")
        elif broken.startswith("primary killed"):
            self._replicate()
            self._kill(moment, for_long=broken == "primary killed for long")
        elif broken in ENDINGS:
            self._end(ENDINGS[broken], moment)
        elif broken == "blackhole" and moment == table.CONNECTING:
            self.proxy.refuse_silently()
        elif broken == "blackhole":
            self.proxy.sever()
        elif broken == "silent":
            self._silence(moment)

    def heal(self) -> None:
        """Repair everything."""
        self._undo.close()
        repair(self.proxy)

    def increments(self) -> int:
        """How many INCRs were done, wherever."""
        return sum(int(client.get("n") or 0) for client in self.own)

    def _end(self, how: Any, moment: str) -> None:
        if moment == table.IDLE:
            self.proxy.close_all(how)
        elif moment == table.CONNECTING:
            self.proxy.cut_after(0, "to_server", how, scope="all")
        elif moment == table.FIRST_BYTE:
            self.proxy.cut_after(0, "to_server", how, scope="open")
        elif moment == table.GOT_IT:
            self.proxy.cut_when(lambda chunk: True, "to_server", how, deliver=True, scope="open")
        else:
            self.proxy.cut_after(2, "to_client", how, scope="open")

    def _silence(self, moment: str) -> None:
        # What was held back is lost for good.
        self._undo.callback(self.proxy.close_all)
        if moment == table.GOT_IT:
            self.proxy.cut_when(lambda chunk: bool(self.proxy.blackhole()), "to_server", scope="open")
        elif moment == table.MID_ANSWER:
            self.proxy.cut_when(lambda chunk: bool(self.proxy.blackhole()), "to_client", scope="open")
        else:
            self.proxy.blackhole()

    def _fail_over(self, *, for_long: bool) -> None:
        first, second = self.servers
        first_own = self.own[0]
        first_own.execute_command("REPLICAOF", second.host, second.port)
        self._undo.callback(first_own.execute_command, "REPLICAOF", "NO", "ONE")
        if not for_long:
            self.proxy.lead_to(second)
            self._undo.callback(self.proxy.lead_to, first)

    def _replicate(self) -> None:
        """Make the second server the replica of the first."""
        first, (primary, replica) = self.servers[0], self.own
        # Without a file, which would be read at the restart.
        primary.config_set("repl-diskless-sync-delay", 0)
        replica.config_set("masterauth", first.password)
        replica.execute_command("REPLICAOF", first.host, first.port)
        self._undo.callback(replica.execute_command, "REPLICAOF", "NO", "ONE")
        wait_until(lambda: replica.info("replication")["master_link_status"] == "up", "a replica")

    def _kill(self, moment: str, *, for_long: bool) -> None:
        """Have the primary killed once its replica has what it has done, and connections lead to the replica."""
        first, second = self.servers

        def kill() -> None:
            # What waits for this has been sent after all that was done before.
            self.own[0].incr("fence")
            assert self.own[0].wait(1, 10_000) == 1
            crash(first)
            self._undo.callback(first.start)
            if not for_long:
                self.own[1].execute_command("REPLICAOF", "NO", "ONE")
            self.proxy.lead_to(second)

        def killed(chunk: bytes) -> bool:
            if first.running:
                self.shop.errands.ask(kill)
            return moment != table.MID_ANSWER

        if moment == table.IDLE:
            kill()
            # Which passes the end on, when it gets to it.
            self.proxy.close_all()
            return
        direction: Direction = "to_client" if moment in (table.GOT_IT, table.MID_ANSWER) else "to_server"
        self.proxy.cut_when(killed, direction, scope="all" if moment == table.CONNECTING else "open")
        if moment == table.MID_ANSWER:
            self.proxy.cut_after(2, "to_client", scope="open")


@pytest.fixture
def site(
    servers: list[ValkeyServer],
    cell: Cell,
    broken: str,
    driver: str,
    declared: Any,
    proxy_to: Callable[[Any], TcpProxy],
) -> Iterator[RedisSite]:
    """An app with a client that has used its connection once."""
    with ExitStack() as opened:
        own = [opened.enter_context(closing(redis.Redis.from_url(server.url()))) for server in servers]
        for client in own:
            client.flushall()
        proxy = proxy_to(servers[0])
        shop = ChaosShop()
        password = "mistaken" if broken == "wrong password" else servers[0].password
        url = f"{driver.partition('-')[0]}://:{password}@127.0.0.1:{proxy.port}/0"
        # However slow the machine is, an idle connection is trusted: what is to find it dead is the task.
        options: dict[str, Any] = {"check_after": None, "acquire_timeout": 0.2}
        if "soft_time_limit" not in cell.declared:
            options.update(timeout=0.5, connect_timeout=0.5)
        if broken == "pool full":
            options["max_connections"] = 1
        cache = shop.pools.add(declared(url, **options), name="cache")
        shop._extend(cache=cache)
        opened.callback(shop.close)
        made = RedisSite(shop, servers, proxy, cache, own)
        opened.callback(made.heal)
        yield made


def done(value: Any) -> Any:
    """Return what a call gave, awaited where it is to be."""
    return run_coroutine(value) if inspect.iscoroutine(value) else value


def send(cache: Any, command: str) -> Any:
    """Send a command as the table names it."""
    if command == "GET":
        return cache.get("large")
    if command == "INCR":
        return cache.incr("n")
    if command == "EVAL":
        return cache.eval(COUNT, 1, "n")
    return cache.pipeline().incr("n").execute()


def _body(shop: ChaosShop, cell: Cell, method: str, declared: Any) -> Callable[[Any], Any]:
    def body(self: Any) -> None:
        if cell.before:
            send(self.cache, cell.before)
            shop.pause_at("after that")
        _check(method, send(self.cache, method))

    async def async_body(self: Any) -> None:
        if cell.before:
            await send(self.cache, cell.before)
            # Beside the loop, which what happens there needs.
            await asyncio.to_thread(shop.pause_at, "after that")
        _check(method, await send(self.cache, method))

    return async_body if declared is AsyncRedisClient else body


def _check(method: str, answer: object) -> None:
    assert method != "GET" or answer in (_LARGE, None)


@pytest.fixture
def declared(client: str) -> Any:
    """The client's declaration."""
    return AsyncRedisClient if client == "async" else RedisClient


@pytest.mark.parametrize(
    ("cell", "broken", "driver", "method", "client"),
    table.with_clients(table.parameters(*table.OVER_REDIS), ("sync", "async"), ()),
)
def test_cell(cell: Cell, broken: str, driver: str, method: str, client: str, declared: Any, site: RedisSite) -> None:
    """What the task did, and how often the server did the command."""
    shop = site.shop
    shop.declare(_body(shop, cell, method, declared), cell.declared)
    site.own[0].set("large", _LARGE)
    if broken != "wrong password":
        assert done(site.cache.get().get("n")) is None
    if cell.before:
        shop.at["after that"] = lambda: site.arm(broken, cell.moment)
    else:
        site.arm(broken, cell.moment)
    run_to_the_end(shop, site.heal, cell.steps)
    assert site.increments() == cell.increments


#: What a command of the table becomes where the watch on the wire takes it for harmless: done twice.
UNWATCHED = (
    Cell(("FIN",), table.GOT_IT, table.RESEND, increments=2, drivers=table.REDIS, methods=("INCR", "EVAL")),
    Cell(("primary killed",), table.MID_ANSWER, table.RESEND, increments=2, drivers=table.REDIS, methods=("INCR",)),
    Cell(("FIN",), table.GOT_IT, table.REPLAY, increments=2, drivers=table.REDIS, methods=("MULTI, INCR, EXEC",)),
    Cell(
        ("restart slow",),
        table.CONNECTING,
        table.RETRY,
        increments=2,
        drivers=table.REDIS,
        methods=("GET",),
        before="INCR",
    ),
)


@pytest.mark.parametrize(
    ("cell", "broken", "driver", "method", "client"),
    table.with_clients(table.parameters(*UNWATCHED), ("sync", "async"), ()),
)
def test_without_the_watch(
    cell: Cell,
    broken: str,
    driver: str,
    method: str,
    client: str,
    declared: Any,
    site: RedisSite,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The INCR is done twice: the cells that forbid it hold because of the watch alone."""
    known = _exchange.command_of
    monkeypatch.setattr(_exchange, "command_of", lambda arguments: known(arguments)._replace(harmless=True))
    test_cell(cell, broken, driver, method, client, declared, site)
