"""The shop's app: what importing it does, and what its tasks have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.paths import environment

NO_NETWORK = """
import sys
def refuse(event, arguments):
    if event == "socket.bind" and arguments[1] == ("::1", 0):
        return  # urllib3 learns so whether the machine has IPv6
    if event.startswith("socket.") and event not in {"socket.__new__", "socket.gethostname"}:
        sys.exit(f"{event} at import")
sys.addaudithook(refuse)
"""


def run(code: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("module", ["app", "tasks", "models", "submit", "load", "runner.cli", "runner.demo"])
def test_nothing_connects_at_import(module: str, tmp_path: Path) -> None:
    """Importing any part opens no connection, resolves no name and writes no file."""
    done = run(f"{NO_NETWORK}\nimport demo_tasks.{module}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_importing_the_command_leaves_the_app_alone(tmp_path: Path) -> None:
    """The app reads its servers when it is imported, so the command must not import it before they run."""
    done = run("import demo_tasks.runner.cli, sys; sys.exit('demo_tasks.app' in sys.modules)", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_settings_come_from_the_environment(tmp_path: Path) -> None:
    """The broker and the results are in Redis, under the prefix if there is one."""
    code = "\n".join(
        (
            "from demo_tasks.app import app",
            "print(app.conf.broker_url, app.conf.result_backend)",
            "print(app.conf.broker_transport_options['global_keyprefix'])",
        )
    )
    done = run(code, tmp_path, {"REDIS_URL": "redis://broker/3", "SHOP_KEY_PREFIX": "mine:"})
    assert done.stdout.splitlines() == ["redis://broker/3 redis://broker/3", "mine:"]


def test_tasks_of_the_shop(tmp_path: Path) -> None:
    """The worker knows the tasks, and their base's resources have the names that the demo counts."""
    code = "\n".join(
        (
            "from demo_tasks.app import app",
            "app.loader.import_default_modules()",
            "from demo_tasks.tasks import ShopTask",
            "from demo_tasks.summary import RESOURCES",
            "from demo_tasks.workload import USES",
            "assert {n.rpartition('.')[2] for n in app.tasks if n.startswith('demo_tasks')} == set(USES)",
            "declared = [name for name, value in vars(ShopTask).items() if getattr(value, 'name', None) == name]",
            "assert declared == list(RESOURCES)",
            "assert {each for used in USES.values() for each in used} == set(RESOURCES)",
        )
    )
    done = run(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
