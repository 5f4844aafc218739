"""The shop under greenlets: what a body can do to others there, and what can end it from outside.

`SHOP_COOPERATES` names the library by which psycopg2 lets other greenlets run while it waits, as an application would.
"""

from __future__ import annotations

import os
import threading
import time
from importlib import import_module
from typing import Any

from sqlalchemy import text

from tests.support.recorder import record
from tests.worker.shop import BACKEND, INSERT, ConfiguredTask, ShopTask, StockTask, app

__all__ = ["app"]

if library := os.environ.get("SHOP_COOPERATES"):
    import_module(f"psycogreen.{library}").patch_psycopg()

SLEEP = text("select pg_sleep(:seconds)")


def _interrupt(seconds: float) -> Any:
    """Have the calling greenlet interrupted, as long as what is returned is kept."""
    import gevent

    return gevent.Timeout.start_new(seconds)


def _sell(self: Any, number: int, how: str) -> str:
    record("body", number)
    self.session.execute(INSERT, {"number": number, "run": 0})
    record("sold", number)
    if how == "timeout":
        timeout = _interrupt(0.2)
        time.sleep(30)
        timeout.close()
    elif how == "timeout in a query":
        timeout = _interrupt(0.5)
        self.session.execute(SLEEP, {"seconds": 30})
        timeout.close()
    elif how == "timeout of its own":
        import gevent

        with gevent.Timeout(0.2, False):
            time.sleep(30)
    elif how == "sleep":
        time.sleep(30)
    elif how == "sleep in a query":
        self.session.execute(SLEEP, {"seconds": 30})
    return threading.current_thread().name


@app.task(base=ShopTask, bind=True, name="shop.sell")
def sell(self: ShopTask, number: int, how: str = "return") -> str:
    """Write a row by way of psycopg2, then be interrupted in one of several ways."""
    return _sell(self, number, how)


@app.task(base=StockTask, bind=True, name="shop.sell_stock")
def sell_stock(self: StockTask, number: int, how: str = "return") -> str:
    """The same by way of psycopg 3."""
    return _sell(self, number, how)


@app.task(base=ConfiguredTask, bind=True, name="shop.hold")
def hold(self: ConfiguredTask, seconds: float) -> int:
    """Keep a connection for a while, and let the others run."""
    backend: int = self.session.scalar(BACKEND)
    record("hold")
    time.sleep(seconds)
    return backend


@app.task(base=ShopTask, bind=True, name="shop.spawn")
def spawn(self: ShopTask, number: int) -> list[str]:
    """Use the session in a thread of the body's own; it is a greenlet here."""
    self.session.execute(INSERT, {"number": number, "run": 0})
    found: list[str] = []

    def use() -> None:
        try:
            found.append(f"session {self.session.scalar(BACKEND)}")
        except Exception as error:
            found.append(type(error).__name__)
        found.append(self.api.get("/echo/spawned").text)
        with self.db.connect() as connection:
            found.append("another" if connection.scalar(BACKEND) else "")

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(30)
    return found
