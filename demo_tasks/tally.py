"""How the demo counts what its worker does: each child adds to a hash in Redis, which the command reads at the end.

Counting in Redis works across machines and containers, and costs a task one round trip. A count that cannot be written
is lost: a task never fails or waits long because of it.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

import redis
from celery import signals
from redis.backoff import NoBackoff
from redis.retry import Retry

from demo_tasks.settings import Settings
from workerpools import Resource, WorkerPools
from workerpools.events import Event, EventKind

__all__ = ["ASKED", "COUNTED", "Child", "Tally", "connect"]

logger = logging.getLogger(__name__)

#: The events that the report tells of, and the name it has for each.
COUNTED = {
    EventKind.ATTEMPT_REPLAYED: "replayed",
    EventKind.REQUEST_REPLAYED: "requests_replayed",
    EventKind.COMMIT_RESOLVED: "commits_resolved",
    EventKind.REPLAY_REFUSED: "replays_refused",
}

#: The report's name for the connections that were opened to ask what became of a lost COMMIT.
ASKED = "connections_that_asked"

# How long nothing is counted after Redis has failed, in seconds: a server that is down must not slow every task.
PAUSE = 5.0


def connect(url: str) -> redis.Redis:
    """Return a client for the counts, with short waits and no retries; it connects on first use.

    Args:
        url: The Redis server.
    """
    return redis.Redis.from_url(
        url,
        socket_timeout=1.0,
        socket_connect_timeout=1.0,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
    )


@dataclass
class Child:
    """What one process of a worker has done.

    Attributes:
        runs: How often it was given a task, by the task's name; a task that was retried counts again.
        opened: The connections it opened for tasks, by resource.
        counts: What happened how often, by the name that the report has for it (:data:`COUNTED`, :data:`ASKED`).
    """

    runs: Counter[str] = field(default_factory=lambda: Counter[str]())
    opened: Counter[str] = field(default_factory=lambda: Counter[str]())
    counts: Counter[str] = field(default_factory=lambda: Counter[str]())

    def since(self, before: Child) -> Child:
        """Return what was done after ``before`` was read."""
        return Child(
            self.runs - before.runs,
            self.opened - before.opened,
            self.counts - before.counts,
        )


class Tally:
    """The counts of all workers that use one Redis server and one prefix.

    Args:
        settings: Where Redis is, and the prefix of the key.
    """

    def __init__(self, settings: Settings) -> None:
        self._url = settings.redis_url
        self._key = f"{settings.key_prefix}shop-tally"
        self._client: Resource[redis.Redis] | None = None
        self._paused_until = 0.0
        # This process's name, by its id: a forked child has another.
        self._names: dict[int, str] = {}

    def watch(self, pools: WorkerPools) -> None:
        """Count the connections that the resources of ``pools`` open, and the tasks that this worker runs."""
        # A resource like any other, made from a function: one client a process, closed with the others.
        self._client = pools.add(lambda: connect(self._url), name="tally")
        pools.subscribe(self._noticed)
        signals.task_prerun.connect(self._starts, weak=False, dispatch_uid="shop-tally-starts")
        signals.task_retry.connect(self._retries, weak=False, dispatch_uid="shop-tally-retries")

    def read(self) -> dict[str, Child]:
        """Return what was counted so far, by child: its host, the time of its first count and its process id.

        In a container that is started again, processes have the ids of earlier ones.

        Raises:
            redis.RedisError: Redis does not answer.
        """
        client = connect(self._url)
        try:
            counts = cast("dict[str, str]", client.hgetall(self._key))
        finally:
            client.close()
        children: dict[str, Child] = {}
        for name, value in counts.items():
            process, what, detail = name.split(" ")
            child = children.setdefault(process, Child())
            if what == "runs":
                child.runs[detail] += int(value)
            elif what == "opened":
                child.opened[detail] += int(value)
            else:
                child.counts[what] += int(value)
        return children

    def _noticed(self, event: Event) -> None:
        if event.kind is EventKind.CONNECTION_OPENED:
            # One that was made to ask what became of a COMMIT is none that tasks use; nothing else has a detail.
            self._count(ASKED if event.detail else "opened", event.resource)
        elif event.kind in COUNTED:
            self._count(COUNTED[event.kind], event.resource)

    def _starts(self, sender: Any = None, **_: Any) -> None:
        self._count("runs", _short(sender))

    def _retries(self, sender: Any = None, **_: Any) -> None:
        self._count("retried", _short(sender))

    def _count(self, what: str, detail: str) -> None:
        if self._client is None or time.monotonic() < self._paused_until:
            return
        try:
            self._client.get().hincrby(self._key, f"{self._name()} {what} {detail}", 1)
        except redis.RedisError as error:
            self._paused_until = time.monotonic() + PAUSE
            logger.warning("nothing is counted for %.0f s: %s", PAUSE, error)

    def _name(self) -> str:
        pid, now = os.getpid(), time.time()
        since = f"{time.strftime('%H:%M:%S', time.localtime(now))}.{now % 1 * 1e6:06.0f}"
        # In one step: threads may ask at once.
        return self._names.setdefault(pid, f"{socket.gethostname()}/{since}/{pid}")


def _short(task: Any) -> str:
    return str(getattr(task, "name", task)).rpartition(".")[2]
