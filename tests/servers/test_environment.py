"""Servers named by environment variables are used as they are."""

from __future__ import annotations

import pytest

from demo_tasks.servers import (
    ExternalDatabase,
    ExternalRedis,
    ExternalUpstream,
    ServerError,
    Workspace,
    from_environment,
)

_URLS = {
    "DATABASE_URL": "postgres://app:se%40cret@db:5433/shop?sslmode=require",
    "REDIS_URL": "redis://:se%40cret@broker/2",
    "UPSTREAM_URL": "http://upstream:8080/",
}


def test_every_server_from_the_environment(space: Workspace) -> None:
    """With all three variables set nothing is started, and the URLs are the given ones."""
    servers = from_environment(space, _URLS)
    with servers:
        database, broker, upstream = servers.database, servers.redis, servers.upstream
        assert isinstance(database, ExternalDatabase)
        assert isinstance(broker, ExternalRedis)
        assert isinstance(upstream, ExternalUpstream)
        assert database.dsn == "postgresql://app:se%40cret@db:5433/shop?sslmode=require"
        assert database.url() == "postgresql+psycopg2://app:se%40cret@db:5433/shop?sslmode=require"
        assert database.url("psycopg").startswith("postgresql+psycopg://")
        assert database.database == "shop"
        assert broker.url() == "redis://:se%40cret@broker/2"
        assert broker.url(5) == "redis://:se%40cret@broker/5"
        assert upstream.url("/get") == "http://upstream:8080/get"
    assert {path.name for path in space.path.iterdir()} == {"owner"}
    for server in (database, broker, upstream):
        assert server.running
        assert not server.managed
        assert "se%40cret" not in repr(server)
        assert "se@cret" not in repr(server)
        with pytest.raises(ServerError, match="somebody else"):
            server.restart()


def test_started_where_the_environment_names_none(space: Workspace) -> None:
    """With no variable, or an empty one, all three are started, and stopped at the end."""
    servers = from_environment(space, {"DATABASE_URL": " "})
    with servers:
        started = (servers.database, servers.redis, servers.upstream)
        assert all(server.running and server.managed for server in started)
    assert not any(server.running for server in started)


def test_failed_start_stops_the_others(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """When one server cannot start, those started before it are stopped."""
    servers = from_environment(space, {})

    def fail() -> None:
        raise ServerError("broken")

    monkeypatch.setattr(servers.upstream, "_prepare", fail)
    with pytest.raises(ServerError, match="broken"):
        servers.start()
    assert not any(server.running for server in (servers.database, servers.redis, servers.upstream))


def test_socket_url_of_postgres() -> None:
    """A database URL may do without a host; libpq takes its Unix socket then."""
    assert ExternalDatabase("postgresql:///shop").dsn == "postgresql:///shop"
    external = ExternalDatabase("postgresql+psycopg:///shop?host=/run")
    assert external.url() == "postgresql+psycopg2:///shop?host=/run"


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("DATABASE_URL", "mysql://u:se-cret@h/db"),
        ("DATABASE_URL", "postgresql://u:se-cret@h:port/db"),
        ("REDIS_URL", "amqp://u:se-cret@h//"),
        ("REDIS_URL", "redis://"),
        ("UPSTREAM_URL", "localhost:8080"),
    ],
)
def test_malformed_url_is_named_and_not_shown(space: Workspace, variable: str, url: str) -> None:
    """The error names the variable and keeps the URL's password to itself."""
    with pytest.raises(ServerError, match=variable) as caught:
        from_environment(space, {variable: url})
    assert "se-cret" not in str(caught.value)
