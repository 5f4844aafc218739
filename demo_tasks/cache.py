"""What the demo itself does in the shop's Redis: count reservations, and end the worker's connections."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from demo_tasks.settings import Settings
from demo_tasks.tally import connect

__all__ = ["Cache"]


class Cache:
    """The shop's reservations in Redis, seen from outside the worker, over a connection of its own for each question.

    Args:
        settings: Where Redis is, and what tells the shop's part of it from others'.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def count_rows(self, run: str) -> dict[str, int]:
        """Return how many reservations of ``run`` there are, as a table's rows.

        Args:
            run: What the ids of the run's orders begin with.
        """
        with closing(connect(self._settings.redis_url)) as client:
            pattern = f"{self._settings.reservation(run)}-*"
            return {"reservations": len(set(client.scan_iter(match=pattern, count=1000)))}

    def worker_connections(self) -> int:
        """Return how many connections of the worker's ``cache`` the server has."""
        with closing(connect(self._settings.redis_url)) as client:
            return len(self._ids(client))

    def kill_worker_connections(self) -> int:
        """End every connection of the worker's ``cache`` on the server, and return how many they were."""
        with closing(connect(self._settings.redis_url)) as client:
            return sum(client.client_kill_filter(_id=each) for each in self._ids(client))

    def _ids(self, client: Any) -> list[str]:
        return [each["id"] for each in client.client_list() if each["name"] == self._settings.client_name]
