"""State shared by the resources of one WorkerPools."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

from workerpools._run.budget import CAPACITY, Budget
from workerpools._run.events import Listeners
from workerpools._stats.collector import Collector
from workerpools._stats.leaks import LeakDetector
from workerpools._stats.memory import Recycles
from workerpools.errors import ConfigurationError

__all__ = ["CLOSE_TIMEOUT", "UNKNOWN", "ExecutionPool", "Shared"]

#: The time for closing, in seconds, including the wait for work in flight.
CLOSE_TIMEOUT = 5.0


class ExecutionPool(NamedTuple):
    """The worker's execution pool as this process sees it.

    Attributes:
        kind: ``prefork``, ``solo``, ``threads``, ``gevent``, ``eventlet``, or an empty string outside a worker.
        concurrency: The number of concurrent tasks in this process; None if unknown.
        processes: The most processes of the worker that run tasks.
    """

    kind: str = ""
    concurrency: int | None = None
    processes: int = 1


UNKNOWN = ExecutionPool()


class Shared:
    """State shared by the resources of one WorkerPools: names, listeners, budget, statistics, settings.

    Args:
        setting: Returns the value of a setting by its name without prefix; None if it is not set.
        execution_pool: Returns the execution pool of this process.
    """

    def __init__(self, setting: Callable[[str], Any], execution_pool: Callable[[], ExecutionPool]) -> None:
        self._setting = setting
        self._execution_pool = execution_pool
        self._budget: Budget | None = None
        #: All resources, and the named ones by name.
        self.resources: list[Any] = []
        self.names: dict[str, Any] = {}
        self.listeners = Listeners()
        self.recycles = Recycles()
        self.leaks = LeakDetector()
        #: Raised on every opening of a resource, if set.
        self.failure: Exception | None = None
        self.collector = Collector(
            self.listeners,
            self.recycles,
            resources=lambda: [resource._holder for resource in self.by_name()],
            budget=lambda: self.budget,
            worker=self._worker,
        )

    def _worker(self) -> tuple[str, int, tuple[tuple[str, int], ...]]:
        found = self.execution_pool
        ceilings = ((each.name, each.capacity(found)) for each in self.by_name())
        concurrency = found.processes * (found.concurrency or 0)
        return found.kind, concurrency, tuple((name, most) for name, most in ceilings if most is not None)

    def by_name(self) -> list[Any]:
        """Return the resources, sorted by name."""
        return sorted(self.resources, key=lambda resource: resource.name)

    @property
    def execution_pool(self) -> ExecutionPool:
        """The execution pool of this process."""
        return self._execution_pool()

    @property
    def budget(self) -> Budget:
        """This process's budget for replays."""
        if self._budget is None:
            # Created late: settings are unknown when resources are declared.
            capacity = self._setting("retry_budget")
            self._budget = Budget(CAPACITY if capacity is None else capacity)
        return self._budget

    @property
    def leak_after(self) -> float | None:
        """The time after which a connection in use is reported, in seconds; None for never."""
        found: float | None = self._setting("leak_after")
        return found

    @property
    def close_timeout(self) -> float:
        """The time for closing, in seconds."""
        # Invalid settings were reported at start-up; open values have to be closed all the same.
        with contextlib.suppress(ConfigurationError):
            found: float | None = self._setting("close_timeout")
            if found is not None:
                return found
        return CLOSE_TIMEOUT
