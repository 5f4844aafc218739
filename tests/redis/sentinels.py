"""A primary, a replica and Sentinels: real processes that fail over."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from demo_tasks.servers import ValkeyServer, Workspace
from demo_tasks.servers.binaries import valkey_program
from demo_tasks.servers.command import Command

SERVICE = "shop"


class Member(ValkeyServer):
    """A server with the password of its service, which follows another one if that is given."""

    def __init__(self, workspace: Workspace, name: str, password: str, primary: Member | None = None) -> None:
        super().__init__(workspace, name=name)
        self.password = password
        self._primary = primary

    def _command(self, port: int) -> Command:
        command = super()._command(port)
        with open(self.directory / "valkey.conf", "a") as file:
            file.write(f"masterauth {self.password}\nrepl-diskless-sync-delay 0\n")
            if self._primary is not None:
                file.write(f"replicaof {self._primary.host} {self._primary.port}\n")
        return command


class SentinelServer(ValkeyServer):
    """A Sentinel that alone decides."""

    def __init__(self, workspace: Workspace, primary: Member, name: str = "sentinel") -> None:
        super().__init__(workspace, name=name)
        self._primary = primary

    def _command(self, port: int) -> Command:
        configuration = self.directory / "sentinel.conf"
        primary = self._primary
        configuration.write_text(
            f"bind {self.host}\nport {port}\nrequirepass {self.password}\ndaemonize no\n"
            f"sentinel monitor {SERVICE} {primary.host} {primary.port} 1\n"
            f"sentinel auth-pass {SERVICE} {primary.password}\n"
            f"sentinel down-after-milliseconds {SERVICE} 300\nsentinel failover-timeout {SERVICE} 2000\n"
        )
        return Command((str(valkey_program()), str(configuration), "--sentinel"), self.directory, dict(os.environ))

    def _answers(self) -> bool:
        with closing(_client(self)) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False


def _client(server: ValkeyServer) -> Any:
    options = {"socket_timeout": 2.0, "retry": Retry(NoBackoff(), 0), "protocol": 2}
    return redis.Redis(host=server.host, port=server.port, password=server.password, **options)


@dataclass
class Service:
    """What a client of Sentinels sees, and what happens to it."""

    members: list[Member]
    sentinel: SentinelServer
    own: list[Any] = field(default_factory=list)

    def url(self, scheme: str = "redis", path: str = f"{SERVICE}/0") -> str:
        """The URL of the service."""
        return f"{scheme}+sentinel://:{self.members[0].password}@127.0.0.1:1,127.0.0.1:{self.sentinel.port}/{path}"

    def primary(self) -> Member:
        """The member that says that it is the primary."""
        (found,) = [each for each, client in zip(self.members, self.own, strict=True) if _role(client) == b"master"]
        return found

    def client(self, member: Member) -> Any:
        """A client of the test's own."""
        return self.own[self.members.index(member)]

    def fail_over(self) -> Member:
        """Make the replica the primary, in order; return the new one once Sentinel names it."""
        before = self.primary()
        asked = _client(self.sentinel)
        with closing(asked):
            _eventually(lambda: _replicas(asked) == 1)
            asked.execute_command("SENTINEL", "FAILOVER", SERVICE)
            _eventually(lambda: _named(asked) != before.port)
            _eventually(lambda: [_role(client) for client in self.own].count(b"slave") == 1)
        return self.primary()


def _replicas(client: Any) -> int:
    found = client.execute_command("SENTINEL", "REPLICAS", SERVICE)
    flags = [dict(zip(each[::2], each[1::2], strict=True)) if isinstance(each, list) else each for each in found]
    return sum(
        (each.get(b"flags") or each.get("flags")) in (b"slave", "slave")
        and (each.get(b"master-link-status") or each.get("master-link-status")) in (b"ok", "ok")
        for each in flags
    )


def _named(client: Any) -> int:
    return int(client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])


def _role(client: Any) -> Any:
    try:
        return client.execute_command("ROLE")[0]
    except redis.RedisError:
        return None


def _eventually(question: Any, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            if question():
                return
        except redis.RedisError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError("it never came true")
        time.sleep(0.02)


@contextmanager
def service(workspace: Workspace) -> Iterator[Service]:
    """Start a service."""
    with ExitStack() as opened:
        first = opened.enter_context(Member(workspace, "sentinel-first", "sentinels-password"))
        second = opened.enter_context(Member(workspace, "sentinel-second", first.password, first))
        sentinel = opened.enter_context(SentinelServer(workspace, first))
        own = [opened.enter_context(closing(_client(each))) for each in (first, second)]
        yield Service([first, second], sentinel, own)
