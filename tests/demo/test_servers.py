"""``./demo --servers``: what the README's example needs, and nothing else."""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from demo_tasks.runner.cli import main
from tests.demo.running import DemoRun
from tests.docs.markdown import blocks
from tests.support.paths import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.worker, pytest.mark.timeout(300)]

UP = "Everything stays up until Ctrl-C."


def visible(page: Path, heading: str) -> list[str]:
    """The commands of the shell blocks under a heading, one a line."""
    lines = page.read_text().splitlines()
    begin = lines.index(heading)
    end = next((n for n in range(begin + 1, len(lines)) if lines[n].startswith("## ")), len(lines))
    found = [block.text for block in blocks(page) if block.language == "sh" and begin < block.line <= end]
    return "".join(found).replace("\\\n", " ").splitlines()


def test_the_readmes_first_task(place: Path, tmp_path: Path) -> None:
    """Its commands, line by line as they stand, with shop.py as it stands: a task of one's own, and where it shows."""
    commands = visible(ROOT / "README.md", "## Your first task")
    servers, *others = commands
    assert servers.startswith("./demo --servers --env-file shop.env")
    activate, worker, *asked = others
    # The environment that ./demo makes is the one that runs the tests.
    assert activate == ". .venv/bin/activate && . ./shop.env"
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    (shop,) = (block.text for block in blocks(ROOT / "README.md") if block.file_name == "shop.py")
    (tmp_path / "shop.py").write_text(shop)
    env = environment({"PATH": "/usr/bin:/bin", "BROKER_URL": "", "DATABASE_URL": "", "API_URL": ""})
    with DemoRun(*shlex.split(servers, comments=True)[1:], cwd=tmp_path) as run:
        run.wait_for(UP)
        assert stat.S_IMODE((tmp_path / "shop.env").stat().st_mode) == 0o600
        with (tmp_path / "worker.log").open("wb") as log:
            working = subprocess.Popen(
                ["sh", "-c", f"{activate} && exec {worker}"], cwd=tmp_path, env=env, stdout=log, stderr=log
            )
        try:
            told = []
            for command in asked:
                done = subprocess.run(
                    ["sh", "-c", f"{activate} && {command}"],
                    cwd=tmp_path,
                    env=env,
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                assert done.returncode == 0, done.stderr + (tmp_path / "worker.log").read_text()
                told.append(done.stdout)
        finally:
            working.terminate()
            working.wait(60)
        run.signal(signal.SIGINT)
        assert run.wait() == 0
    assert told[0] == "teapot\n"
    assert "api " in told[1]
    assert "db " in told[1]
    assert "value_opened resource=api" in (tmp_path / "worker.log").read_text()
    # The addresses of servers that are gone lead nobody astray.
    assert not (tmp_path / "shop.env").exists()


def test_addresses_to_paste(place: Path, tmp_path: Path) -> None:
    """Without a file; and servers of the environment, dead ones of an earlier call for one, are not used."""
    with DemoRun("--servers", cwd=tmp_path, env={"DATABASE_URL": "postgresql://me@127.0.0.1:1/gone"}) as run:
        run.wait_for(UP)
        lines = [line for line in run.text.splitlines() if line.startswith("export ")]
        assert [line.partition("=")[0] for line in lines] == [
            *("export BROKER_URL", "export DATABASE_URL", "export API_URL")
        ]
        code = (
            "import os, httpx, sqlalchemy as s; e = s.create_engine(os.environ['DATABASE_URL']); "
            "print(httpx.get(os.environ['API_URL'] + '/orders/3').json()['id'], "
            "e.connect().scalar(s.text('SELECT count(*) FROM orders')))"
        )
        script = "\n".join([*lines, shlex.join([sys.executable, "-c", code])])
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, env=dict(os.environ))
        assert done.stdout == "3 0\n"
        run.signal(signal.SIGTERM)
        assert run.wait() == 0
    assert re.findall(r"^(\w.*) stopped$", run.text, re.MULTILINE) == ["HTTP server", "Redis", "PostgreSQL"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written(place: Path, tmp_path: Path) -> None:
    """Said in a sentence; nothing is left behind."""
    with DemoRun("--servers", "--env-file", str(tmp_path / "missing" / "env"), cwd=tmp_path) as run:
        assert run.wait() == 1
    assert "demo: The addresses cannot be written to " in run.text
    assert "Traceback" not in run.text


@pytest.mark.parametrize("arguments", [("--servers", "--once"), ("--servers", "--report", "f"), ("--env-file", "f")])
def test_options_that_contradict(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is started."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "--servers" in capsys.readouterr().err
