"""What the servers allow, and what the workers may open: asked for by a person, over one connection per resource."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from workerpools._check.asking import budget_of, declared, workers_of
from workerpools._check.budget_table import document
from workerpools._stats.snapshot import WorkerStats

__all__ = ["Servers"]

_NO_APP = (
    "This Flower knows no server of your resources: it was started without the workers' app. "
    "Start it as celery -A … flower."
)
_NO_WORKER = "No worker has replied, so there is nothing to compare with what the servers allow."
_NO_RESOURCE = "No resource of the workers counts against a server's limit."


class Servers:
    """The last answers of the servers. Belongs to the IOLoop's thread and never blocks it."""

    def __init__(self) -> None:
        self._asking = False
        self._asked: float | None = None
        self._problem = ""
        self._budget: dict[str, Any] | None = None

    def ask(self, app: Any, snapshots: Mapping[str, Sequence[WorkerStats]]) -> None:
        """Begin to ask the servers, each once; not while they are being asked.

        Args:
            app: Flower's app, with its tasks loaded.
            snapshots: What each worker has sent, by its name.
        """
        if self._asking:
            return
        self._asking = True
        loop = asyncio.get_running_loop()

        def work() -> None:
            found = _found(app, snapshots)
            # Flower may have ended meanwhile.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._ended, *found)

        # Not one of Flower's threads: it waits for these at its end.
        threading.Thread(target=work, name="workerpools-servers", daemon=True).start()

    def document(self) -> dict[str, Any]:
        """Return the answers, as in the page's document."""
        return {
            "asking": self._asking,
            "asked": None if self._asked is None else round(self._asked, 3),
            "problem": self._problem,
            "budget": self._budget,
        }

    def _ended(self, problem: str, budget: dict[str, Any] | None) -> None:
        self._asking, self._asked, self._problem, self._budget = False, time.time(), problem, budget


def _found(app: Any, snapshots: Mapping[str, Sequence[WorkerStats]]) -> tuple[str, dict[str, Any] | None]:
    """Return the reason that there is no budget, or the budget."""
    try:
        app.finalize()
        if not any(declared(app)):
            return _NO_APP, None
        workers = workers_of(snapshots)
        if not workers:
            return _NO_WORKER, None
        rows = budget_of(app, workers)
        return ("", document(rows, workers)) if rows else (_NO_RESOURCE, None)
    except Exception as error:
        # Its text may have secrets.
        return f"The servers cannot be asked: {type(error).__name__}.", None
