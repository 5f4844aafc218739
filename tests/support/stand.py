"""What a worker of these tests stands among: a broker, a database, an HTTP server, a record; and its client's side."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery
from celery.result import AsyncResult

from tests.support.databases import Database, new_database
from tests.support.faults import terminate_backends
from tests.support.inspect import Backend, open_fds
from tests.support.recorder import PATH, Entry, entries
from tests.support.upstream import EchoUpstream
from tests.support.worker import WorkerProcess

#: Generous: another test run may have the machine to itself for a while.
PATIENCE = 60.0

SHOP = "tests.worker.shop:app"


def wait_until(condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
    """Wait until the condition gives something true, and return it; `AssertionError` when the time is up."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s in vain: {what}")
        time.sleep(0.02)
    return found


@dataclass(frozen=True)
class Stand:
    """Servers of a test's own, and the client that sends tasks."""

    broker_url: str
    database: Database
    echo: EchoUpstream
    record: Path
    client: Celery

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return what the application reads; `extra` wins."""
        return {
            "SHOP_BROKER": self.broker_url,
            "SHOP_RESULTS": self.broker_url,
            "SHOP_DATABASE": self.database.url(),
            "SHOP_STOCK": self.database.url("psycopg"),
            "SHOP_API": self.echo.url,
            PATH: str(self.record),
            "WORKERPOOLS_DATABASE_URL": self.database.url(),
            "WORKERPOOLS_HTTP_BASE_URL": self.echo.url,
            **(extra or {}),
        }

    def worker(
        self,
        *,
        app: str = SHOP,
        pool: str = "prefork",
        concurrency: int = 2,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        conf: Mapping[str, Any] | None = None,
        fresh: bool = False,
    ) -> WorkerProcess:
        """Return a worker among these servers, to be entered or started; `conf` changes `app.conf`."""
        extra = {"SHOP_CONF": json.dumps(conf)} if conf else {}
        given = self.environment({**extra, **(env or {})})
        return WorkerProcess(app, pool=pool, concurrency=concurrency, env=given, args=args, fresh=fresh)

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult:
        """Send the task `shop.<name>`; `options` are those of `apply_async`."""
        return self.client.send_task(f"shop.{name}", args, **options)

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a task and return its result, or raise its error."""
        return self.send(name, *args, **options).get(timeout=PATIENCE)

    def outcome(self, name: str, *args: Any, **options: Any) -> AsyncResult:
        """Send a task and return its result when it is there, whatever it is."""
        return ended(self.send(name, *args, **options))

    def pool_processes(self, count: int) -> list[int]:
        """Wait until so many processes have begun to run tasks, and return their ids.

        Of a prefork worker that is not `WorkerProcess.children` alone: with spawn there is a resource tracker among
        them.
        """
        wait_until(lambda: len(self.entries("process_init")) >= count, f"{count} processes that run tasks")
        return sorted({entry.pid for entry in self.entries("process_init")})

    def reach_all(self, pids: Sequence[int], name: str = "visit") -> list[Any]:
        """Run tasks that answer with their `pid` until each of these processes ran one; return every answer."""
        wanted, answers = set(pids), list[Any]()
        deadline = time.monotonic() + PATIENCE
        while wanted:
            sent = [self.send(name, f"reach-{number}") for number in range(2 * len(pids))]
            found = [result.get(timeout=PATIENCE) for result in sent]
            answers += found
            wanted -= {answer["pid"] if isinstance(answer, dict) else answer for answer in found}
            if time.monotonic() > deadline:
                raise AssertionError(f"these processes ran no task: {wanted}")
        return answers

    def entries(self, *events: str) -> list[Entry]:
        """Return what the worker's processes recorded."""
        return entries(self.record, *events)

    def wait_for_entry(self, event: str, detail: Any = None, count: int = 1) -> None:
        """Wait until the worker recorded an event so many times."""
        wait_until(
            lambda: sum(detail in (None, entry.detail) for entry in self.entries(event)) >= count,
            f"{event} {detail} in the record",
        )

    def backends(self, like: str = "workerpools %") -> list[Backend]:
        """Return the server's sessions in this database that carry the library's name."""
        rows = self.database.execute(
            "select pid, application_name, state from pg_stat_activity where datname = %s and application_name like %s",
            self.database.name,
            like,
        )
        return [Backend(*row) for row in rows]  # type: ignore[arg-type]

    def wait_for_no_connection(self) -> None:
        """Wait until neither server counts a connection: a server takes a moment to see that its client is gone."""
        wait_until(lambda: not self.backends(), f"no backend, still {self.backends()}", 10.0)
        self.echo.wait_for_open(0, 10.0)

    def disorderly_ends(self) -> int:
        """Return how many of this database's sessions have ended otherwise than by a client's goodbye."""
        (row,) = self.database.execute(
            "select sessions_abandoned + sessions_fatal + sessions_killed from pg_stat_database where datname = %s",
            self.database.name,
        )
        return int(row[0])  # type: ignore[call-overload, no-any-return]

    def orders(self, number: int) -> list[int]:
        """Return the committed rows of an order: the number of the run that wrote each."""
        rows = self.database.execute("select run from orders where number = %s order by run", number)
        return [int(row[0]) for row in rows]  # type: ignore[call-overload]

    def terminate_backends(self) -> int:
        """End the worker's database connections from the server's side, and wait until they are gone."""
        return terminate_backends(self.database)


def ended(result: AsyncResult) -> AsyncResult:
    """Wait until a task has ended, however it did."""
    result.get(timeout=PATIENCE, propagate=False)
    return result


def sockets_to(port: int, pid: int) -> set[int]:
    """Return the inodes of a process's sockets that are connected to a port."""
    inodes = set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        columns = line.split()
        if int(columns[2].rpartition(":")[2], 16) == port:
            inodes.add(f"socket:[{columns[9]}]")
    return {int(target[8:-1]) for target in open_fds(pid).values() if target in inodes}


@contextmanager
def stand_among(server: Any, valkey_url: str, folder: Path, prefix: str) -> Iterator[Stand]:
    """Make an empty database and an HTTP server, empty the broker, and clean up."""
    import redis

    with closing(redis.Redis.from_url(valkey_url)) as broker:
        broker.flushdb()
    with new_database(server, prefix) as database:
        database.execute("create table orders (number int, run int)")
        client = Celery("client", broker=valkey_url, backend=valkey_url, set_as_current=False)
        try:
            with EchoUpstream() as echo:
                yield Stand(valkey_url, database, echo, folder / f"{database.name}.jsonl", client)
        finally:
            # A result that is finalized when the broker is gone tries to reach it for minutes.
            gc.collect()
            client.backend.result_consumer.stop()
            client.close()
