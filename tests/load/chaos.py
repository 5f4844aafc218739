"""What breaks while the tasks run: random connections, by a thread of its own; whole servers, by the test's thread."""

from __future__ import annotations

import collections
import random
import signal
import threading
import time
from collections.abc import Callable

import psycopg2

from demo_tasks.servers import PostgresServer
from tests.load.upstream import Upstream
from tests.support.cuts import Scope
from tests.support.databases import Database
from tests.support.proxy import TcpProxy
from tests.support.sockets import Ending

#: Seconds between two breaks, drawn evenly.
PAUSE = (0.01, 0.12)

#: What a chunk on its way to a server may contain when it is cut: each way the drivers have to say it, the library's
#: own questions around a COMMIT included.
STATEMENTS = (b"COMMIT", b"COMMIT", b"COMMIT", b"INSERT", b"SELECT products", b"pg_current_xact_id", b"pg_xact_status")
REQUESTS = (b"GET /echo", b"POST /pay")
SCOPES: tuple[Scope, ...] = ("open", "open", "next")


class Chaos(threading.Thread):
    """Ends connections until it is told to stop; counts what it did by kind.

    Args:
        seed: Decides what is done, and to some extent when.
        database: The server itself, not the proxy before it.
        db: The proxy before the database.
        api: The proxy before the HTTP server.
    """

    def __init__(self, seed: int, database: Database, db: TcpProxy, api: TcpProxy) -> None:
        super().__init__(name="chaos", daemon=True)
        self.done: collections.Counter[str] = collections.Counter()
        self._random = random.Random(seed)
        self._database = database
        self._db = db
        self._api = api
        self._over = threading.Event()
        self._failure: BaseException | None = None

    def stop(self) -> None:
        """Do nothing more; raise what went wrong in the thread."""
        self._over.set()
        if self.is_alive():
            self.join(30)
        # The rules that have found nothing yet.
        self._db.pass_through()
        self._api.pass_through()
        if self._failure is not None:
            raise self._failure

    def run(self) -> None:
        actions: list[Callable[[], None]] = [
            *[self._terminate_one] * 3,
            self._terminate_all,
            self._close_database,
            self._close_api,
            *[self._cut_statement] * 6,
            *[self._cut_answer] * 2,
            *[self._cut_request] * 3,
        ]
        try:
            while not self._over.wait(self._random.uniform(*PAUSE)):
                self._random.choice(actions)()
        except BaseException as error:
            self._failure = error

    def _how(self) -> Ending:
        return self._random.choice(("fin", "rst"))

    def _terminate_one(self) -> None:
        self._terminate("limit 1", "backends terminated one by one")

    def _terminate_all(self) -> None:
        self._terminate("", "backends terminated at once")

    def _terminate(self, limit: str, what: str) -> None:
        try:
            ended = self._database.execute(
                # Which session is which is not for the seed to decide.
                "select pg_terminate_backend(pid) from (select pid from pg_stat_activity"
                f" where application_name like %s order by random() {limit}) as chosen",
                "workerpools %",
            )
        except psycopg2.Error:
            # It is being restarted.
            return
        self.done[what] += len(ended)

    def _close_database(self) -> None:
        self.done["database connections closed"] += self._db.close_all(self._how())

    def _close_api(self) -> None:
        self.done["HTTP connections closed"] += self._api.close_all(self._how())

    def _cut_statement(self) -> None:
        text = self._random.choice(STATEMENTS)
        self._cut(self._db, text, f"cuts at {text.decode()}")

    def _cut_request(self) -> None:
        text = self._random.choice(REQUESTS)
        self._cut(self._api, text, f"cuts at {text.decode()}")

    def _cut(self, proxy: TcpProxy, text: bytes, what: str) -> None:
        deliver = self._random.random() < 0.5
        # With no wait for the answer, the server may still be at work when the client has lost it.
        wait = self._random.choice((0.0, 1.0))

        def found(chunk: bytes) -> bool:
            if text not in chunk:
                return False
            self.done[what] += 1
            return True

        # Most are for the connections that are open, and some for the next one: a rule for all that are to come would
        # stay, and so many of them would slow every chunk down.
        scope = self._random.choice(SCOPES)
        proxy.cut_when(found, how=self._how(), deliver=deliver, reply_wait=wait, scope=scope)

    def _cut_answer(self) -> None:
        proxy, length = self._random.choice((self._db, self._api)), self._random.randrange(200)
        proxy.cut_after(length, "to_client", self._how(), scope="open", times=1)
        self.done["rules to cut within an answer"] += 1


class Outages:
    """Takes whole servers away, each twice, at points of the run that the seed decides.

    To be used from the main thread: the kernel ties a server to the thread that started it.

    Args:
        seed: Decides the order, the points and how long a server is away.
        server: The database server.
        upstream: The HTTP server.
        api: The proxy before the HTTP server.
    """

    def __init__(self, seed: int, server: PostgresServer, upstream: Upstream, api: TcpProxy) -> None:
        self.done: list[str] = []
        self._random = random.Random(seed)
        self._server = server
        self._upstream = upstream
        self._api = api
        actions = [self._crash_database, self._restart_database, self._refuse_requests, self._kill_upstream]
        self._random.shuffle(actions)
        self._plan = [(0.2 * (at + self._random.random() / 2) + 0.05, action) for at, action in enumerate(actions)]

    def proceed(self, fraction: float) -> None:
        """Do what is due when this part of all tasks has ended."""
        while self._plan and fraction >= self._plan[0][0]:
            _, action = self._plan.pop(0)
            action()

    def _away(self) -> None:
        time.sleep(self._random.uniform(0.2, 2.0))

    def _crash_database(self) -> None:
        self._server.send_signal(signal.SIGQUIT)
        while self._server.running:
            time.sleep(0.01)
        self._away()
        self._server.start()
        self.done.append("database crashed")

    def _restart_database(self) -> None:
        self._server.stop()
        self._away()
        self._server.start()
        self.done.append("database restarted")

    def _refuse_requests(self) -> None:
        # As a server that is down: connections are refused.
        self._api.stop()
        self._replace_upstream()
        self._api.start()
        self.done.append("upstream refused")

    def _kill_upstream(self) -> None:
        # As a server behind a load balancer that does not know yet: connections are accepted, and end.
        self._replace_upstream()
        self.done.append("upstream killed")

    def _replace_upstream(self) -> None:
        self._upstream.kill()
        self._away()
        self._upstream.start()
