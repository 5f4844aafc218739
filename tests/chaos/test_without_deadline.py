"""Where a task has no limit, the defaults bound how long a silent network holds it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import pytest
from sqlalchemy import text

from tests.support.databases import Database
from tests.support.proxy import TcpProxy
from tests.support.shop import Shop, insert
from tests.support.upstream import EchoUpstream
from workerpools import classify

#: Seconds; of these the kernel's own timers take 25, and another connection's attempt 5.
BOUND = 35.0


def _vanish(proxy: TcpProxy) -> None:
    proxy.refuse_silently()
    proxy.sever()


def _ask(self: Any, vanish: Callable[[], None]) -> None:
    self.session.execute(text("select 1"))
    timer = threading.Timer(0.5, vanish)
    timer.start()
    try:
        self.session.execute(text("select pg_sleep(300)"))
    finally:
        timer.join()


def _tell(self: Any, vanish: Callable[[], None]) -> None:
    insert(self.session, 1)
    vanish()
    insert(self.session, 2)


def _request(self: Any, vanish: Callable[[], None]) -> None:
    self.api.get("/echo/warm")
    vanish()
    self.api.get("/echo/1")


@pytest.mark.timeout(180)
def test_packets_that_vanish_hold_a_task_for_half_a_minute(
    database: Database, echo: EchoUpstream, proxy_to: Callable[[Any], TcpProxy]
) -> None:
    """A database that is to answer, one that is told something, and an upstream; all at once, as it takes its time."""
    took: dict[str, float] = {}
    errors: dict[str, BaseException] = {}
    cases = {
        **{f"waiting, {driver}": (driver, _ask) for driver in ("psycopg2", "psycopg")},
        **{f"sending, {driver}": (driver, _tell) for driver in ("psycopg2", "psycopg")},
        "HTTP": ("psycopg2", _request),
    }

    def run(name: str, shop: Shop, proxy: TcpProxy, body: Callable[[Any, Callable[[], None]], None]) -> None:
        @shop.task()
        def task(self: Any) -> None:
            body(self, lambda: _vanish(proxy))

        started = time.monotonic()
        try:
            task.apply(throw=True)
        except Exception as error:
            errors[name] = error
        took[name] = time.monotonic() - started

    with ExitStack() as opened:
        threads = []
        for name, (driver, body) in cases.items():
            database.execute("drop table if exists orders")
            api = proxy_to(echo)
            shop = opened.enter_context(closing(Shop(database, driver, proxy=proxy_to(database))))
            shop.add_api(f"http://127.0.0.1:{api.port}")
            proxy = api if name == "HTTP" else shop.proxy
            opened.callback(proxy.pass_through)
            threads.append(threading.Thread(target=run, args=(name, shop, proxy, body), daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120.0)
    assert took.keys() == errors.keys() == cases.keys(), (took, errors)
    assert max(took.values()) < BOUND, took
    assert all(classify(error) is not None for error in errors.values()), errors
