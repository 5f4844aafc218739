"""Queries running workers through their broker, as ``celery inspect`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
from kombu.exceptions import OperationalError

from workerpools._celery import apps
from workerpools._stats.snapshot import WorkerStats

__all__ = ["FAILED", "UNAVAILABLE", "Answers", "Failed", "Unavailable", "ask"]

#: Exit code: a worker refused the command.
FAILED = 1
#: Exit code: no worker replied, or a named one did not (sysexits.h: EX_UNAVAILABLE, as with ``celery inspect``).
UNAVAILABLE = 69


class Failed(click.ClickException):
    """A worker refused the command. Ends the program with one sentence on standard error."""

    exit_code = FAILED


class Unavailable(Failed):
    """No worker replied, or a named one did not. Ends the program with one sentence on standard error."""

    exit_code = UNAVAILABLE


@dataclass(frozen=True)
class Answers:
    """The workers' replies to a command.

    Attributes:
        replies: The replies, by worker.
        missing: The named workers that did not reply in time.
        nobody: The message for the case that no worker replied.
    """

    replies: Mapping[str, Any]
    missing: Sequence[str] = ()
    nobody: str = field(default="", repr=False)

    def refusals(self) -> dict[str, str]:
        """Return the error message of each worker that refused the command, by worker."""
        return {
            worker: _refusal(reply)
            for worker, reply in sorted(self.replies.items())
            if isinstance(reply, Mapping) and "error" in reply
        }

    def snapshots(self) -> dict[str, list[WorkerStats]]:
        """Return the snapshots in the replies to ``pools``, by worker."""
        return {
            worker: [WorkerStats.from_dict(each) for each in reply]
            for worker, reply in self.replies.items()
            if isinstance(reply, Sequence) and not isinstance(reply, str)
        }

    def check(self) -> None:
        """Raise if a worker refused the command or a reply is missing.

        Raises:
            Failed: A worker refused the command.
            Unavailable: No worker replied, or a named one did not.
        """
        refused = self.refusals()
        if refused:
            raise Failed("; ".join(f"{worker}: {error}" for worker, error in refused.items()))
        if not self.replies:
            raise Unavailable(self.nobody)
        if self.missing:
            raise Unavailable(f"no reply in time from {', '.join(self.missing)}")


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
    """Send a command to the workers of ``app`` and collect their replies.

    Args:
        app: The Celery app.
        command: A command registered by :mod:`workerpools._celery.worker`.
        timeout: How long to wait for replies, in seconds; ends early once all of ``destination`` have replied.
        destination: The workers' names; None for all workers.
        arguments: The command's arguments.

    Returns:
        The replies.

    Raises:
        Unavailable: The broker cannot be reached.
    """
    try:
        found = app.control.broadcast(
            command, arguments=dict(arguments or {}), destination=destination, reply=True, timeout=timeout
        )
    except (OperationalError, OSError) as error:
        # as_uri() hides the password.
        broker = app.connection_for_write().as_uri()
        raise Unavailable(f"cannot reach the broker {broker}: {error}") from None
    replies = {worker: reply for each in found or () for worker, reply in each.items()}
    missing = sorted(set(destination or ()) - replies.keys())
    return Answers(replies, missing, _nobody(app, timeout, destination))


def _nobody(app: Any, timeout: float, destination: Sequence[str] | None) -> str:
    if not apps.all_of(app):
        name = f"the app {app.main}" if app.main else "this app"
        return (
            f"no worker replied, and {name} has no WorkerPools: declare one, pools = WorkerPools(app), or "
            "name the app that has one: celery -A module pools …"
        )
    who = ", ".join(destination) if destination else "any worker"
    return (
        f"no reply from {who} within {timeout:g} s: is it running on the broker "
        f"{app.connection_for_write().as_uri()}? A busy worker may need a longer --timeout"
    )
