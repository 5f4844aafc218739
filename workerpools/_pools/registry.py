"""The resources that were declared together, and what they have in common."""

from __future__ import annotations

import logging
import time
from typing import Any

from workerpools._pools.adapter import Opening
from workerpools._pools.execution import UNKNOWN, ExecutionPool
from workerpools._pools.resource import Resource
from workerpools._process.bounded import remaining, run_bounded
from workerpools._process.descriptors import Descriptors
from workerpools._run import attempts
from workerpools._run.budget import CAPACITY, Budget
from workerpools._run.events import Listeners
from workerpools._run.failure import Failure
from workerpools._stats.alerts import AlertListener
from workerpools._stats.collector import Collector
from workerpools._stats.leaks import HeldTooLong
from workerpools._stats.meter import Meter
from workerpools._stats.shared import Recycles
from workerpools.errors import ConfigurationError

__all__ = ["Registry"]

logger = logging.getLogger("workerpools")


CLOSE_TIMEOUT = 5.0


class Registry:
    """A set of resources with names of their own, closed together."""

    def __init__(self) -> None:
        attempts.protect()
        self.listeners = Listeners()
        self._budget: Budget | None = None
        self._resources: list[Resource[Any]] = []
        self._names: dict[str, Resource[Any]] = {}
        #: What this process is told of connections that are to be replaced.
        self.recycles = Recycles()
        self.collector = Collector(self)
        self.held = HeldTooLong()
        #: Who is called when an alert is raised or cleared.
        self.alert_listeners: tuple[AlertListener, ...] = ()

    @property
    def leak_after(self) -> float | None:
        """For how long a connection may be in use, in seconds, before that is logged; None for any time."""
        return None

    @property
    def close_timeout(self) -> float:
        """How long closing may take, in seconds; work in flight is waited for within it."""
        return CLOSE_TIMEOUT

    @property
    def budget_capacity(self) -> int:
        """How many tokens the budget for replays has."""
        return CAPACITY

    @property
    def budget(self) -> Budget:
        """What this process may spend on replays."""
        if self._budget is None:
            # Made late: the settings are not known when a registry is made.
            self._budget = Budget(self.budget_capacity)
        return self._budget

    @property
    def execution_pool(self) -> ExecutionPool:
        """What runs the tasks of this process."""
        return UNKNOWN

    @property
    def resources(self) -> list[Resource[Any]]:
        """The declared resources, by name."""
        return sorted(self._resources, key=lambda resource: resource.name)

    def opening(self, name: str, descriptors: Descriptors, meter: Meter) -> Opening:
        """Return what an adapter is told when it opens the resource ``name``."""
        return Opening(name, self.execution_pool, descriptors, self.listeners, self.budget, meter)

    def enrol(self, resource: Resource[Any], name: str | None) -> None:
        """Take in a new resource.

        Raises:
            ConfigurationError: Another resource of this registry has the name.
        """
        if name is not None:
            if name in self._names:
                raise ConfigurationError(
                    f"two resources are named {name!r} in one WorkerPools: {self._names[name]!r} and {resource!r}; "
                    "give one another name: pools.add(…, name='…')"
                )
            self._names[name] = resource
        self._resources.append(resource)

    def find(self, name: str) -> Resource[Any] | None:
        """Return the resource of that name, if there is one."""
        return self._names.get(name)

    def recycle(self, name: str | None = None) -> list[str]:
        """Have connections replaced that are open now: each process does it when it uses the resource next.

        What is in flight ends undisturbed on the connection that it has. In the main process of a worker this reaches
        its children, too; elsewhere it is about this process alone.

        Args:
            name: The resource; every one if None.

        Returns:
            The names of the resources that will do it.

        Raises:
            ConfigurationError: No resource has that name.
        """
        names = self.collector.names()
        if name is not None and name not in names:
            known = ", ".join(names) or "there are none"
            raise ConfigurationError(f"no resource is named {name!r}; the resources: {known}")
        self.collector.recycle([] if name is None else [name])
        return names if name is None else [name]

    def failed(self, failure: Failure) -> None:
        """Count a failure of the resource that it names."""
        resource = self.find(failure.resource)
        if resource is not None:
            resource.meter.failed(failure.kind)

    def has(self, name: str) -> bool:
        """Return whether a resource has this name."""
        return name in self._names

    def adopt(self, resource: Resource[Any]) -> None:
        """Note the name that a resource took from its attribute. The first owner of a name keeps it."""
        self._names.setdefault(resource.name, resource)

    def check_name(self, resource: Resource[Any], where: str) -> None:
        """Refuse a resource whose attribute name another resource has already.

        Args:
            resource: The resource.
            where: The attribute, for the message.

        Raises:
            ConfigurationError: See above.
        """
        other = self._names.get(resource.name)
        if other is not None and other is not resource:
            self._resources.remove(resource)
            raise ConfigurationError(
                f"{where}: another resource of the same WorkerPools is named {resource.name!r} ({other!r}); "
                "use that one here, or name this one: pools.add(…, name='…')"
            )

    def prepare(self) -> None:
        """Build what the resources can build before a fork. A failure is logged; opening raises it in the task."""
        for resource in self.resources:
            try:
                resource.adapter.prepare()
            except Exception:
                logger.exception("could not prepare %r; its tasks will fail with this error", resource)

    def close(self, timeout: float | None = None) -> None:
        """Close every value that this process has open; the next use opens another.

        First waits for the attempts of other threads that use these resources. A close that hangs or fails is logged,
        and the others are closed all the same.

        Args:
            timeout: The bound for all of it, in seconds; ``close_timeout`` if None.
        """
        deadline = time.monotonic() + (self.close_timeout if timeout is None else timeout)
        resources = [resource for resource in self.resources if resource.is_open]
        if resources:
            attempts.wait_for_others(self, remaining(deadline))
        for resource in resources:
            _bounded(resource, deadline)


def _bounded(resource: Resource[Any], deadline: float) -> None:
    def close() -> None:
        try:
            resource.close(remaining(deadline))
        except Exception:
            logger.exception("could not close %r", resource)

    # Even without time left a healthy close gets the moment it needs.
    if not run_bounded(close, max(remaining(deadline), 0.25)):
        logger.warning("closing %r did not end in time; its connections end with the process", resource)
