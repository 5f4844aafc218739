"""A time limit or an exit strikes at every point of a task: nothing is leaked, and the next task does not wait."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from tests.requests.conftest import RequestsShop
from tests.stats.counting import stats
from tests.support.interruptions import Interruption, in_a_thread
from tests.support.upstream import EchoUpstream
from workerpools._run import attempts
from workerpools.events import EventKind

FILES = (
    *("/workerpools/_run/", "/workerpools/_pools/", "/workerpools/_stats/", "/workerpools/requests/"),
    *("/urllib3/connectionpool.py", "/urllib3/connection.py", "/requests/adapters.py"),
)

#: Every nth point is struck; EVERY_POINT=1 strikes all.
STEP = int(os.environ.get("EVERY_POINT", "31"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(disabled)


def problems(shop: RequestsShop, task: Any) -> Iterator[str]:
    """Yield what is wrong after a task that was struck."""
    if attempts.current() is not None or attempts.running():
        yield "the attempt runs on"
        attempts._current.set(None)
        attempts._active.attempts.clear()
    now = stats(shop.pools, "api")
    if (now.in_use, now.pending) != (0, 0):
        yield f"in use {now.in_use}, pending {now.pending}"
    if any(event.kind is EventKind.CONNECTION_LEAKED for event in shop.events):
        yield "a leak is told"
        shop.events.clear()
    resource: Any = next(each for each in shop.pools.resources if each.name == "api")
    traffic = resource.adapter._traffic[resource.get()]
    if traffic.exchanges:
        yield "in flight"
    if any(pool._exchanges for pool in traffic.pools):
        yield "a slot is taken"
    try:
        result = in_a_thread(lambda: task.apply(("/echo/next",)))
        if result.state != "SUCCESS":
            yield f"the next task fails: {result.result!r}"
    except TimeoutError:
        yield "the next task hangs"
    gc.collect()
    if (now := stats(shop.pools, "api")).open != (count := resource._holder.live.opening.descriptors.count()):
        yield f"{count} connections, {now.open} counted as open"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "cold"),
    [(SoftTimeLimitExceeded, False), (SoftTimeLimitExceeded, True), (SystemExit, False)],
    ids=["warm", "cold", "an exit"],
)
def test_nothing_is_leaked(
    shop: RequestsShop, echo: EchoUpstream, cold: bool, error: Callable[[], BaseException]
) -> None:
    """A connection is all that there is: a slot that is lost would stop the process."""
    resource = shop.add_session(echo.url, pool_maxsize=1, acquire_timeout=1.0)

    @shop.task()
    def task(self: Any, path: str) -> None:
        assert self.api.get(path).text
        assert self.api.post("/orders").ok

    task.apply(("/echo/x",))
    number, struck, wrong = 0, 0, list[str]()
    while True:
        number += STEP
        if cold:
            resource.close(0.0)
        with Interruption(FILES, number, error) as interruption, suppress(SystemExit):
            task.apply(("/stream?n=2",))
        if not interruption.where:
            break
        struck += 1
        wrong += [f"{problem}: {number} {interruption.where}" for problem in problems(shop, task)]
    assert wrong == []
    assert struck > 500 / STEP
