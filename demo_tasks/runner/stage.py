"""Everything that runs during the demo: the servers, the worker and Flower, started and stopped in order."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import redis
import sqlalchemy
from sqlalchemy.exc import SQLAlchemyError

from demo_tasks.cache import Cache
from demo_tasks.runner.errors import DemoError
from demo_tasks.runner.isolation import Isolation
from demo_tasks.runner.processes import CeleryWorker, Flower, environment
from demo_tasks.runner.relay import Relay
from demo_tasks.servers import PostgresServer, ServerError, ServerProcess, Workspace, from_environment
from demo_tasks.servers.external import ExternalServer
from demo_tasks.settings import Settings
from demo_tasks.tally import connect

if TYPE_CHECKING:
    from demo_tasks.database import Database
    from demo_tasks.runner.screen import Screen

__all__ = ["Processes", "Stage"]


class Processes:
    """What is started one after the other, watched, and stopped in reverse.

    Args:
        screen: Where the user reads what is started and stopped.
    """

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._started: list[ServerProcess] = []

    def check_alive(self) -> None:
        """Make sure that everything that was started still runs.

        Raises:
            DemoError: Something has ended; the message ends with its last log lines.
        """
        for process in self._started:
            if not process.running:
                raise DemoError(f"{process.name} has ended by itself. Its last log lines:\n{process.log_tail()}")

    def hurry(self) -> None:
        """Have everything end at once, in whatever order; the orderly stop then finds it gone. Never raises."""
        for process in self._started:
            # A PostgreSQL server that is killed leaves shared memory behind, and its quickest end is quick enough.
            quickest = process.stop_signals[-1][0] if isinstance(process, PostgresServer) else signal.SIGKILL
            with contextlib.suppress(ServerError, OSError):
                process.send_signal(quickest)

    def _start(self, stack: ExitStack, label: str, server: ServerProcess | ExternalServer) -> None:
        if isinstance(server, ExternalServer):
            self._screen.say(f"{label:<12} {server.where}")
            return
        stack.callback(self._stop, label, server)
        with self._screen.waiting(f"starting {label}"):
            server.start()
        self._started.append(server)
        self._screen.say(f"{label:<12} {self._where(server)}")

    def _stop(self, label: str, server: ServerProcess) -> None:
        if server.running:
            with self._screen.waiting(f"stopping {label}"):
                server.stop()
            self._screen.say(f"{label} stopped")

    def _where(self, server: ServerProcess) -> str:
        return f"127.0.0.1:{server.port}, pid {server.pid}"


class Stage(Processes):
    """The processes of one run.

    Args:
        screen: Where the user reads what is started and stopped.
        token: The run's name, made of letters and digits.
        concurrency: How many children the worker has.

    Attributes:
        worker: The worker.
        flower: Flower.
        database: The worker's database, seen from outside.
        cache: The worker's Redis, seen from outside.
        own_cache: Whether that server was started for the run, and may be asked about its connections.
        relay: What the worker's database connections go through; None where the server is not the demo's own.
        connections_at_stop: How many database and Redis connections of the worker were left after its warm stop; None
            until then.
    """

    worker: CeleryWorker
    flower: Flower
    database: Database
    cache: Cache
    own_cache: bool

    def __init__(self, screen: Screen, token: str, concurrency: int) -> None:
        super().__init__(screen)
        self._token = token
        self._concurrency = concurrency
        self.connections_at_stop: int | None = None
        self.relay: Relay | None = None

    def start(self, stack: ExitStack) -> None:
        """Start everything.

        Args:
            stack: Stops it all, in reverse order, when it is unwound: Flower, the worker, the servers.

        Raises:
            ServerError: Something cannot be found or does not start; the message ends with its last log lines.
            DemoError: A server that runs already cannot be used.
        """
        workspace = stack.enter_context(Workspace())
        servers = from_environment(workspace, os.environ)
        self._start(stack, "PostgreSQL", servers.database)
        self._start(stack, "Redis", servers.redis)
        self._start(stack, "HTTP server", servers.upstream)
        self.upstream = servers.upstream

        isolation = Isolation.of(servers, self._token)
        env = environment(isolation.settings, own_database=servers.database.managed)
        _adopt(env)
        self.database = isolation.database()
        self.cache = Cache(isolation.settings)
        self.own_cache = servers.redis.managed
        stack.callback(isolation.remove_traces)
        self._prepare(isolation)
        if isinstance(servers.database, PostgresServer):
            # Of a server that is not ours the connections may be encrypted, and their COMMITs cannot be seen.
            self.relay = Relay(servers.database.host, servers.database.port)
            stack.callback(self.relay.close)
            env["DATABASE_URL"] = _through(isolation.settings.database_url, self.relay.port)

        stack.callback(self._measure)
        self.worker = CeleryWorker(workspace, env, f"shop-{self._token}@%h", self._concurrency)
        self._start(stack, "worker", self.worker)
        stack.callback(self._let_worker_idle, isolation.settings)
        self.flower = Flower(workspace, env)
        self._start(stack, "Flower", self.flower)

    def _where(self, server: ServerProcess) -> str:
        if isinstance(server, CeleryWorker):
            return f"pid {server.pid}, {self._concurrency} {'process' if self._concurrency == 1 else 'processes'}"
        return server.url() if isinstance(server, Flower) else super()._where(server)

    def _prepare(self, isolation: Isolation) -> None:
        client = connect(isolation.settings.redis_url)
        try:
            client.ping()
            isolation.prepare()
        except redis.RedisError as error:
            raise DemoError(f"Redis cannot be used: {error}") from error
        except SQLAlchemyError as error:
            raise DemoError(f"The database cannot be used: {getattr(error, 'orig', error)}") from error
        finally:
            client.close()

    def _let_worker_idle(self, settings: Settings) -> None:
        # In the middle of the load: a child whose last result the main process has not read when it stops waits 30 s
        # for that (billiard's Worker._ensure_messages_consumed). Without new tasks there is soon none.
        client = connect(settings.redis_url)
        with contextlib.suppress(redis.RedisError):
            if client.delete(f"{settings.key_prefix}celery"):
                time.sleep(1.0)
        client.close()

    def _measure(self) -> None:
        # Between the worker's stop and the database server's.
        with contextlib.suppress(SQLAlchemyError, redis.RedisError):
            of_cache = self.cache.worker_connections() if self.own_cache else 0
            self.connections_at_stop = self.database.worker_connections() + of_cache


def _through(url: str, port: int) -> str:
    return sqlalchemy.make_url(url).set(host="127.0.0.1", port=port).render_as_string(hide_password=False)


def _adopt(env: dict[str, str]) -> None:
    # This process submits tasks through the same app as the worker, which reads its servers when it is imported.
    for name in set(os.environ) - set(env):
        del os.environ[name]
    os.environ.update(env)
