"""What happened to a connection or an attempt, as frozen data for listeners."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

__all__ = ["Event", "EventKind", "Listener", "Listeners"]

logger = logging.getLogger("workerpools")


class EventKind(str, Enum):
    """The kinds of events; the values are stable."""

    VALUE_OPENED = "value_opened"
    VALUE_CLOSED = "value_closed"
    VALUE_DISCARDED = "value_discarded"
    VALUE_RECYCLED = "value_recycled"
    CONNECTION_OPENED = "connection_opened"
    CONNECTION_CLOSED = "connection_closed"
    ATTEMPT_REPLAYED = "attempt_replayed"
    REQUEST_REPLAYED = "request_replayed"
    COMMIT_RESOLVED = "commit_resolved"
    TASK_RETRIED = "task_retried"
    REPLAY_REFUSED = "replay_refused"


_LEVELS = {
    EventKind.CONNECTION_OPENED: logging.DEBUG,
    EventKind.CONNECTION_CLOSED: logging.DEBUG,
    EventKind.ATTEMPT_REPLAYED: logging.WARNING,
    EventKind.REQUEST_REPLAYED: logging.WARNING,
    EventKind.COMMIT_RESOLVED: logging.WARNING,
    EventKind.TASK_RETRIED: logging.WARNING,
    EventKind.REPLAY_REFUSED: logging.WARNING,
}


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: What happened.
        resource: The resource's name.
        detail: One short phrase more, without secrets: the task and the kind of error of a replay.
        pid: The process it happened in.
    """

    kind: EventKind
    resource: str
    detail: str = ""
    pid: int = field(default_factory=os.getpid)


class Listener(Protocol):
    """Anything that can be called with an event."""

    def __call__(self, event: Event, /) -> object:
        """Take note of ``event``. Runs where the event happened, in the task's thread: keep it short."""


class Listeners:
    """Writes every event to the log and hands it to whoever asked for it."""

    def __init__(self) -> None:
        self._listeners: tuple[Listener, ...] = ()

    def add(self, listener: Listener) -> None:
        """Call ``listener`` with every event from now on."""
        self._listeners = (*self._listeners, listener)

    def emit(self, kind: EventKind, resource: str, detail: str = "") -> None:
        """Log the event and pass it on; a listener that fails is logged, never raised into the task."""
        level = _LEVELS.get(kind, logging.INFO)
        if not self._listeners and not logger.isEnabledFor(level):
            return
        event = Event(kind, resource, detail)
        logger.log(level, "%s resource=%s pid=%d%s", kind.value, resource, event.pid, detail and f" {detail}")
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("the listener %r failed on %s", listener, kind.value)
