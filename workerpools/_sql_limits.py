"""What an SQL server, or the PgBouncer before it, says of the connections that its clients may open.

For every adapter of one: it needs no more than a function that runs a statement.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from workerpools._pools.limits import Limit

__all__ = ["sql_limits"]

#: Runs a statement, and returns its rows.
Ask = Callable[[str], Sequence[Sequence[Any]]]

#: How long the server may take over each question, in milliseconds.
_PATIENCE = 5000

# PostgreSQL documentation, "Connections and Authentication". A superuser is held to no limit but max_connections
# (CheckMyDatabase() and InitializeSessionUserId() in its source). The time of its start tells a server from its
# standbys.
_POSTGRESQL = """
SELECT current_setting('max_connections')::int, current_setting('superuser_reserved_connections')::int,
       coalesce(current_setting('reserved_connections', true), '0')::int,
       (SELECT count(*) FROM pg_roles
        WHERE rolname = 'pg_use_reserved_connections' AND pg_has_role(session_user, oid, 'USAGE')),
       r.rolsuper, r.rolconnlimit, d.datconnlimit, r.rolname, d.datname, current_setting('server_version'),
       (SELECT system_identifier FROM pg_control_system()) || ' ' || extract(epoch FROM pg_postmaster_start_time()),
       pg_backend_pid()
FROM pg_roles r, pg_database d
WHERE r.rolname = session_user AND d.datname = current_database()
"""
# Everybody may see these columns of every session ("pg_stat_activity"), but not what kind of session another's is.
_SESSIONS = """
SELECT usename, datname, application_name, count(*)
FROM pg_stat_activity
WHERE usename IS NOT NULL AND datname IS NOT NULL AND pid <> pg_backend_pid()
      AND coalesce(backend_type, 'client backend') = 'client backend'
