"""The services of docker-compose.yml with exactly their commands and environment, on this machine's servers.

Only what a container engine would provide is put in its place: the names of hosts become addresses of the embedded
servers, published ports become free ones, and the installed image becomes this interpreter's environment.
"""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis

from demo_tasks.servers.ports import free_port
from demo_tasks.workload import USES
from tests.compose import compose_file
from tests.support.databases import Database
from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.worker]

CREDENTIALS = "someone:a-password"
TASKS = 2000


@dataclass
class Stack:
    """The services of the file, as processes.

    Attributes:
        folder: Takes the place of the image's working directory.
        substitutes: What stands in the file, and what stands for it here.
        password: The database's password.
    """

    folder: Path
    substitutes: Mapping[str, str]
    password: str
    services: dict[str, dict[str, Any]] = field(init=False)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shell = {"FLOWER_BASIC_AUTH": CREDENTIALS, "POSTGRES_PASSWORD": self.password}
        self.services = compose_file.services(shell)

    def command(self, name: str) -> list[str]:
        return [self._here(argument) for argument in self.services[name]["command"]]

    def environment(self, name: str) -> dict[str, str]:
        given = {key: self._here(value) for key, value in self.services[name].get("environment", {}).items()}
        # Nothing else of this process's environment: a container has only its own.
        return {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(self.folder),
            "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
            "TEST_SESSION_MARK": os.environ.get("TEST_SESSION_MARK", ""),
            **given,
        }

    def start(self, name: str) -> None:
        with self.log(name).open("wb") as log:
            self.running[name] = subprocess.Popen(
                self.command(name),
                cwd=self.folder,
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def healthy(self, name: str) -> bool:
        check = self.services[name]["healthcheck"]
        kind, *command = check["test"]
        assert kind == "CMD"
        done = subprocess.run(
            [self._here(argument) for argument in command],
            cwd=self.folder,
            env=self.environment(name),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            # A machine that runs other tests at the same time is slower than a container of its own.
            timeout=3 * compose_file.seconds(check["timeout"]),
            check=False,
        )
        return done.returncode == 0

    def wait_healthy(self, name: str, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while not self.healthy(name):
            assert self.running[name].poll() is None, f"{name} has ended:\n{self.log(name).read_text()}"
            assert time.monotonic() < deadline, f"{name} is not healthy:\n{self.log(name).read_text()}"
            time.sleep(0.2)

    def wait(self, name: str, timeout: float) -> int:
        return self.running[name].wait(timeout)

    def stop(self, name: str) -> int:
        """Stop a service as an engine does; it must end within its grace period."""
        process = self.running[name]
        process.send_signal(signal.SIGTERM)
        status = process.wait(compose_file.seconds(self.services[name]["stop_grace_period"]))
        del self.running[name]
        return status

    def kill(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _here(self, text: str) -> str:
        for there, here in self.substitutes.items():
            text = text.replace(there, here)
        return text


@pytest.fixture
def stack(tmp_path: Path, broker_url: str, database: Database) -> Iterator[Stack]:
    """The services; redis and postgres are those of the session."""
    upstream, flower, metrics = free_port(), free_port(), free_port()
    substitutes = {
        # First: the ports of this machine's servers may contain this one.
        "9808": str(metrics),
        "redis://redis:6379/0": broker_url,
        "workerpools@postgres:5432/workerpools": f"{database.user}@{database.host}:{database.port}/{database.name}",
        "http://upstream:8080": f"http://127.0.0.1:{upstream}",
        "0.0.0.0:8080": f"127.0.0.1:{upstream}",
        "127.0.0.1:8080": f"127.0.0.1:{upstream}",
        "--address=0.0.0.0": "--address=127.0.0.1",
        "--port=5555": f"--port={flower}",
        "127.0.0.1:5555": f"127.0.0.1:{flower}",
        # What the Dockerfile copies.
        "/app/demo_tasks/flowerconfig.py": str(ROOT / "demo_tasks" / "flowerconfig.py"),
    }
    with ExitStack() as opened:
        made = Stack(tmp_path, substitutes, database.password)
        opened.callback(made.kill)
        yield made


def flower_status(stack: Stack, credentials: str | None, path: str = "/workers") -> int:
    port = next(argument for argument in stack.command("flower") if argument.startswith("--port=")).partition("=")[2]
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if credentials is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(credentials.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.timeout(300)
def test_the_services_work_together(stack: Stack, database: Database, broker_url: str) -> None:
    """In the order of their dependencies each service becomes healthy, and the submitter's tasks all succeed."""
    stack.start("upstream")
    assert not stack.healthy("worker")
    stack.wait_healthy("upstream")
    stack.start("worker")
    stack.wait_healthy("worker")
    stack.start("flower")
    stack.start("submit")
    stack.wait_healthy("flower")

    for path in ("/workers", "/pools", "/api/pools"):
        assert flower_status(stack, None, path) == 401
        assert flower_status(stack, "someone:another-password", path) == 401
        assert flower_status(stack, CREDENTIALS, path) == 200

    status = stack.wait("submit", 200)
    output = stack.log("submit").read_text()
    assert status == 0, output
    assert f"{TASKS:,} tasks: {TASKS:,} succeeded, 0 failed" in output
    assert "none lost, none twice" in output
    assert "\x1b" not in output
    # Counted across containers: four children, and a connection of each resource for each of them.
    children = [line for line in output.splitlines() if "(a client per task: " in line]
    assert len(children) == 4
    for line in children:
        assert "1 connection of db" in line
        assert "1 connection of cache" in line
        assert " of suppliers " in line
    assert database.execute("SELECT count(*) FROM orders") == [(TASKS // len(USES),)]

    assert stack.stop("flower") == 0
    assert stack.stop("worker") == 0
    left = database.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'workerpools %'")
    assert left == [(0,)]
    with closing(redis.Redis.from_url(broker_url, decode_responses=True)) as client:
        assert [each for each in client.client_list() if each["name"] == "shop"] == []
    assert stack.stop("upstream") == 0


def test_submitter_without_a_database(stack: Stack) -> None:
    """The submitter says what is missing and fails, without a password in its output."""
    environment = stack.environment("submit")
    environment["PGPASSWORD"] = "wrong-password"
    code = "import demo_tasks.submit as s, sys; s.START_TIMEOUT = 0.0; sys.exit(s.main([]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=stack.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("submit: ")
    assert "password authentication failed" in done.stderr
    assert "wrong-password" not in done.stderr
    assert "Traceback" not in done.stderr
