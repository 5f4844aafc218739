"""Events: frozen data for listeners, and one structured log line each."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from workerpools._text import redact_text

__all__ = ["ALERTS", "CONNECTIONS", "LEAKS", "PREFIX", "REPLAY", "Event", "EventKind", "Listener", "Listeners", "write"]

#: What happens to values and connections.
CONNECTIONS = "workerpools.connections"
#: What was run again, put back, refused or resolved.
REPLAY = "workerpools.replay"
#: Connections that are held for too long, or beyond their attempt.
LEAKS = "workerpools.leaks"
#: Alerts that are raised and cleared.
ALERTS = "workerpools.alerts"

#: What the names of a record's own attributes begin with: without it they could hide those of logging or of others.
PREFIX = "workerpools_"


def write(name: str, level: int, event: str, fields: Mapping[str, object], text: str = "", stack: str = "") -> None:
    """Write one line.

    Args:
        name: The logger's name.
        level: The level.
        event: What happened; the line begins with it.
        fields: What is to be known of it, in this order. Passwords in URLs are hidden.
        text: Words for people, after the fields.
        stack: Where something was begun; shown as logging shows a ``stack_info``.
    """
    logger = logging.getLogger(name)
    if not logger.isEnabledFor(level):
        return
    shown = {key: redact_text(value) if isinstance(value, str) else value for key, value in fields.items()}
    # The template is the same for every line of an event: what groups lines groups them by it.
    template = " ".join([event, *(f"{key}=%s" for key in shown), *(["%s"] if text else [])])
    arguments = (*shown.values(), *([redact_text(text)] if text else []))
    extra = {f"{PREFIX}{key}": value for key, value in (("event", event), *shown.items())}
    # Not by log(): only so can a stack be told that is not the caller's.
    file, line, function, _ = logger.findCaller()
    record = logger.makeRecord(
        name, level, file, line, template, arguments, None, function, extra, redact_text(stack) or None
    )
    logger.handle(record)


logger = logging.getLogger("workerpools")


class EventKind(str, Enum):
    """The kinds of events; the values are stable."""

    VALUE_OPENED = "value_opened"
    VALUE_CLOSED = "value_closed"
    VALUE_DISCARDED = "value_discarded"
    VALUE_RECYCLED = "value_recycled"
    CONNECTION_OPENED = "connection_opened"
    CONNECTION_CLOSED = "connection_closed"
    CONNECTION_REPLACED = "connection_replaced"
    CONNECTION_HELD = "connection_held"
    CONNECTION_LEAKED = "connection_leaked"
    ATTEMPT_REPLAYED = "attempt_replayed"
    REQUEST_REPLAYED = "request_replayed"
    COMMIT_RESOLVED = "commit_resolved"
    TASK_RETRIED = "task_retried"
    REPLAY_REFUSED = "replay_refused"


class _Line(NamedTuple):
    level: int = logging.INFO
    logger: str = CONNECTIONS


_LINES = {
    EventKind.CONNECTION_OPENED: _Line(logging.DEBUG),
    EventKind.CONNECTION_CLOSED: _Line(logging.DEBUG),
    EventKind.CONNECTION_HELD: _Line(logging.WARNING, LEAKS),
    EventKind.CONNECTION_LEAKED: _Line(logging.WARNING, LEAKS),
    EventKind.ATTEMPT_REPLAYED: _Line(logging.WARNING, REPLAY),
    EventKind.REQUEST_REPLAYED: _Line(logging.WARNING, REPLAY),
    EventKind.COMMIT_RESOLVED: _Line(logging.WARNING, REPLAY),
    EventKind.TASK_RETRIED: _Line(logging.WARNING, REPLAY),
    EventKind.REPLAY_REFUSED: _Line(logging.WARNING, REPLAY),
}
_DEFAULT = _Line()


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: What happened.
        resource: The resource's name.
        detail: One short phrase more, without secrets: the task and the kind of error of a replay.
        pid: The process it happened in.
        fields: What ``detail`` tells, by name: ``task``, ``error``, ``kind``, ``reason``, …; and ``stack``, where a
            connection was acquired, if that is known.
    """

    kind: EventKind
    resource: str
    detail: str = ""
    pid: int = field(default_factory=os.getpid)
    fields: Mapping[str, object] = field(default_factory=dict[str, object], hash=False)


class Listener(Protocol):
    """Anything that can be called with an event."""

    def __call__(self, event: Event, /) -> object:
        """Take note of ``event``. Runs where the event happened, in the task's thread: keep it short."""


class Listeners:
    """Writes every event to the log and hands it to whoever asked for it."""

    def __init__(self) -> None:
        #: By the kind of event.
        self.audience: dict[EventKind, tuple[Listener, ...]] = dict.fromkeys(EventKind, ())

    def add(self, listener: Listener, kinds: Iterable[EventKind] = EventKind) -> None:
        """Call ``listener`` with every event of these kinds from now on."""
        for kind in kinds:
            self.audience[kind] = (*self.audience[kind], listener)

    def emit(self, kind: EventKind, resource: str, detail: str = "", /, **fields: object) -> None:
        """Log the event and pass it on; a listener that fails is logged, never raised into the task.

        Args:
            kind: What happened.
            resource: The resource's name.
            detail: Words for people, after the fields.
            fields: What else is to be known, without secrets; ``stack`` tells where the connection was acquired.
        """
        level, name = _LINES.get(kind, _DEFAULT)
        audience = self.audience[kind]
        if not audience and not logging.getLogger(name).isEnabledFor(level):
            return
        pid, stack = os.getpid(), str(fields.pop("stack", ""))
        write(name, level, kind.value, {"resource": resource, "pid": pid, **fields}, detail, stack)
        if not audience:
            return
        told = " ".join([*(f"{key}={value}" for key, value in fields.items()), *([detail] if detail else [])])
        event = Event(kind, resource, told, pid, {**fields, "stack": stack} if stack else fields)
        for listener in audience:
            try:
                listener(event)
            except Exception:
                logger.exception("the listener %r failed on %s", listener, kind.value)
