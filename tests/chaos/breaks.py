"""How each thing of the table is broken, at each of its moments."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from demo_tasks.servers import PostgresServer
from tests.chaos import table
from tests.chaos.shop import ChaosShop
from tests.support.cuts import Direction
from tests.support.databases import Database
from tests.support.faults import connection_limit, crash, down_for, read_only, restart, terminate_backends
from tests.support.pgbouncer import PgBouncer
from tests.support.proxy import TcpProxy
from tests.support.sockets import Ending

ENDINGS: dict[str, Ending] = {"FIN": "fin", "RST": "rst"}

#: What leaves both ends in the belief that the other one is there.
_ALIVE = ("blackhole", "silent")

#: How long what is slow takes, in seconds.
SLOW = 1.2


@dataclass
class DatabaseSite:
    """A shop, and everything between it and its database.

    Attributes:
        shop: The app.
        server: The PostgreSQL server, of these tests' own.
        database: The database, for its owner, directly.
        proxy: What the app's connections go through.
        bouncer: The PgBouncer behind the proxy, if there is one.
    """

    shop: ChaosShop
    server: PostgresServer
    database: Database
    proxy: TcpProxy
    bouncer: PgBouncer | None = None
    _undo: ExitStack = field(default_factory=ExitStack)
    _sent: bytes = b""

    def arm(self, broken: str, moment: str) -> None:
        """Have it broken at that moment of the next delivery; called when the app has been used."""
        happens = self._action(broken, moment)
        if moment == table.IDLE:
            happens()
        elif moment == table.CONNECTING:
            self.shop.engine.close()
            self._while_connecting(broken, happens)
        elif moment == table.LOGGED_IN:
            self.shop.engine.close()
            # The library's first question.
            if broken == "silent":
                self._silence_at(b"pg_walfile_name", "to_server")
            else:
                self._before_chunk(b"pg_walfile_name", broken, happens, times=None)
        elif moment == table.FLIGHT:
            self._before_flight(broken, happens)
        elif moment == table.ANSWERED:
            self._after_flight(broken, happens)
        elif moment == table.MID_QUERY:
            self.shop.errands.meanwhile(self._until_active)
            self.shop.errands.meanwhile(happens)
        elif moment == table.FIRST_BYTE and broken not in _ALIVE:
            self._before_chunk(b"insert into", broken, happens)
        elif moment in (table.BETWEEN, table.FIRST_BYTE):
            self.shop.at[moment] = happens
        elif moment == table.BEFORE_COMMIT:
            self._before_commit(broken, happens)
        else:
            self._after_commit(broken, happens)

    def heal(self) -> None:
        """Repair everything, and wait until the server knows which transactions are lost."""
        self._undo.close()
        repair(self.proxy)

    def settle(self) -> None:
        """End the app's connections, and wait until nothing of it is left on the server."""
        self.shop.engine.close()
        self.proxy.close_all()
        if self.bouncer is not None:
            self.bouncer.stop()
        ours = "application_name LIKE 'workerpools %' AND datname = current_database()"
        _eventually(lambda: self.database.execute(f"SELECT 1 FROM pg_stat_activity WHERE {ours}") == [])

    def _action(self, broken: str, moment: str) -> Callable[[], object]:
        bouncer = self.bouncer
        if bouncer is not None and broken not in ("terminate", "silent"):
            return {
                "restart": bouncer.restart,
                "restart slow": lambda: self._until_healed(bouncer.stop, bouncer.start),
                "paused": lambda: self._pause_for_a_moment(bouncer),
                "paused for long": lambda: self._until_healed(bouncer.pause, bouncer.resume),
                "pool full": self._occupy,
            }[broken]
        return {
            "FIN": lambda: self.proxy.close_all("fin"),
            "RST": lambda: self.proxy.close_all("rst"),
            "blackhole": self.proxy.sever,
            "silent": self._silence,
            "terminate": lambda: terminate_backends(self.database),
            "restart immediate": lambda: restart(self.server),
            "restart fast": self._restart_in_order,
            "restart slow": lambda: self._restart_slowly(moment),
            "read-only": lambda: self._undo.enter_context(read_only(self.server, recovered=self.database)),
            "read-only for long": lambda: self._undo.enter_context(read_only(self.server)),
            "connection limit": lambda: self._undo.enter_context(connection_limit(self.database, 0)),
            "pool full": lambda: self._undo.enter_context(self.shop.engine.get().connect()),
            "serialization failure": lambda: self.database.execute("UPDATE stock SET n = n + 100"),
            "wrong password": lambda: None,
        }[broken]

    def _until_healed(self, breaks: Callable[[], object], repairs: Callable[[], object]) -> None:
        self._undo.callback(repairs)
        breaks()

    def _restart_slowly(self, moment: str) -> None:
        if moment in (table.BEFORE_COMMIT, table.AFTER_COMMIT):
            # The task asks for its COMMIT until the server is back, which it therefore is by itself.
            self._undo.enter_context(down_for(self.server, SLOW))
        else:
            # The task comes back when all is healed: no clock decides whether the server is still down.
            self._until_healed(lambda: crash(self.server), self.server.start)

    def _restart_in_order(self) -> None:
        self.server.stop()
        self.shop.errands.tell(lambda: _later(self.server.start, 0.4))

    def _pause_for_a_moment(self, bouncer: PgBouncer) -> None:
        bouncer.pause()
        self.shop.errands.meanwhile(lambda: _later(bouncer.resume, 0.4))

    def _occupy(self) -> None:
        """Hold PgBouncer's only server connection."""
        import psycopg2

        assert self.bouncer is not None
        connection = psycopg2.connect(self.bouncer.database.dsn)
        self._undo.callback(connection.close)
        connection.cursor().execute("SELECT 1")

    def _while_connecting(self, broken: str, happens: Callable[[], object]) -> None:
        if broken in ENDINGS:
            self.proxy.cut_after(0, "to_server", ENDINGS[broken], scope="all")
        elif broken == "blackhole":
            self.proxy.refuse_silently()
        else:
            happens()

    def _until_active(self) -> None:
        """Wait until the server executes the task's statement."""
        active = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
        _eventually(lambda: self.database.execute(active) != [])

    def _silence(self) -> None:
        # What was held back is lost for good.
        self._undo.callback(self.proxy.close_all)
        self.proxy.blackhole()

    def _silence_at(self, text: bytes, direction: Direction) -> None:
        """Say nothing more after a chunk with that text."""
        self._undo.callback(self.proxy.close_all)

        def look(chunk: bytes) -> bool:
            if text in chunk:
                self.proxy.blackhole()
            return False

        self.proxy.cut_when(look, direction)

    def _is_flight(self, chunk: bytes) -> bool:
        """Return whether a chunk has the task's statement, after all that its first flight takes along."""
        # A pipeline may come in several.
        self._sent += chunk
        if b"insert into" not in chunk:
            return False
        wanted = (b"BEGIN", b"statement_timeout", *(() if self.bouncer else (b"RESET ALL",)))
        assert all(text in self._sent for text in wanted), self._sent
        return True

    def _before_flight(self, broken: str, happens: Callable[[], object]) -> None:
        if broken in _ALIVE:
            self.shop.at["first"] = happens
        else:
            self._before_chunk(self._is_flight, broken, happens)

    def _after_flight(self, broken: str, happens: Callable[[], object]) -> None:
        def look(chunk: bytes) -> bool:
            if b"INSERT 0 1" not in chunk:
                return False
            self.shop.errands.ask(happens)
            return True

        if broken in ENDINGS:
            self.proxy.cut_when(self._is_flight, how=ENDINGS[broken], deliver=True)
        elif broken == "blackhole":
            self._sever_at(b"insert into", "to_server")
        elif broken == "silent":
            self._silence_at(b"insert into", "to_server")
        else:
            self.proxy.cut_when(look, "to_client")

    def _before_chunk(
        self, where: bytes | Callable[[bytes], bool], broken: str, happens: Callable[[], object], times: int | None = 1
    ) -> None:
        found = (lambda chunk: where in chunk) if isinstance(where, bytes) else where
        if broken in ENDINGS:
            self.proxy.cut_when(found, how=ENDINGS[broken], times=times)
            return

        def look(chunk: bytes) -> bool:
            if not happened and found(chunk):
                happened.append(True)
                # The chunk waits for it in the proxy's thread.
                self.shop.errands.ask(happens)
            return False

        happened: list[bool] = []
        self.proxy.cut_when(look)

    def _before_commit(self, broken: str, happens: Callable[[], object]) -> None:
        if broken == "blackhole":
            # From the answer on that comes right before COMMIT.
            self._sever_at(b"UPDATE 1", "to_client")
        elif broken == "silent":
            self._silence_at(b"UPDATE 1", "to_client")
        else:
            self._before_chunk(b"COMMIT", broken, happens)

    def _after_commit(self, broken: str, happens: Callable[[], object]) -> None:
        if broken in ENDINGS:
            self.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, how=ENDINGS[broken], deliver=True)
        elif broken == "blackhole":
            self._sever_at(b"COMMIT", "to_server")
        elif broken == "silent":
            self._silence_at(b"COMMIT", "to_server")
        elif broken == "terminate":
            self._terminate_in_trigger()
        else:
            self.proxy.cut_when(lambda chunk: self._acknowledges(chunk, broken, happens), "to_client")

    def _acknowledges(self, chunk: bytes, broken: str, happens: Callable[[], object]) -> bool:
        # The END of a reset has the same tag, but its answer comes with that of an open transaction.
        if b"COMMIT\0" not in chunk or not chunk.endswith(_IDLE):
            return False
        self.shop.errands.ask(happens)
        if broken == "connection limit":
            self.shop.errands.tell(lambda: _later(self._undo.close, SLOW))
        return True

    def _sever_at(self, text: bytes, direction: Any) -> None:
        def look(chunk: bytes) -> bool:
            if text in chunk and not happened:
                happened.append(True)
                self.proxy.sever()
            return False

        happened: list[bool] = []
        self.proxy.cut_when(look, direction)

    def _terminate_in_trigger(self) -> None:
        """Have the first COMMIT end its own session, before its transaction is through."""
        self.database.execute("CREATE SEQUENCE commits")
        self.database.execute("GRANT USAGE ON SEQUENCE commits TO public")
        self.database.execute(
            "CREATE FUNCTION terminate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF nextval('commits') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()), pg_sleep(1); END IF;"
            " RETURN NULL; END $$"
        )
        self.database.execute(
            "CREATE CONSTRAINT TRIGGER ends AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION terminate()"
        )


#: ReadyForQuery outside of a transaction (PostgreSQL documentation, "Message Formats").
_IDLE = b"Z\0\0\0\x05I"


def repair(proxy: TcpProxy) -> None:
    """Let a proxy accept and forward again, whatever was done to it."""
    proxy.start()
    proxy.pass_through()


def _later(action: Callable[[], object], seconds: float) -> None:
    time.sleep(seconds)
    action()


def _eventually(question: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not question():
        if time.monotonic() > deadline:
            raise TimeoutError("it never came true")
        time.sleep(0.02)
