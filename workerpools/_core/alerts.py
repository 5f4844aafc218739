"""Alerts: what about a worker's connections wants a person's attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Alert", "AlertListener"]


@dataclass(frozen=True)
class Alert:
    """One thing that is wrong at this moment.

    Attributes:
        rule: The stable name of the rule that found it.
        resource: The resource it is about; empty where it is about a whole process.
        pid: The process it is about; None where it is about the worker.
        since: Since when it has been so, in seconds since the epoch.
        value: What was measured, in the rule's own unit.
        threshold: What it should not exceed.
        message: One sentence for people, without secrets.
    """

    rule: str
    resource: str = ""
    pid: int | None = None
    since: float = 0.0
    value: float = 0.0
    threshold: float = 0.0
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can carry."""
        return {
            "rule": self.rule,
            "resource": self.resource,
            "pid": self.pid,
            "since": round(self.since, 3),
            "value": round(self.value, 6),
            "threshold": round(self.threshold, 6),
            "message": self.message,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Alert:
        """Return what :meth:`to_dict` was called on."""
        pid = data.get("pid")
        return cls(
            rule=str(data.get("rule", "")),
            resource=str(data.get("resource", "")),
            pid=None if pid is None else int(pid),
            since=float(data.get("since", 0.0)),
            value=float(data.get("value", 0.0)),
            threshold=float(data.get("threshold", 0.0)),
            message=str(data.get("message", "")),
        )


class AlertListener(Protocol):
    """Anything that can be called with an alert."""

    def __call__(self, alert: Alert, raised: bool, /) -> object:
        """Take note of an alert that was raised or cleared.

        Runs in the worker's main process, where nothing else can go on meanwhile: keep it short, and hand what takes
        time to a task.
        """
