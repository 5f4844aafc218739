"""The Pools page: its handlers, the query to the workers, and the document built from their replies.

Workers are queried only while the page is open, and no faster than they reply.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from http.client import responses
from pathlib import Path
from typing import Any

from flower.api import BaseApiHandler
from flower.utils import strtobool
from flower.views import BaseHandler
from flower.views.monitor import Metrics
from tornado import template, web

from workerpools._stats.metrics import DEFINITIONS
from workerpools._stats.snapshot import WorkerStats
from workerpools.flower._servers import Servers
from workerpools.flower._templates import PREFIX

__all__ = [
    "FORGOTTEN_AFTER",
    "LEAST_INTERVAL",
    "STATIC",
    "UNHEARD_AFTER",
    "VERSION",
    "Assets",
    "PoolsData",
    "PoolsMetrics",
    "PoolsView",
    "Reply",
    "Source",
    "Status",
    "document",
    "status",
]

logger = logging.getLogger("workerpools.flower")

#: The version of the document. Readers ignore unknown fields.
VERSION = 1

#: The key in the reply of ``celery inspect stats``; see :mod:`workerpools._celery.worker`.
_KEY = "workerpools"

#: Time without a reply after which a worker that sends no events counts as offline, in seconds.
UNHEARD_AFTER = 60.0


class Status(str, Enum):
    """The state of a worker, as far as Flower can tell."""

    #: It replied to the last query.
    ONLINE = "online"
    #: It seems alive but did not reply: a worker cannot while it runs a task in its main process.
    SILENT = "silent"
    #: It signed off, or has been silent for too long.
    OFFLINE = "offline"


@dataclass(frozen=True)
class Reply:
    """A worker's reply to ``celery inspect stats``.

    Attributes:
        received: The time of the reply, in seconds since the epoch.
        has_pools: Whether the worker has a WorkerPools.
        snapshots: Its snapshots; None if they cannot be parsed.
        shown: The snapshots as in the document, with totals.
    """

    received: float
    has_pools: bool = False
    snapshots: tuple[WorkerStats, ...] | None = ()
    shown: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, received: float, stats: Any) -> Reply:
        """Parse a reply; takes about 20 µs per resource and process.

        Args:
            received: The time of the reply, in seconds since the epoch.
            stats: The reply.
        """
        pools = stats.get(_KEY) if isinstance(stats, dict) else None
        if pools is None:
            return cls(received)
        snapshots = _snapshots(pools)
        return cls(received, True, snapshots, tuple(map(_with_totals, snapshots or ())))


def status(*, answered: bool, alive: bool | None, age: float | None, reachable: bool) -> Status:
    """Return the state of a worker.

    Args:
        answered: Whether it replied to the last query.
        alive: Whether it is alive according to its events; None without events.
        age: The age of its last reply, in seconds; None without one.
        reachable: Whether the broker can be reached.
    """
    if answered:
        return Status.ONLINE
    if not reachable or alive:
        return Status.SILENT
    # Without events, one unanswered query means little.
    recent = age is not None and age < UNHEARD_AFTER
    return Status.SILENT if alive is None and recent else Status.OFFLINE


def document(
    replies: Mapping[str, Reply],
    *,
    answered: Collection[str],
    alive: Mapping[str, bool],
    asked: float | None,
    now: float,
    problem: str = "",
) -> dict[str, Any]:
    """Return the page's document.

    Args:
        replies: The last reply of each worker, by worker name.
        answered: The workers that replied to the last query.
        alive: Whether each worker that sends events is alive according to them.
        asked: The time of the last query, in seconds since the epoch; None before the first.
        now: The current time, in seconds since the epoch.
        problem: The reason that the workers cannot be queried; empty if they can.
    """
    workers, without = [], []
    # A living worker is listed even before its first reply; one that is gone is not.
    for name in sorted(replies.keys() | {name for name, lives in alive.items() if lives}):
        reply = replies.get(name)
        age = None if reply is None else max(0.0, now - reply.received)
        state = status(answered=name in answered, alive=alive.get(name), age=age, reachable=not problem)
        if reply is not None and not reply.has_pools:
            if state is not Status.OFFLINE:
                without.append(name)
            continue
        workers.append(
            {
                "name": name,
                "status": state.value,
                "age": None if age is None else round(age, 3),
                "readable": reply is None or reply.snapshots is not None,
                "snapshots": () if reply is None else reply.shown,
            }
        )
    return {
        "version": VERSION,
        "now": round(now, 3),
        "asked": None if asked is None else round(asked, 3),
        "problem": problem,
        "workers": workers,
        "without": without,
    }


def _snapshots(pools: Any) -> tuple[WorkerStats, ...] | None:
    # From the network, and of any version.
    try:
        found = pools["snapshots"]
        if not isinstance(found, Sequence) or isinstance(found, str):
            return None
        return tuple(WorkerStats.from_dict(each) for each in found)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None


def _with_totals(stats: WorkerStats) -> dict[str, Any]:
    return {**stats.to_dict(), "totals": [each.to_dict() for each in stats.totals()]}


#: The minimum time between two queries to the workers, in seconds, however many pages are open.
LEAST_INTERVAL = 2.0

#: How long an offline worker is shown, in seconds, unless Flower's purge_offline_workers is set.
FORGOTTEN_AFTER = 3600.0

#: How long a request waits beyond the inspect timeout, in seconds.
_SLACK = 1.0
#: How long beyond the inspect timeout, in seconds, the page reports a problem: Flower's threads may be busy.
_PATIENCE = 5.0

_UNREACHABLE = "Flower cannot reach the broker, so the workers cannot be queried."
_STUCK = "The broker does not respond to Flower, so the workers cannot be queried."


class Source:
    """The last replies of a Flower's workers. Belongs to the IOLoop's thread and never blocks it.

    Flower itself queries all workers when it starts, and one when its page is opened: too rarely for the Pools page.
    """

    def __init__(self) -> None:
        self._replies: dict[str, Reply] = {}
        self._answered: frozenset[str] = frozenset()
        self._alive: dict[str, bool] = {}
        self._asked: float | None = None
        self._problem = ""
        self._running: asyncio.Task[None] | None = None
        self._started = float("-inf")
        #: How long after the last query its replies are still exported, in seconds.
        self.kept = UNHEARD_AFTER

    async def refresh(self, flower: Any, interval: float = LEAST_INTERVAL) -> str:
        """Query the workers, unless that was done a moment ago.

        Args:
            flower: Flower's application.
            interval: The minimum time since the last query began, in seconds.

        Returns:
            The reason that the workers cannot be queried; empty if they can.
        """
        timeout = flower.options.inspect_timeout / 1000.0
        if self._running is None and time.monotonic() - self._started >= max(interval, LEAST_INTERVAL):
            self._started = time.monotonic()
            self._running = asyncio.ensure_future(self._ask(flower, timeout))
            self._running.add_done_callback(self._ended)
        if self._running is not None:
            # A query continues after the request gives up on it; the next request finds its replies.
            await asyncio.wait({self._running}, timeout=timeout + _SLACK)
        stuck = self._running is not None and time.monotonic() - self._started > timeout + _PATIENCE
        self._alive = {name: bool(worker.alive) for name, worker in flower.events.state.workers.items()}
        self._adopt(flower.workers)
        self._forget(self._alive, time.time(), flower.options.purge_offline_workers)
        return _STUCK if stuck else self._problem

    async def document(self, flower: Any) -> dict[str, Any]:
        """Return the page's document, from replies at most a few seconds old."""
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
        """Return the last snapshots of each worker that is not offline, by worker name."""
        now, found = time.time(), {}
        for name, reply in self._replies.items():
            if self._asked is not None and now - self._asked > self.kept:
                # Nobody has looked for a while: old numbers would pass for current ones.
                continue
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
            replies = await asyncio.get_running_loop().run_in_executor(None, ask)
        except Exception as error:
            if not self._problem:
                # The class only: the message may contain the broker's URL.
                logger.warning("cannot query the workers for their connection pools: %s", type(error).__name__)
            self._problem = _UNREACHABLE
            self._answered = frozenset()
            return
        if self._problem:
            logger.info("the workers can be queried for their connection pools again")
        self._problem, self._asked = "", time.time()
        self._replies.update(replies)
        self._answered = frozenset(replies)

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._running = None

    def _adopt(self, workers: Any) -> None:
        # Flower may have an earlier reply from a worker that is too busy to reply to us.
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
    """Query every worker and parse the replies; called in a thread, since both take time."""
    found = _stats(app, timeout, expected=expected)
    now = time.time()
    return {name: Reply.of(now, stats) for name, stats in found.items()}


