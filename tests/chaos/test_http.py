"""Every break of an HTTP connection, at every moment, plain and over TLS: the requests of the table."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.chaos import table
from tests.chaos.breaks import ENDINGS, repair
from tests.chaos.shop import ChaosShop, run_to_the_end
from tests.chaos.table import Cell
from tests.support.proxy import TcpProxy
from tests.support.tls import TlsProxy
from tests.support.upstream import EchoUpstream
from workerpools.adapter import run_coroutine
from workerpools.httpx import AsyncHttpxClient, HttpxClient
from workerpools.requests import RequestsSession
from workerpools.requests._errors import Progress
from workerpools.requests._wire import Exchange

#: How much of a response passes before it is cut: the head surely, and not the body, nor what TLS adds to either.
_HALF = 20_000
_CHUNKS = 8000


@dataclass
class HttpSite:
    """A shop, its upstream, and the proxy that its connections go through: before TLS begins, if there is any."""

    shop: ChaosShop
    upstream: EchoUpstream
    proxy: TcpProxy
    client: str = "httpx"
    _undo: ExitStack = field(default_factory=ExitStack)

    def arm(self, broken: str, moment: str) -> None:
        """Have it broken at that moment of the next delivery; called when the client has been used."""
        if broken == "pool full":
            api: Any = self.shop.api.get()
            url = f"/stream?n={_CHUNKS}"
            if self.client == "async httpx":
                response = run_coroutine(api.send(api.build_request("GET", url), stream=True))
                self._undo.callback(lambda: run_coroutine(response.aclose()))
            else:
                self._undo.enter_context(
                    api.get(url, stream=True) if self.client == "requests" else api.stream("GET", url)
                )
        elif moment == table.CONNECTING:
            self.shop.api.close()
            self._while_connecting(broken)
        elif broken in ENDINGS:
            self._end(broken, moment)
        elif broken == "restart slow":
            self._end("FIN", moment)
            self.proxy.stop()
        elif broken == "blackhole":
            self._lose(moment)

    def heal(self) -> None:
        """Repair everything."""
        self._undo.close()
        repair(self.proxy)

    def _while_connecting(self, broken: str) -> None:
        if broken in ENDINGS:
            self.proxy.cut_after(0, "to_server", ENDINGS[broken], scope="all")
        elif broken == "blackhole":
            self.proxy.refuse_silently()
        elif broken == "restart slow":
            # Of an HTTP server only this is seen: connections end, and for a while nobody listens.
            self.proxy.close_all()
            self.proxy.stop()

    def _end(self, broken: str, moment: str) -> None:
        how = ENDINGS[broken]
        if moment == table.IDLE:
            self.proxy.close_all(how)
        elif moment == table.FIRST_BYTE:
            # What comes next over the kept connection is the request.
            self.proxy.cut_after(0, "to_server", how, scope="open")
        elif moment == table.GOT_IT:
            self.proxy.cut_when(lambda chunk: True, "to_server", how, deliver=True, scope="open")
        elif moment == table.HEADERS:
            self.proxy.cut_after(10, "to_client", how, scope="open")
        else:
            self.proxy.cut_after(_HALF, "to_client", how, scope="open")

    def _lose(self, moment: str) -> None:
        passed = [0]

        def sever(chunk: bytes) -> bool:
            passed[0] += len(chunk)
            if moment == table.HEADERS or passed[0] > _HALF:
                self.proxy.sever()
            return False

        if moment == table.IDLE:
            self.proxy.sever()
        else:
            # The request that was read is still sent on; its response is lost, or the rest of it.
            self.proxy.cut_when(sever, "to_server" if moment == table.HEADERS else "to_client", scope="open")


@pytest.fixture
def site(
    upstream: EchoUpstream,
    tls_upstream: TlsProxy,
    cell: Cell,
    broken: str,
    driver: str,
    client: str,
    proxy_to: Callable[[Any], TcpProxy],
) -> Iterator[HttpSite]:
    """An app with a client that has used its connection once."""
    with ExitStack() as opened:
        tls = driver == table.TLS
        proxy = proxy_to(tls_upstream if tls else upstream)
        shop = ChaosShop()
        options: dict[str, Any] = {}
        if broken != "wrong certificate":
            options["verify"] = tls_upstream.client_context()
        url = f"{'https' if tls else 'http'}://127.0.0.1:{proxy.port}"
        # However slow the machine is, the idle connection is the one that the task takes.
        size = 1 if broken == "pool full" else None
        if client == "requests":
            options.update(timeout=0.5, acquire_timeout=0.2, max_idle=600.0, pool_maxsize=size, trust_env=False)
            made_of: Any = shop.pools.add(RequestsSession(url, **options), name="api")
            shop.api = made_of
            shop._extend(api=made_of)
        else:
            options["timeout"] = httpx.Timeout(0.5, connect=0.5, pool=0.2)
            options["limits"] = httpx.Limits(max_connections=size or 100, keepalive_expiry=600.0)
            declared = AsyncHttpxClient if client == "async httpx" else HttpxClient
            shop.api = shop.pools.add(declared(base_url=url, trust_env=False, **options), name="api")
            shop._extend(api=shop.api)
        opened.callback(shop.close)
        made = HttpSite(shop, upstream, proxy, client)
        opened.callback(made.heal)
        yield made


def send(api: Any, request: str, path: str = "/orders") -> Any:
    """Send a request as the table names it: ``POST with a key``."""
    method, _, key = request.partition(" ")
    sent = api.request(method, path, headers={"Idempotency-Key": "order-1"} if key else {})
    return _checked(sent) if inspect.iscoroutine(sent) else sent.raise_for_status()


async def _checked(sent: Coroutine[Any, Any, httpx.Response]) -> None:
    (await sent).raise_for_status()


def _body(shop: ChaosShop, cell: Cell, broken: str, method: str, client: str) -> Callable[[Any], Any]:
    def path() -> str:
        found = f"/stream?n={_CHUNKS}" if cell.moment == table.MID_BODY else "/echo/token"
        return f"{found}?status={broken}" if broken.isdigit() and shop.runs == 1 else found

    def body(self: Any) -> None:
        if cell.before:
            send(self.api, cell.before)
            shop.pause_at("after that")
        send(self.api, method, path())

    async def async_body(self: Any) -> None:
        if cell.before:
            await send(self.api, cell.before)
            # Beside the loop, which what happens there needs.
            await asyncio.to_thread(shop.pause_at, "after that")
        await send(self.api, method, path())

    return async_body if client == "async httpx" else body


@pytest.mark.parametrize(
    ("cell", "broken", "driver", "method", "client"),
    table.with_clients(table.parameters(*table.OVER_HTTP), ("httpx", "requests"), ("async httpx",)),
)
def test_cell(cell: Cell, broken: str, driver: str, method: str, client: str, site: HttpSite) -> None:
    """What the task did, and how often the server saw the request."""
    shop = site.shop
    shop.declare(_body(shop, cell, broken, method, client), cell.declared)
    if broken != "wrong certificate":
        warm = send(shop.api.get(), "GET", "/echo/warm")
        if inspect.iscoroutine(warm):
            run_coroutine(warm)
        site.upstream.clear()
    if cell.before:
        shop.at["after that"] = lambda: site.arm(broken, cell.moment)
    else:
        site.arm(broken, cell.moment)
    run_to_the_end(shop, site.heal, cell.steps)
    seen = [request for request in site.upstream.requests() if broken != "pool full" or request.path != "/stream"]
    assert len(seen) == cell.requests


def _does_not_hear_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "head_started", property(lambda self: False, lambda self, value: None))


def _declares_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exchange, "leaves", Exchange.acquired)


#: What a request of the table becomes where the watch on the wire misses it: sent twice.
UNWATCHED = {
    _does_not_hear_the_head: Cell(
        ("FIN",), table.GOT_IT, table.RETRY, requests=2, drivers=table.HTTP, methods=("POST",)
    ),
    _declares_no_effect: Cell(
        ("restart slow",),
        table.CONNECTING,
        table.RETRY,
        requests=3,
        drivers=table.HTTP,
        methods=("GET",),
        before="POST",
    ),
}


@pytest.mark.parametrize(
    ("cell", "broken", "driver", "method", "client"),
    table.with_clients(table.parameters(*UNWATCHED.values()), ("requests",), ()),
)
def test_without_the_watch(
    cell: Cell, broken: str, driver: str, method: str, client: str, site: HttpSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The POST is sent twice: the cells that forbid it hold because of the watch alone."""
    [deafen] = [deafen for deafen, its_cell in UNWATCHED.items() if its_cell is cell]
    deafen(monkeypatch)
    test_cell(cell, broken, driver, method, client, site)
