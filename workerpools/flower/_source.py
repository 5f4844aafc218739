"""Where the page's numbers come from: workers are asked while somebody looks, and not more often than that takes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from workerpools._stats.snapshot import WorkerStats
from workerpools.flower._document import Reply, Status, document, status

__all__ = ["FORGOTTEN_AFTER", "LEAST_INTERVAL", "Source"]

logger = logging.getLogger("workerpools.flower")

#: Workers are asked not more often than this, in seconds, however many pages are open.
LEAST_INTERVAL = 2.0

#: A worker that has been offline for so long is not shown any more, in seconds; Flower's purge_offline_workers wins.
FORGOTTEN_AFTER = 3600.0

#: What a request waits besides the time that workers have for their answer, in seconds.
_SLACK = 1.0
#: ... and what else must have passed until the page says that something is wrong: Flower's threads may be busy.
_PATIENCE = 5.0

_UNREACHABLE = "Flower cannot reach the broker, so the workers cannot be asked."
_STUCK = "The broker does not answer Flower, so the workers cannot be asked."


class Source:
    """What the workers of one Flower said last. It belongs to the IOLoop's thread, and never blocks it.

    Flower itself asks all workers when it starts, and one when its page is opened: too rarely for a page that refreshes
    itself.
    """

    def __init__(self) -> None:
        self._replies: dict[str, Reply] = {}
        self._answered: frozenset[str] = frozenset()
        self._alive: dict[str, bool] = {}
        self._asked: float | None = None
        self._problem = ""
        self._running: asyncio.Task[None] | None = None
        self._started = float("-inf")

    async def refresh(self, flower: Any) -> str:
        """Ask the workers, unless that was done a moment ago; return why they cannot be asked, if so.

        Args:
            flower: Flower's application.
        """
        timeout = flower.options.inspect_timeout / 1000.0
        if self._running is None and time.monotonic() - self._started >= LEAST_INTERVAL:
            self._started = time.monotonic()
            self._running = asyncio.ensure_future(self._ask(flower, timeout))
            self._running.add_done_callback(self._ended)
        if self._running is not None:
            # One that is given up goes on: the next request finds what it brought.
            await asyncio.wait({self._running}, timeout=timeout + _SLACK)
        stuck = self._running is not None and time.monotonic() - self._started > timeout + _PATIENCE
        self._alive = {name: bool(worker.alive) for name, worker in flower.events.state.workers.items()}
        self._adopt(flower.workers)
        self._forget(self._alive, time.time(), flower.options.purge_offline_workers)
        return _STUCK if stuck else self._problem

    async def document(self, flower: Any) -> dict[str, Any]:
        """Return what the page shows, as fresh as the bound on questions and the workers' answers allow."""
        problem = await self.refresh(flower)
        return document(
            self._replies,
            answered=self._answered,
            alive=self._alive,
            asked=self._asked,
            now=time.time(),
            problem=problem,
        )

    def snapshots(self) -> Mapping[str, Sequence[WorkerStats]]:
        """Return what each worker that is not offline said last, by its name."""
        now, found = time.time(), {}
        for name, reply in self._replies.items():
            state = status(
                answered=name in self._answered,
                alive=self._alive.get(name),
                age=now - reply.received,
                reachable=not self._problem,
            )
            if reply.has_pools and reply.snapshots is not None and state is not Status.OFFLINE:
                found[name] = reply.snapshots
        return found

    async def _ask(self, flower: Any, timeout: float) -> None:
        alive = [name for name, worker in flower.events.state.workers.items() if worker.alive]
        ask = partial(_replies, flower.capp, timeout, expected=len({*alive, *self._answered}))
        try:
            told = await asyncio.get_running_loop().run_in_executor(None, ask)
        except Exception as error:
            if not self._problem:
                # Its text may hold the broker's URL.
                logger.warning("the workers cannot be asked about their connection pools: %s", type(error).__name__)
            self._problem = _UNREACHABLE
            self._answered = frozenset()
            return
        if self._problem:
            logger.info("the workers can be asked about their connection pools again")
        self._problem, self._asked = "", time.time()
        self._replies.update(told)
        self._answered = frozenset(told)

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._running = None

    def _adopt(self, workers: Any) -> None:
        # What Flower learned by itself of workers that have not answered us yet: a busy one may not for a while.
        for name, known in list(workers.items()):
            if name not in self._replies and known.get("stats") is not None:
                self._replies[name] = Reply.of(known.get("timestamp", 0.0), known["stats"])

    def _forget(self, alive: dict[str, bool], now: float, threshold: float | None) -> None:
        threshold = FORGOTTEN_AFTER if threshold is None else threshold
        for name in _overdue(self._replies.items(), alive, now - threshold):
            del self._replies[name]


def _overdue(replies: Iterable[tuple[str, Reply]], alive: dict[str, bool], since: float) -> list[str]:
    return [name for name, reply in replies if reply.received < since and not alive.get(name)]


def _replies(app: Any, timeout: float, *, expected: int) -> dict[str, Reply]:
    """Ask every worker, and read what it answers; runs in a thread, since both take their time."""
    told = _stats(app, timeout, expected=expected)
    now = time.time()
    return {name: Reply.of(now, stats) for name, stats in told.items()}


def _stats(app: Any, timeout: float, *, expected: int) -> dict[str, Any]:
    """Return what every worker answers.

    It is ``stats`` and not ``pools`` that is asked: a worker without a WorkerPools does not know the latter, and would
    log an error each time.

    Args:
        app: The Celery app.
        timeout: How long workers have for their answer, in seconds.
        expected: How many answers are enough to stop waiting; 0 if that is not known.
    """
    begun = time.monotonic()
    with app.connection_or_acquire() as connection:
        # Left to itself a connection is tried again and again.
        connection.ensure_connection(max_retries=1, timeout=timeout)
        ask = partial(app.control.inspect, timeout=timeout, connection=connection)
        told = ask(limit=expected or None).stats() or {}
        if len(told) < expected and time.monotonic() - begun < timeout:
            # The limit counts late answers to earlier questions, too.
            told.update(ask().stats() or {})
        return told
