"""Flower as a process, with a flowerconfig.py of a test's own."""

from __future__ import annotations

import base64
import http.client
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo_tasks.servers import Workspace
from demo_tasks.servers.command import Command
from demo_tasks.servers.process import ServerProcess
from tests.support.paths import environment

CONFIG = """\
import workerpools.flower

workerpools.flower.install()
"""

#: The same with a Flower whose base.html has no block of that name any more.
PLAIN = f"""\
import pathlib, shutil
import flower.urls

templates = pathlib.Path(__file__).with_name("templates")
shutil.copytree(flower.urls.settings["template_path"], templates, dirs_exist_ok=True)
flower.urls.settings["template_path"] = str(templates)
base = templates / "base.html"
base.write_text(base.read_text().replace("block container", "block content"))

{CONFIG}
"""


class FlowerProcess(ServerProcess):
    """`celery flower` on a free port of 127.0.0.1.

    Args:
        workspace: Where its files go.
        broker_url: The broker.
        app: `module:attribute` of the workers' app; none if empty.
        config: The text of its flowerconfig.py.
        arguments: More of its arguments.
        env: Variables to add to this process's environment.
        prefix: Its `--url_prefix`, without slashes.
    """

    start_timeout = 60.0

    def __init__(
        self,
        workspace: Workspace,
        broker_url: str,
        *,
        app: str = "",
        config: str = CONFIG,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(workspace, f"flower-{os.urandom(4).hex()}")
        self._broker_url = broker_url
        self._app = app
        self._config = config
        self._arguments = [*arguments, *([f"--url_prefix={prefix}"] if prefix else [])]
        # Open to the tests, as it is to a person with a password; tests/flower/test_access.py is about the others.
        self._env = {"FLOWER_UNAUTHENTICATED_API": "true", **(env or {})}
        self._prefix = f"/{prefix}" if prefix else ""

    def url(self, path: str = "") -> str:
        """Return the address of one of its pages."""
        return f"http://127.0.0.1:{self.port}{self._prefix}{path}"

    def get(
        self, path: str, credentials: str = "", headers: Mapping[str, str] | None = None, *, method: str = "GET"
    ) -> Answer:
        """Return what it answers to a GET, or another method, of a path below its prefix."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = dict(headers or {})
        if credentials:
            sent["Authorization"] = f"Basic {base64.b64encode(credentials.encode()).decode()}"
        try:
            connection.request(method, self._prefix + path, headers=sent)
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, response.read().decode())
        finally:
            connection.close()

    def document(self) -> dict[str, Any]:
        """Return the document that the Pools page is made from."""
        answer = self.get("/api/pools")
        assert answer.status == 200, answer.body
        found: dict[str, Any] = json.loads(answer.body)
        return found

    def log(self) -> str:
        """Return what it wrote since it was started."""
        return self._log_of_this_start()

    def _prepare(self) -> None:
        (self.directory / "flowerconfig.py").write_text(self._config)

    def _command(self, port: int) -> Command:
        argv = (
            *(sys.executable, "-m", "celery", *(["-A", self._app] if self._app else [])),
            *("--broker", self._broker_url, "flower"),
            *("--address=127.0.0.1", f"--port={port}", *self._arguments),
        )
        kept = environment({"PYTHONUNBUFFERED": "1", **self._env})
        env = {name: value for name, value in kept.items() if not name.startswith(("CELERY_", "FLOWER_"))}
        env |= {name: value for name, value in self._env.items() if name.startswith("FLOWER_")}
        return Command(argv, Path(self.directory), env)

    def _answers(self) -> bool:
        try:
            return self.get("/healthcheck").status == 200
        except (OSError, http.client.HTTPException):
            return False


class Answer:
    """What an HTTP server answered; the names of its headers are in lower case."""

    def __init__(self, status: int, headers: dict[str, str], body: str) -> None:
        self.status, self.headers, self.body = status, headers, body
