"""Runs or checks the commands of the documentation's shell blocks: none is let through unseen."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from demo_tasks.servers.ports import free_port
from tests.support.paths import ROOT

_ASSIGNMENT = re.compile(r"(?P<name>[A-Z_]+)=(?P<value>.*)", re.DOTALL)
_REQUIREMENT = re.compile(r"(?P<what>[^\[\]]+)(\[(?P<extras>[\w,\-]+)\])?")


class Shell:
    """Runs commands in a directory; a worker, a web server or a Flower that is started runs until the page's end.

    Args:
        directory: Where the page's files are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._workers: list[tuple[str, subprocess.Popen[bytes], Path]] = []

    def run(self, text: str) -> None:
        """Run one block."""
        subprocess.run(["sh", "-n"], input=text.encode(), check=True)
        for line in text.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                words = shlex.split(command, comments=True)
                if words:
                    self._command(words)

    def log(self) -> str:
        """Return what the workers wrote so far."""
        return "".join(log.read_text(errors="replace") for _, _, log in self._workers)

    def stop(self) -> None:
        """Stop the workers warmly, and expect them to end well."""
        for _, worker, _ in self._workers:
            worker.terminate()
        for command, worker, log in self._workers:
            status = worker.wait(30)
            # uvicorn ends by the signal that it was sent.
            assert status in (0, -signal.SIGTERM), f"{command} ended with {status}:\n{log.read_text()}"

    def _command(self, words: list[str]) -> None:
        environment = dict(os.environ)
        while words and (assignment := _ASSIGNMENT.fullmatch(words[0])):
            environment[assignment["name"]] = assignment["value"]
            words = words[1:]
        name, arguments = words[0], words[1:]
        if name == "export":
            for argument in arguments:
                assignment = _ASSIGNMENT.fullmatch(argument)
                assert assignment is not None, argument
                # What the page's own servers are is the test's affair.
                os.environ.setdefault(assignment["name"], assignment["value"])
        elif name == "celery":
            self._celery(arguments, environment)
        elif name in ("uvicorn", "gunicorn"):
            port = free_port()
            os.environ["WEB_URL"] = f"http://127.0.0.1:{port}"
            environment |= {"UVICORN_PORT": str(port), "GUNICORN_CMD_ARGS": f"--bind=127.0.0.1:{port}"}
            ready = {"uvicorn": "startup complete", "gunicorn": "Booting worker"}[name]
            self._start([sys.executable, "-m", *words], environment, ready)
        elif name == "pip" and arguments[0] == "install":
            for argument in arguments[1:]:
                _check_requirement(argument)
        elif name in ("./demo", "./test"):
            _check_script(name, arguments)
        elif name == "." and arguments:
            # What the page's servers and environment are is the test's affair; tests/demo runs the README's own.
            assert arguments in ([".venv/bin/activate"], ["./shop.env"]), arguments
        elif name == "python" and arguments[:1] in (["-m"], ["-c"]):
            subprocess.run([sys.executable, *arguments], env=environment, cwd=self._directory, check=True, timeout=60)
        elif name == "echo" and arguments[-2:] == [">", ".env"]:
            # The settings of docker compose; tests/compose checks that the file takes them.
            assert re.fullmatch(r"\w+=\S+", arguments[0]), arguments
        elif name == "docker" and arguments[0] == "compose":
            _check_compose(arguments[1:], environment)
        else:
            raise AssertionError(f"a command that nobody checks: {shlex.join(words)}")

    def _celery(self, arguments: list[str], environment: dict[str, str]) -> None:
        program = str(Path(sys.executable).with_name("celery"))
        ready = " ready."
        if "flower" in arguments:
            # On a port that is free: Flower takes its options from the environment, too.
            port = free_port()
            os.environ["FLOWER_URL"] = f"http://127.0.0.1:{port}"
            environment |= {"FLOWER_ADDRESS": "127.0.0.1", "FLOWER_PORT": str(port)}
            ready = "Visit me at "
        elif "worker" not in arguments:
            subprocess.run([program, *arguments], env=environment, cwd=self._directory, check=True, timeout=60)
            return
        self._start([program, *arguments], environment, ready)

    def _start(self, command: list[str], environment: dict[str, str], ready: str) -> None:
        log = self._directory / f"program-{len(self._workers)}.log"
        with log.open("wb") as output:
            worker = subprocess.Popen(
                command,
                env={**environment, "PYTHONUNBUFFERED": "1"},
                cwd=self._directory,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._workers.append((shlex.join(command), worker, log))
        deadline = time.monotonic() + 40
        while ready not in log.read_text(errors="replace"):
            if worker.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{command} is not ready:\n{log.read_text(errors='replace')}")
            time.sleep(0.05)


def _check_requirement(argument: str) -> None:
    match = _REQUIREMENT.fullmatch(argument)
    assert match is not None, argument
    assert match["what"] == ".", f"workerpools is installed from a checkout: {argument}"
    project = (ROOT / "pyproject.toml").read_text()
    table = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = set(re.findall(r"^([\w-]+) = ", table, re.MULTILINE))
    wanted = set((match["extras"] or "").split(",")) - {""}
    assert wanted <= known, f"{argument}: pyproject.toml has no extra {wanted - known}"


def _check_script(name: str, arguments: list[str]) -> None:
    # What they do is tested elsewhere (tests/demo, tests/packaging).
    assert os.access(ROOT / name, os.X_OK), f"{name} cannot be started"
    if name == "./demo":
        options = [argument for argument in arguments if argument.startswith("-")]
        help_text = subprocess.run(
            [sys.executable, "-m", "demo_tasks", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for option in options:
            assert option in help_text, f"the demo has no option {option}"
    else:
        for path in (argument for argument in arguments if "/" in argument):
            assert (ROOT / path).exists(), path


def _check_compose(arguments: list[str], environment: dict[str, str]) -> None:
    # There is no Docker where the tests run; tests/compose checks the file itself.
    text = (ROOT / "docker-compose.yml").read_text()
    assert arguments[0] in ("up", "down", "logs", "ps"), arguments
    required = set(re.findall(r"\$\{(\w+):\?", text))
    given = required & environment.keys()
    assert arguments[0] != "up" or given == required, f"docker compose needs {required - given}"
