"""Asks running workers by way of their broker, as ``celery inspect`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
from kombu.exceptions import OperationalError

from workerpools._celery import apps
from workerpools._stats.snapshot import WorkerStats

__all__ = ["FAILED", "UNAVAILABLE", "Answers", "Failed", "Unavailable", "ask"]

#: A worker refused what was asked.
FAILED = 1
#: Nobody answered, or not everybody who was asked by name (sysexits.h: EX_UNAVAILABLE; ``celery inspect`` has it, too).
UNAVAILABLE = 69


class Failed(click.ClickException):
    """Ends the program with one sentence on standard error."""

    exit_code = FAILED


class Unavailable(Failed):
    """The same, where there was nobody to refuse anything."""

    exit_code = UNAVAILABLE


@dataclass(frozen=True)
class Answers:
    """What became of a question.

    Attributes:
        replies: What each worker has answered.
        missing: Who was asked by name and did not answer in time.
        nobody: What to say if nobody answered.
    """

    replies: Mapping[str, Any]
    missing: Sequence[str] = ()
    nobody: str = field(default="", repr=False)

    def refusals(self) -> dict[str, str]:
        """Return what each worker that could not answer has said instead."""
        return {
            worker: _refusal(reply)
            for worker, reply in sorted(self.replies.items())
            if isinstance(reply, Mapping) and "error" in reply
        }

    def snapshots(self) -> dict[str, list[WorkerStats]]:
        """Return the answers to ``pools``."""
        return {
            worker: [WorkerStats.from_dict(each) for each in reply]
            for worker, reply in self.replies.items()
            if isinstance(reply, Sequence) and not isinstance(reply, str)
        }

    def check(self) -> None:
        """Say what is wrong.

        Raises:
            Failed: A worker has refused.
            Unavailable: There is no answer from anybody, or from somebody who was asked by name.
        """
        refused = self.refusals()
        if refused:
            raise Failed("; ".join(f"{worker}: {said}" for worker, said in refused.items()))
        if not self.replies:
            raise Unavailable(self.nobody)
        if self.missing:
            raise Unavailable(f"no answer in time from {', '.join(self.missing)}")


def _refusal(reply: Mapping[str, Any]) -> str:
    known = reply.get("resources")
    return f"{reply['error']}; the resources: {', '.join(known)}" if known else str(reply["error"])


def ask(
    app: Any,
    command: str,
    *,
    timeout: float,
    destination: Sequence[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Answers:
    """Ask the workers of ``app``.

    Args:
        app: The Celery app.
        command: One of the commands that :mod:`workerpools._celery.worker` registers.
        timeout: How long to wait for answers, in seconds; not longer than until all of ``destination`` have answered.
        destination: The workers' names; all if None.
        arguments: The command's.

    Raises:
        Unavailable: The broker cannot be reached.
    """
    try:
        found = app.control.broadcast(
            command, arguments=dict(arguments or {}), destination=destination, reply=True, timeout=timeout
        )
    except (OperationalError, OSError) as error:
        # Without the password.
        broker = app.connection_for_write().as_uri()
        raise Unavailable(f"the broker {broker} cannot be reached: {error}") from None
    replies = {worker: reply for each in found or () for worker, reply in each.items()}
    missing = sorted(set(destination or ()) - replies.keys())
    return Answers(replies, missing, _nobody(app, timeout, destination))


def _nobody(app: Any, timeout: float, destination: Sequence[str] | None) -> str:
    if not apps.all_of(app):
        name = app.main or "that was found"
        return (
            f"no worker answered, and the app {name} has no WorkerPools: declare one, pools = WorkerPools(app), or "
            "name the app that has it: celery -A module pools …"
        )
    who = ", ".join(destination) if destination else "any worker"
    return (
        f"no answer from {who} within {timeout:g} s: is one running on the broker "
        f"{app.connection_for_write().as_uri()}? A busy one may need a longer --timeout"
    )
