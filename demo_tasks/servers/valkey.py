"""A Valkey (or Redis) server on 127.0.0.1 that keeps nothing on disk."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, ClassVar

from demo_tasks.servers.binaries import valkey_program
from demo_tasks.servers.command import Command
from demo_tasks.servers.ports import LOOPBACK
from demo_tasks.servers.process import ServerProcess

if TYPE_CHECKING:
    from demo_tasks.servers.workspace import Workspace


class ValkeyServer(ServerProcess):
    """A Valkey server of this run's own; Redis where no Valkey is found.

    Args:
        workspace: Where the configuration and the log file go.
        name: The server's name, which must be unique in the workspace.

    Attributes:
        host: The address that the server listens on.
        password: The random password of the default user.
    """

    start_timeout: ClassVar[float] = 20.0

    def __init__(self, workspace: Workspace, *, name: str = "valkey") -> None:
        super().__init__(workspace, name)
        self.host = LOOPBACK
        self.password = secrets.token_urlsafe(24)

    def url(self, db: int = 0) -> str:
        """Return the URL of a database, with the password, as redis-py and Celery take it.

        Args:
            db: The number of the database, from 0 to 15.
        """
        return f"redis://:{self.password}@{self.host}:{self.port}/{db}"

    def _prepare(self) -> None:
        valkey_program()

    def _command(self, port: int) -> Command:
        # In a file, because every user of the machine can read a command line.
        configuration = self.directory / "valkey.conf"
        descriptor = os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            file.write(
                f"bind {LOOPBACK}\nport {port}\nrequirepass {self.password}\n"
                'save ""\nappendonly no\ndaemonize no\nlogfile ""\n'
            )
        return Command((str(valkey_program()), str(configuration)), self.directory, dict(os.environ))

    def _answers(self) -> bool:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        # Not before the server says so itself: a stranger may listen on a port that it failed to bind.
        if "eady to accept connections" not in self.log_tail():
            return False
        # The default retries would spend seconds on a server that is not there yet.
        client = redis.Redis(
            host=self.host,
            port=self.port,
            password=self.password,
            socket_timeout=2.0,
            socket_connect_timeout=2.0,
            retry=Retry(NoBackoff(), 0),
        )
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()
