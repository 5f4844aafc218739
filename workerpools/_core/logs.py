"""One structured line for each notable event: ``event key=value …``, with the same fields on the record.

Loggers are told apart by what they speak of, all of them below ``workerpools``. The keys of a line are attributes of
its record, too, with the prefix ``workerpools_``, for formatters that write JSON.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from workerpools._core.redact import redact_text

__all__ = ["ALERTS", "CONNECTIONS", "LEAKS", "PREFIX", "REPLAY", "write"]

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