GROUP BY 1, 2, 3
"""


def sql_limits(
    ask: Ask,
    backend: str,
    *,
    host: str,
    port: object,
    user: str,
    database: str,
    connection: object,
    console: Callable[[], Any],
    pooler: bool = False,
    own: Callable[[str], bool] = lambda name: False,
) -> list[Limit]:
    """Ask a server for its limits.

    Args:
        ask: Runs a statement, in one transaction with the others; returns its rows.
        backend: ``postgresql``, ``mysql`` or ``mariadb``; nothing is known of another's limits.
        host: The server's host; empty for a local socket.
        port: Its port; empty or None for the default.
        user: The connection's user.
        database: Its database.
        connection: The driver's connection.
        console: Connects to the database ``pgbouncer`` at the same place, in autocommit mode.
        pooler: Whether PgBouncer is declared to stand before the server; it is also found out.
        own: Tells the name of a session of this resource, in any process.

    Returns:
        The limits.

    Raises:
        Exception: Any error of ``ask``.
    """
    at = f"{host or 'a local socket'}{f':{port}' if port else ''}"
    if backend == "postgresql":
        ask(f"SELECT set_config('statement_timeout', '{_PATIENCE}', true)")
        (asked,) = ask(_POSTGRESQL)
        if pooler or _behind_pooler(connection, asked[-1]):
            return _pooler(console, user, database, at)
        return _postgresql(asked, ask(_SESSIONS), at, own)
    if backend in ("mysql", "mariadb"):
        return _mysql(ask, at)
    unknown = f"workerpools cannot ask {backend} for it"
    return [Limit(f"{backend} at {at}", "connections", f"{backend} {at}", unknown=unknown)]


def _behind_pooler(connection: object, pid: int) -> bool:
    # A pooler gives its clients keys of its own for cancelling, with a process id that is none.
    told = getattr(getattr(connection, "info", None), "backend_pid", None)
    return told is not None and told != pid


def _postgresql(
    asked: Sequence[Any], sessions: Sequence[Sequence[Any]], at: str, is_own: Callable[[str], bool]
) -> list[Limit]:
    most, for_superusers, for_others, uses_reserved, superuser, of_role, of_database, *named = asked
    role, database, version, key, _ = named
    server = f"PostgreSQL {version.split()[0]} at {at}"
    reserved = 0 if superuser else for_superusers + (0 if uses_reserved else for_others)

    def limit(name: str, most: int, reserved: int, counts: Callable[[Any], bool]) -> Limit:
        counted = [each for each in sessions if counts(each)]
        own = [each for each in counted if tuple(each[:2]) == (role, database) and is_own(each[2] or "")]
        clients: dict[str, int] = {}
        for user, _, name_of_it, count in counted:
            who = f"{user} ({_shown(name_of_it)})" if name_of_it else str(user)
            clients[who] = clients.get(who, 0) + count
        ranked = sorted(clients.items(), key=lambda pair: (-pair[1], pair[0]))
        total, ours = sum(each[3] for each in counted), sum(each[3] for each in own)
        return Limit(server, name, f"{key} {name}", most, reserved, total, ours, tuple(ranked))

    found = [limit("max_connections", most, reserved, lambda session: True)]
    if of_role >= 0 and not superuser:
        found.append(limit(f"role {role}", of_role, 0, lambda session: session[0] == role))
    if of_database >= 0 and not superuser:
        found.append(limit(f"database {database}", of_database, 0, lambda session: session[1] == database))
    return found


#: The name that a connection of ours has, without which process has it.
_OURS = re.compile(r"(?P<who>workerpools .*) pid=\d+")


def _shown(name: str) -> str:
    found = _OURS.fullmatch(name)
    return "".join(each if each.isprintable() else "?" for each in (found["who"] if found else name))


def _mysql(ask: Ask, at: str) -> list[Limit]:
    # The session's max_user_connections is that of its account, or the server's ("Setting Account Resource Limits").
    # One more connection than max_connections is for administrators.
    ((version, host, port, most, of_user, user),) = ask(
        "SELECT @@version, @@hostname, @@port, @@max_connections, @@session.max_user_connections, CURRENT_USER()"
    )
    ((_, count),) = ask("SHOW GLOBAL STATUS LIKE 'Threads_connected'")
    # Without the privilege PROCESS these are those of this user alone.
    clients = ask(
        "SELECT user, count(*) FROM information_schema.processlist WHERE id <> CONNECTION_ID()"
        " AND user NOT IN ('system user', 'event_scheduler') GROUP BY 1 ORDER BY 2 DESC, 1"
    )
    server = f"{'MariaDB' if 'mariadb' in version.lower() else 'MySQL'} {version.split('-')[0]} at {at}"
    key, ranked = f"{host}:{port}", tuple((str(name), int(number)) for name, number in clients)
    found = [Limit(server, "max_connections", f"{key} max_connections", int(most), 0, int(count) - 1, 0, ranked)]
    if of_user:
        name = user.partition("@")[0]
        own = tuple(pair for pair in ranked if pair[0] == name)
        opened = sum(number for _, number in own)
        found.append(Limit(server, f"user {name}", f"{key} user {user}", int(of_user), 0, opened, 0, own))
    return found


def _pooler(console: Callable[[], Any], user: str, database: str, at: str) -> list[Limit]:
    """Ask PgBouncer's console ("Admin console" in its documentation) with the same user, as one of its stats_users.

    PgCat has a console of this name, too, and others have none: only what says that it is PgBouncer is called so.
    """

    def unknown(why: str) -> list[Limit]:
        server = f"a connection pooler at {at}"
        return [Limit(server, "connections", f"pooler {at}", unknown=why)]

    try:
        connection = console()
    except Exception as error:
        return unknown(
            f"it has no console for this user ({type(error).__name__}); if it is PgBouncer, add the user to stats_users"
        )
    try:

        def show(what: str) -> list[Mapping[str, Any]]:
            with connection.cursor() as cursor:
                cursor.execute(f"SHOW {what}")
                names = [column[0] for column in cursor.description]
                return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

        try:
            version = str(next(iter(show("VERSION")[0].values())))
        except Exception as error:
            return unknown(f"it does not tell its version as PgBouncer does ({type(error).__name__})")
        if not version.startswith("PgBouncer"):
            return unknown("it is not PgBouncer, whose limits alone can be asked for")
        return _pgbouncer(show, user, database, at)
    finally:
        connection.close()


def _pgbouncer(show: Callable[[str], list[Mapping[str, Any]]], user: str, database: str, at: str) -> list[Limit]:
    server = f"PgBouncer at {at}"

    def limit(name: str, most: int | None, **more: Any) -> Limit:
        return Limit(server, name, f"PgBouncer {at} {name}", most, **more)

    try:
        config = {row["key"]: row["value"] for row in show("CONFIG")}
        lists = {row["list"]: row["items"] for row in show("LISTS")}
        # Two of the clients are the one that asks the console, and the adapter's.
        clients = int(lists["used_clients"]) - 2
        found = [limit("max_client_conn", int(config["max_client_conn"]), open=clients)]
        own = next((row for row in show("DATABASES") if row["name"] == database), {})
        pools = [row for row in show("POOLS") if row["database"] == database]
        for name, row in (("max_db_client_connections", own), ("max_user_client_connections", {})):
            # Since 1.24.
            most = int(row.get("max_client_connections") or config.get(name) or 0)
            if most:
                mine = [each for each in pools if "user" not in name or each["user"] == user]
                opened = sum(int(each["cl_active"]) + int(each["cl_waiting"]) for each in mine) - 1
                found.append(limit(f"{name} of {user if 'user' in name else database}", most, open=opened))
        size = int(own.get("pool_size") or config["default_pool_size"])
        # In session mode a client keeps its server connection for as long as it is connected.
        session = (own.get("pool_mode") or config["pool_mode"]) == "session"
        spare = int(own.get("reserve_pool_size") or own.get("reserve_pool") or config["reserve_pool_size"])
        used = sum(int(each["cl_active"]) for each in pools if each["user"] == user) - 1 if session else None
        found.append(limit(f"pool of {database}, {user}", size + spare, waits=not session, open=used))
        return found
    except Exception as error:
        return [limit("max_client_conn", None, unknown=f"its console did not tell ({type(error).__name__})")]
