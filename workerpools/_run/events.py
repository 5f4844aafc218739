"""Events: frozen data for listeners, with one structured log line per event."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from workerpools._text import redact_text

__all__ = ["ALERTS", "CONNECTIONS", "LEAKS", "PREFIX", "REPLAY", "Event", "EventKind", "Listener", "Listeners", "write"]

#: Values and connections opened, closed, recycled and discarded.
CONNECTIONS = "workerpools.connections"
#: Replays, retries, refusals and resolved commits.
REPLAY = "workerpools.replay"
#: Connections held for too long, or beyond their attempt.
LEAKS = "workerpools.leaks"
#: Alerts raised and cleared.
ALERTS = "workerpools.alerts"

#: The prefix of a log record's extra attributes, which prevents clashes with those of logging and other libraries.
PREFIX = "workerpools_"


def write(name: str, level: int, event: str, fields: Mapping[str, object], text: str = "", stack: str = "") -> None:
    """Write one log line.

    Args:
        name: The logger's name.
        level: The logging level.
        event: The event's name, which begins the line.
        fields: The event's fields, in order. Passwords in URLs are hidden.
        text: Free text after the fields.
        stack: A stack to log, as ``stack_info``.
    """
    logger = logging.getLogger(name)
    if not logger.isEnabledFor(level):
        return
    shown = {key: redact_text(value) if isinstance(value, str) else value for key, value in fields.items()}
    # Lines of the same event share a template: log aggregators group by it.
    template = " ".join([event, *(f"{key}=%s" for key in shown), *(["%s"] if text else [])])
    arguments = (*shown.values(), *([redact_text(text)] if text else []))
    extra = {f"{PREFIX}{key}": value for key, value in (("event", event), *shown.items())}
    # Not log(): it accepts no stack other than the caller's.
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
    """One event.

    Attributes:
        kind: The kind of event.
        resource: The resource's name.
        detail: A short phrase without secrets, such as the task and the kind of error of a replay.
        pid: The process id.
        fields: The contents of ``detail`` by name: ``task``, ``error``, ``kind``, ``reason``, …; and, if known,
            ``stack``, the stack at which a connection was acquired.
    """

    kind: EventKind
    resource: str
    detail: str = ""
    pid: int = field(default_factory=os.getpid)
    fields: Mapping[str, object] = field(default_factory=dict[str, object], hash=False)


class Listener(Protocol):
    """A callable that accepts an event."""

    def __call__(self, event: Event, /) -> object:
        """Handle ``event``. Runs synchronously, usually in the task's thread: keep it short.

        Args:
            event: The event.

        Raises:
            Exception: Logged, and never raised into the task.
        """


class Listeners:
    """Logs every event and passes it to the subscribed listeners."""

    def __init__(self) -> None:
        #: The listeners, by kind of event.
        self.audience: dict[EventKind, tuple[Listener, ...]] = dict.fromkeys(EventKind, ())

    def add(self, listener: Listener, kinds: Iterable[EventKind] = EventKind) -> None:
        """Subscribe ``listener`` to all later events of these kinds.

        Args:
            listener: Called with each event.
            kinds: The kinds of events; all by default.
        """
        for kind in kinds:
            self.audience[kind] = (*self.audience[kind], listener)

    def emit(self, kind: EventKind, resource: str, detail: str = "", /, **fields: object) -> None:
        """Log an event and pass it to the listeners. A listener's error is logged, never raised into the task.

        Args:
            kind: The kind of event.
            resource: The resource's name.
            detail: Free text after the fields.
            fields: The event's fields, without secrets; ``stack`` is the stack at which a connection was acquired.
        """
        level, name = _LINES.get(kind, _DEFAULT)
        audience = self.audience[kind]
        if not audience and not logging.getLogger(name).isEnabledFor(level):
            return
        pid, stack = os.getpid(), str(fields.pop("stack", ""))
        write(name, level, kind.value, {"resource": resource, "pid": pid, **fields}, detail, stack)
        if not audience:
            return
        words = " ".join([*(f"{key}={value}" for key, value in fields.items()), *([detail] if detail else [])])
        event = Event(kind, resource, words, pid, {**fields, "stack": stack} if stack else fields)
        for listener in audience:
            try:
                listener(event)
            except Exception:
                logger.exception("the listener %r failed on %s", listener, kind.value)