def _stats(app: Any, timeout: float, *, expected: int) -> dict[str, Any]:
    """Return the replies to ``celery inspect stats``, by worker.

    Not to ``pools``: a worker without a WorkerPools does not know that command and would log an error each time.

    Args:
        app: The Celery app.
        timeout: How long to wait for replies, in seconds.
        expected: The number of replies that ends the wait early; 0 if unknown.
    """
    with app.connection_or_acquire() as connection:
        try:
            return _asked(app, connection, timeout, expected)
        except connection.recoverable_connection_errors + connection.recoverable_channel_errors:
            # A pooled connection does not notice that the broker has restarted. Once more, on a new one.
            connection.close()
            return _asked(app, connection, timeout, expected)


def _asked(app: Any, connection: Any, timeout: float, expected: int) -> dict[str, Any]:
    begun = time.monotonic()
    # By default, kombu retries connecting for ever.
    connection.ensure_connection(max_retries=1, timeout=timeout)
    ask = partial(app.control.inspect, timeout=timeout, connection=connection)
    found = ask(limit=expected or None).stats() or {}
    if len(found) < expected and time.monotonic() - begun < timeout:
        # Late replies to earlier queries count towards the limit too.
        found.update(ask().stats() or {})
    return found


#: The directory of the page's scripts and styles.
STATIC = Path(__file__).parent / "static"

