"""What an attempt has left in use: told, and given back. Loaded by the first one that leaves something."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from workerpools._core.events import EventKind
from workerpools._core.logs import LEAKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workerpools._core.meter import Use
    from workerpools._core.resource import Resource

__all__ = ["give_back"]


def give_back(resource: Resource[Any], left: Sequence[Use], task: str) -> BaseException | None:
    """Give back what an attempt has left in use, and log each.

    Args:
        resource: Whose connections they are.
        left: The uses, as :meth:`workerpools._core.meter.Meter.attempt_ended` returned them.
        task: The task's name.

    Returns:
        What interrupted the process meanwhile, if anything did. Nothing else is raised: the attempt's outcome is
        decided already.
    """
    interruption: BaseException | None = None
    for use in left:
        returned, stack = False, use.stack
        try:
            returned = resource.meter.reclaim is not None and resource.meter.reclaim(use.holder)
        except BaseException as error:
            logging.getLogger(LEAKS).debug("a connection of %r was not given back", resource, exc_info=error)
            if not isinstance(error, Exception):
                interruption = error
        resource.registry.listeners.emit(
            EventKind.CONNECTION_LEAKED,
            resource.name,
            stack="" if stack is None else str(stack),
            task=task,
            held=round(time.monotonic() - use.since, 3),
            returned=str(returned).lower(),
            at="(unknown: set workerpools_leak_after)" if stack is None else stack.at,
        )
    resource.meter.publish()
    return interruption
