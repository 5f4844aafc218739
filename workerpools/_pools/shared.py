"""What the resources of one WorkerPools share."""

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

#: How long closing may take, in seconds; work in flight is waited for within it.
CLOSE_TIMEOUT = 5.0


class ExecutionPool(NamedTuple):
    """The worker's execution pool as this process sees it.

    Attributes:
        kind: ``prefork``, ``solo``, ``threads``, ``gevent``, ``eventlet``, or an empty string outside a worker.
        concurrency: Tasks that run in this process at a time; None when that is not known.
    """

    kind: str = ""
    concurrency: int | None = None


UNKNOWN = ExecutionPool()


class Shared:
    """What the resources of one WorkerPools share: names, listeners, budget, statistics, settings.

    Args:
        setting: Returns the value of a setting by its name without prefix; None where it is not set.
        execution_pool: Returns what runs the tasks of this process.
    """

    def __init__(self, setting: Callable[[str], Any], execution_pool: Callable[[], ExecutionPool]) -> None:
        self._setting = setting
        self._execution_pool = execution_pool
        self._budget: Budget | None = None
        #: The resources, and those with a name by it.
        self.resources: list[Any] = []
        self.names: dict[str, Any] = {}
        self.listeners = Listeners()
        self.recycles = Recycles()
        self.leaks = LeakDetector()
        #: Raised in every task that opens a resource.
        self.failure: Exception | None = None
        self.collector = Collector(
            self.listeners,
            self.recycles,
            resources=self.by_name,
            budget=lambda: self.budget,
            execution_pool=lambda: self.execution_pool.kind,
        )

    def by_name(self) -> list[Any]:
        """Return the resources, sorted by name."""
        return sorted(self.resources, key=lambda resource: resource.name)

    @property
    def execution_pool(self) -> ExecutionPool:
        """What runs the tasks of this process."""
        return self._execution_pool()

    @property
    def budget(self) -> Budget:
        """What this process may spend on replays."""
        if self._budget is None:
            # Made late: settings are not known yet when resources are declared.
            capacity = self._setting("retry_budget")
            self._budget = Budget(CAPACITY if capacity is None else capacity)
        return self._budget

    @property
    def leak_after(self) -> float | None:
        """Seconds after which a connection in use is reported; None for never."""
        found: float | None = self._setting("leak_after")
        return found

    @property
    def close_timeout(self) -> float:
        """How long closing may take, in seconds."""
        # Mistakes in the settings were reported when these were read first; what is open is to be closed all the same.
        with contextlib.suppress(ConfigurationError):
            found: float | None = self._setting("close_timeout")
            if found is not None:
                return found
        return CLOSE_TIMEOUT