_PAGE, _PLAIN = f"{PREFIX}pools.html", f"{PREFIX}plain.html"

#: Marks the page's own content.
_MARK = b'id="workerpools"'


class PoolsView(BaseHandler):
    """The page, inside Flower's layout, or as plain HTML if that fails."""

    def initialize(self, loader: template.BaseLoader) -> None:
        self._loader = loader

    def get_template_path(self) -> str:
        # Tornado caches one loader per path: use another path than Flower's.
        return str(STATIC.parent)

    def create_template_loader(self, template_path: str) -> template.BaseLoader:
        return self._loader

    @web.authenticated
    def get(self) -> None:
        flower: Any = self.application
        values = {
            "meanings": {each.name: each.meaning for each in DEFINITIONS},
            "refreshes": flower.options.auto_refresh,
            "worker_url": self._worker_url(),
        }
        try:
            self.render(_PAGE, **values)
        except web.HTTPError:
            raise
        except Exception as error:
            _log_once(error)
            namespace = {**self.get_template_namespace(), **values}
            self.finish(self._loader.load(_PLAIN).generate(**namespace))

    def render_string(self, template_name: str, **kwargs: Any) -> bytes:
        text: bytes = super().render_string(template_name, **kwargs)
        if template_name == _PAGE and _MARK not in text:
            raise LookupError("base.html has no block named container")
        return text

    def _worker_url(self) -> str:
        # The URL for a worker named "0"; the script replaces the name.
        try:
            return str(self.reverse_url("worker", "0"))
        except KeyError:
            return ""


_logged: set[str] = set()


def _log_once(error: Exception) -> None:
    text = f"{type(error).__name__}: {error}"
    if text not in _logged:
        _logged.add(text)
        logger.warning("cannot use Flower's templates (%s); the Pools page is plain HTML", text)


class PoolsData(BaseApiHandler):
    """The page's document, as JSON; a POST asks the servers for their limits. Open to whom Flower's own API is open:
    without a login in Flower, to nobody unless FLOWER_UNAUTHENTICATED_API is set.
    """

    def initialize(self, source: Source, servers: Servers) -> None:
        self._source = source
        self._servers = servers

    async def get(self) -> None:
        self._authenticate()
        await self._answer()

    async def post(self) -> None:
        self._authenticate()
        # Flower's own check depends on its version, and on its having a login.
        if self.request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise web.HTTPError(403)
        await self._source.refresh(self.application)
        self._servers.ask(self.capp, self._source.snapshots())
        self.set_status(202)
        await self._answer()

    def _authenticate(self) -> None:
        # No redirect to the login page, which the script cannot use. With a wrong password, Flower raises this itself.
        if not self.current_user:
            raise web.HTTPError(401)

    async def _answer(self) -> None:
        self.set_header("Cache-Control", "no-store")
        self.finish({**await self._source.document(self.application), "servers": self._servers.document()})

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        flower: Any = self.application
        # Flower's errors are HTML or plain text.
        if status_code == 401 and flower.options.basic_auth:
            self.set_header("WWW-Authenticate", 'Basic realm="flower"')
        error = {"error": responses.get(status_code, "Unknown")}
        if status_code == 401 and not (flower.options.basic_auth or flower.options.auth):
            error["hint"] = _CLOSED
        self.finish(error)


_CLOSED = (
    "This Flower has no login, so its API is closed: "
    "start it with --basic_auth, or with FLOWER_UNAUTHENTICATED_API=true."
)


class PoolsMetrics(Metrics):
    """Flower's own series and ours. Without a login, like Flower's; but only someone with access to Flower's API has
    the workers queried.

    Anyone else gets the last replies, and has the workers queried at most once per ``interval``.
    """

    def initialize(self, source: Source, interval: float | None) -> None:
        self._source = source
        self._interval = interval

    async def get(self) -> None:
        if self._knows_password():
            await self._source.refresh(self.application)
        elif self._interval is not None:
            await self._source.refresh(self.application, self._interval)
        await super().get()

    def _knows_password(self) -> bool:
        flower: Any = self.application
        if not (flower.options.basic_auth or flower.options.auth):
            return bool(strtobool(os.environ.get("FLOWER_UNAUTHENTICATED_API") or "false"))
        try:
            return bool(self.current_user)
        except web.HTTPError:
            # A wrong password, or none.
            return False


class Assets(web.StaticFileHandler):
    """The page's scripts and styles. Without a login, like Flower's own."""

    def set_extra_headers(self, path: str) -> None:
        # They change with the installed version: browsers revalidate each time and download only after a change.
        self.set_header("Cache-Control", "no-cache")
        self.set_header("X-Content-Type-Options", "nosniff")
