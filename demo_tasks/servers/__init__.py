"""Local servers for the demo and the tests: PostgreSQL, Valkey and an HTTP server, each a real one.

    with Workspace() as workspace, PostgresServer(workspace) as postgres:
        engine = sqlalchemy.create_engine(postgres.url())

A server binds 127.0.0.1 only, has a random password where it has passwords at all, writes into its workspace
only, and ends with the process that started it. `from_environment` takes servers from DATABASE_URL, REDIS_URL
and UPSTREAM_URL instead.
"""

from __future__ import annotations

from demo_tasks.servers.environment import Servers, from_environment
from demo_tasks.servers.errors import PortTakenError, ServerError
from demo_tasks.servers.external import ExternalDatabase, ExternalRedis, ExternalUpstream
from demo_tasks.servers.postgres import PostgresServer
from demo_tasks.servers.process import ServerProcess
from demo_tasks.servers.upstream import HttpUpstream
from demo_tasks.servers.valkey import ValkeyServer
from demo_tasks.servers.workspace import Workspace

__all__ = [
    "ExternalDatabase",
    "ExternalRedis",
    "ExternalUpstream",
    "HttpUpstream",
    "PortTakenError",
    "PostgresServer",
    "ServerError",
    "ServerProcess",
    "Servers",
    "ValkeyServer",
    "Workspace",
    "from_environment",
]
