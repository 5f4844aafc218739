"""Breaks the worker's connections in the middle of the load."""

from __future__ import annotations

from demo_tasks.cache import Cache
from demo_tasks.database import Database
from demo_tasks.runner.relay import Relay
from demo_tasks.servers import ExternalUpstream, HttpUpstream

__all__ = ["Faults"]


class Faults:
    """Cuts every connection of the worker once, while tasks run.

    Args:
        database: Where the worker's database connections end.
        cache: Where its Redis connections end; None where the server is not the demo's own.
        upstream: Where its HTTP connections end.
        children: How many children the worker has; each must have a database connection before they are cut.
        tasks: How many tasks there are.
        relay: What the worker's database connections go through; None if they go straight to the server.
    """

    def __init__(
        self,
        database: Database,
        upstream: HttpUpstream | ExternalUpstream,
        *,
        cache: Cache | None,
        children: int,
        tasks: int,
        relay: Relay | None,
    ) -> None:
        self._database = database
        self._upstream = upstream
        self._children = children
        self._relay = relay
        self._cache = cache
        # Between these two there is time for every child to have opened its connection, and the load goes on after.
        self._from, self._until = tasks * 2 // 5, tasks * 4 // 5
        self._terminated: int | None = None
        self.cache_killed = 0
        self.upstream_reloaded = False

    def __str__(self) -> str:
        commits = "COMMIT" if self._children == 1 else f"{self._children} COMMITs"
        lost = f", next {commits} unanswered" if self._relay is not None else ""
        reloaded = ", HTTP reloaded" if self.upstream_reloaded else ""
        redis = f", {self.cache_killed} Redis" if self.cache_killed else ""
        connections = "connection" if self._terminated == 1 and not redis else "connections"
        return f"{self._terminated} database{redis} {connections} cut{lost}{reloaded}"

    @property
    def commits_lost(self) -> int:
        """How many answers to COMMIT were lost."""
        return 0 if self._relay is None else self._relay.lost

    @property
    def backends_killed(self) -> int | None:
        """How many database connections were cut, by the server or before the answer to a COMMIT; None if none were."""
        return None if self._terminated is None else self._terminated + self.commits_lost

    def step(self, done: int) -> bool:
        """Cut the connections if it is time to.

        Args:
            done: How many tasks have ended.

        Returns:
            Whether they were cut now.
        """
        if self._terminated is not None or done < self._from:
            return False
        if done < self._until and self._database.worker_connections() < self._children:
            return False
        self._terminated = self._database.kill_worker_connections()
        if self._relay is not None:
            self._relay.lose_commits(self._children)
        if self._cache is not None:
            self.cache_killed = self._cache.kill_worker_connections()
        if self._upstream.managed:
            self._upstream.reload()
            self.upstream_reloaded = True
        return True
