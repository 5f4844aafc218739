"""The worker and Flower as processes of the demo, started and stopped like its servers."""

from __future__ import annotations

import http.client
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import demo_tasks
from demo_tasks.servers import ServerProcess, Workspace
from demo_tasks.servers.command import Command
from demo_tasks.settings import Settings

__all__ = ["CeleryWorker", "Flower", "environment"]

# Both programs take any of their options from the environment, where the user's shell may have them for other uses.
_OF_OTHERS = ("CELERY_", "FLOWER_")
# libpq's defaults (PGSSLMODE, PGOPTIONS, …), which are about the user's own server.
_OF_OTHER_DATABASES = ("PG",)


def environment(settings: Settings, *, own_database: bool) -> dict[str, str]:
    """Return the environment in which the shop's app finds its servers.

    Args:
        settings: The servers.
        own_database: Whether the database server was started for this run.
    """
    dropped = _OF_OTHERS + (_OF_OTHER_DATABASES if own_database else ())
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    # The processes do not run in the directory that this one was started in.
    package = str(Path(demo_tasks.__file__).resolve().parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    # A proxy that the user needs for the rest of the world cannot reach this machine's loopback.
    exempt = {name: ",".join([*filter(None, [os.environ.get(name)]), "127.0.0.1"]) for name in ("NO_PROXY", "no_proxy")}
    return {
        **kept,
        **exempt,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "REDIS_URL": settings.redis_url,
        "DATABASE_URL": settings.database_url,
        "UPSTREAM_URL": settings.upstream_url,
        "SHOP_KEY_PREFIX": settings.key_prefix,
    }


class _CeleryProcess(ServerProcess):
    """A command of Celery's, in a directory of its own.

    Args:
        workspace: Where its directory and its log file go.
        name: Its name in the workspace.
        env: Its whole environment.
    """

    def __init__(self, workspace: Workspace, name: str, env: Mapping[str, str]) -> None:
        super().__init__(workspace, name)
        self._env = env

    def _prepare(self) -> None:
        return

    def _celery(self, *arguments: str) -> Command:
        argv: Sequence[str] = (sys.executable, "-m", "celery", "-A", "demo_tasks.app", *arguments)
        # Temporary files, too: a worker that is killed does not remove them.
        return Command(argv, self.directory, {**self._env, "TMPDIR": str(self.directory)})


class CeleryWorker(_CeleryProcess):
    """A prefork worker for the shop's tasks; its stop is a warm one, which lets running tasks finish.

    Args:
        workspace: Where its directory and its log file go.
        env: Its whole environment.
        node: Its name among workers.
        concurrency: How many children it has.
    """

    # Warm, then cold. A warm stop takes up to 30 s more than the running tasks, when a child waits for its last result
    # to be read.
    stop_signals: ClassVar[tuple[tuple[signal.Signals, float], ...]] = (
        (signal.SIGTERM, 45.0),
        (signal.SIGQUIT, 5.0),
    )

    def __init__(self, workspace: Workspace, env: Mapping[str, str], node: str, concurrency: int) -> None:
        super().__init__(workspace, "worker", env)
        self._node = node
        self._concurrency = concurrency

    def _command(self, port: int) -> Command:
        return self._celery(
            *("worker", "--pool", "prefork", "--concurrency", str(self._concurrency), "-E", "--loglevel", "INFO"),
            *("--hostname", self._node, "--include", "demo_tasks.runner.orphans"),
        )

    def _answers(self) -> bool:
        return " ready." in self._log_of_this_start()


class Flower(_CeleryProcess):
    """Flower on a free port of 127.0.0.1, without a password and without a file of its own.

    Args:
        workspace: Where its directory and its log file go.
        env: Its whole environment.
    """

    host = "127.0.0.1"

    def __init__(self, workspace: Workspace, env: Mapping[str, str]) -> None:
        # Without a password, Flower's API and the numbers of the Pools page are closed otherwise. The worker is the
        # demo's own, and the port is this machine's.
        super().__init__(workspace, "flower", {**env, "FLOWER_UNAUTHENTICATED_API": "true"})

    def url(self) -> str:
        """Return the address to open in a browser."""
        return f"http://{self.host}:{self.port}"

    def pools_url(self) -> str:
        """Return the address of the page about the worker's connections."""
        return f"{self.url()}/pools"

    def _command(self, port: int) -> Command:
        config = Path(demo_tasks.__file__).with_name("flowerconfig.py")
        return self._celery(
            *("flower", f"--conf={config}", f"--address={self.host}", f"--port={port}", "--persistent=False")
        )

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=2.0)
        try:
            connection.request("GET", "/healthcheck")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
