"""Breaks the worker's connections in the middle of the load."""

from __future__ import annotations

from demo_tasks.database import Database
from demo_tasks.servers import ExternalUpstream, HttpUpstream

__all__ = ["Faults"]


class Faults:
    """Cuts every connection of the worker once, while tasks run.

    Args:
        database: Where the worker's database connections end.
        upstream: Where its HTTP connections end.
        children: How many children the worker has; each must have a database connection before they are cut.
        tasks: How many tasks there are.
    """

    def __init__(
        self, database: Database, upstream: HttpUpstream | ExternalUpstream, *, children: int, tasks: int
    ) -> None:
        self._database = database
        self._upstream = upstream
        self._children = children
        # Between these two there is time for every child to have opened its connection, and the load goes on after.
        self._from, self._until = tasks * 2 // 5, tasks * 4 // 5
        self.backends_killed: int | None = None
        self.upstream_reloaded = False

    def __str__(self) -> str:
        reloaded = ", HTTP server reloaded" if self.upstream_reloaded else ""
        return f"{self.backends_killed} database connections ended by the server{reloaded}"

    def step(self, done: int) -> bool:
        """Cut the connections if it is time to.

        Args:
            done: How many tasks have ended.

        Returns:
            Whether they were cut now.
        """
        if self.backends_killed is not None or done < self._from:
            return False
        if done < self._until and self._database.worker_connections() < self._children:
            return False
        self.backends_killed = self._database.kill_worker_connections()
        if self._upstream.managed:
            self._upstream.reload()
            self.upstream_reloaded = True
        return True
