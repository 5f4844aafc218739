"""An HTTP server on 127.0.0.1 that closes idle connections soon: the shop's API under gunicorn."""

from __future__ import annotations

import errno
import http.client
import os
import signal
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar, Literal

from demo_tasks.servers.binaries import require_modules
from demo_tasks.servers.command import Command
from demo_tasks.servers.errors import PortTakenError
from demo_tasks.servers.ports import LOOPBACK, listening_socket
from demo_tasks.servers.process import ServerProcess

if TYPE_CHECKING:
    import subprocess

    from demo_tasks.servers.workspace import Workspace

_CONFIGURATION = Path(__file__).with_name("_gunicorn.py")
_ROOT = Path(__file__).resolve().parents[2]
# Variables that gunicorn takes settings or sockets from.
_IGNORED = ("GUNICORN_CMD_ARGS", "GUNICORN_FD", "LISTEN_FDS", "LISTEN_PID", "WEB_CONCURRENCY")


class HttpUpstream(ServerProcess):
    """An HTTP server of this run's own, with ``GET /orders/7`` and httpbin's resources.

    Args:
        workspace: Where the log file and gunicorn's temporary files go.
        workers: How many worker processes serve requests.
        threads: How many requests a worker process serves at a time.
        keepalive: How long an idle connection stays open, in seconds.
        name: The server's name, which must be unique in the workspace.
        port: The port; None for a free one.

    Attributes:
        host: The address that the server listens on.
    """

    # Graceful with requests in flight, then at once.
    stop_signals: ClassVar[tuple[tuple[signal.Signals, float], ...]] = (
        (signal.SIGTERM, 5.0),
        (signal.SIGQUIT, 2.0),
    )

    def __init__(
        self,
        workspace: Workspace,
        *,
        workers: int = 1,
        threads: int = 8,
        keepalive: int = 2,
        name: str = "upstream",
        port: int | None = None,
    ) -> None:
        super().__init__(workspace, name)
        self._port = port
        self.host = LOOPBACK
        self._workers = workers
        self._threads = threads
        self._keepalive = keepalive
        self._descriptor = -1

    def url(self, path: str = "") -> str:
        """Return the URL of the server or of a resource on it.

        Args:
            path: The resource's path, with its leading slash; by default the URL has no path.
        """
        return f"http://{self.host}:{self.port}{path}"

    def reload(self) -> None:
        """Replace the worker processes; the old ones finish what they serve and close their connections.

        Returns at once. New connections are accepted all the while; an idle one is closed by gunicorn 27
        after the keep-alive time or two seconds, whichever is shorter, so that a request on its way to it is
        still answered.

        Raises:
            ServerError: The server is not running.
        """
        self.send_signal(signal.SIGHUP)

    def restart(self, mode: Literal["graceful", "immediate"] = "graceful") -> None:
        """Stop the server and start it again on the same port.

        Args:
            mode: `graceful` lets requests in flight end for a few seconds; `immediate` kills the server,
                which resets or closes every connection at once, whatever is in flight.
        """
        if mode not in ("graceful", "immediate"):
            raise ValueError(f"mode must be 'graceful' or 'immediate', not {mode!r}")
        self._end(() if mode == "immediate" else self.stop_signals)
        self.start()

    def _prepare(self) -> None:
        require_modules("gunicorn", "httpbin")

    def _spawn(self, port: int | None, log: IO[bytes]) -> tuple[int, subprocess.Popen[bytes]]:
        # gunicorn takes an open socket, so this server cannot lose its port between the choice and the bind.
        try:
            sock = listening_socket(port or 0)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            message = f"Port {port} of the server {self.name!r} is taken."
            raise PortTakenError(message) from None
        # The copy of this process is closed, so that connections are refused while the server is down.
        with sock:
            bound: int = sock.getsockname()[1]
            self._descriptor = sock.fileno()
            return bound, self._command(bound).launch(log)

    def _command(self, port: int) -> Command:
        environment = {name: value for name, value in os.environ.items() if name not in _IGNORED}
        # Workers import the application from the directories that the user installed; nothing is written
        # there.
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        return Command(
            [
                *(sys.executable, "-m", "gunicorn", "demo_tasks.api:app", "--pythonpath", str(_ROOT)),
                *("--config", str(_CONFIGURATION)),
                *("--bind", f"fd://{self._descriptor}", "--worker-tmp-dir", str(self.directory)),
                *("--workers", str(self._workers), "--threads", str(self._threads)),
                *("--keep-alive", str(self._keepalive)),
            ],
            self.directory,
            environment,
            inherit=(self._descriptor,),
        )

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=2.0)
        try:
            connection.request("GET", "/status/204", headers={"Connection": "close"})
            return connection.getresponse().status == 204
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
