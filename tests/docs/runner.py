"""Executes the blocks of one page, in a process of the page's own: ``python -m tests.docs.runner PAGE REPORT``.

Blocks share one namespace, as if they had been typed one after the other. A Python block whose first line is
``# name.py`` is written to that file, and imported; ``# package/name.py`` is only written. So is the new text of a
diff; its old text is written to the directory ``before``. The report lists the lines of the blocks that were executed.

Hidden blocks may use ``log()`` (what the page's workers wrote), ``stop()`` (which stops these), ``sh(commands)``,
``run_before(code)`` (runs Python in the directory ``before``), ``shown(text)`` (the page quotes that text, where an
ellipsis stands for anything), ``sql(statement)``, ``eventually(question)`` and ``PAGE``, the page's path.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.docs.markdown import Block, blocks
from tests.docs.shell import Shell


def sql(statement: str) -> list[tuple[Any, ...]]:
    """Execute one statement on a connection of its own; return its rows."""
    import psycopg2

    url = os.environ["DATABASE_URL"].replace("+psycopg2", "")
    with closing(psycopg2.connect(url, application_name="docs")) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description is not None else []


def eventually(question: Callable[[], object], timeout: float = 30.0) -> None:
    """Wait until ``question`` has a true answer."""
    deadline = time.monotonic() + timeout
    while not question():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


class Runner:
    """One page.

    Args:
        page: Its path.
        directory: Where its files are written.
    """

    def __init__(self, page: Path, directory: Path) -> None:
        self._page = page
        self._directory = directory
        self._shell = Shell(directory)
        self.executed: list[int] = []
        self._namespace: dict[str, Any] = {
            "PAGE": str(page),
            "__name__": "__page__",
            "run_before": self._run_before,
            "eventually": eventually,
            "log": self._shell.log,
            "sh": self._shell.run,
            "shown": self._shown,
            "sql": sql,
            "stop": self._shell.stop,
        }

    def run(self) -> None:
        """Execute every block; the first that fails ends it."""
        try:
            for block in blocks(self._page):
                languages = {
                    "diff": self._diff,
                    "python": self._python,
                    "sh": self._sh,
                    "sql": self._sql,
                    "yaml": self._yaml,
                }
                execute = languages.get(block.language)
                if execute is not None:
                    execute(block)
                    self.executed.append(block.line)
        except BaseException:
            print(self._shell.log(), file=sys.stderr)
            raise
        finally:
            self._shell.stop()

    def _python(self, block: Block) -> None:
        if (name := block.file_name) is not None:
            if "/" in name:
                # Of a package: it may need another one to be imported.
                self._write(name, block.text)
                return
            self._import(name, block.text)
            return
        # With the lines of the page before it, a traceback shows the page's own line.
        code = compile("\n" * block.line + block.text, str(self._page), "exec", dont_inherit=True)
        exec(code, self._namespace)

    def _diff(self, block: Block) -> None:
        name = block.file_name
        assert name is not None, f"{block.page}:{block.line}: a diff names its file in its first line"
        self._write(f"before/{name}", block.before)
        if "/" in name:
            self._write(name, block.after)
        else:
            self._import(name, block.after)

    def _write(self, name: str, text: str) -> None:
        path = self._directory / name
        for package in list(Path(name).parents)[:-1]:
            (self._directory / package).mkdir(exist_ok=True)
            (self._directory / package / "__init__.py").touch()
        path.write_text(text)

    def _import(self, name: str, text: str) -> None:
        self._write(name, text)
        importlib.invalidate_caches()
        module = importlib.import_module(name.removesuffix(".py"))
        self._namespace.update({key: value for key, value in vars(module).items() if not key.startswith("__")})

    def _run_before(self, code: str) -> None:
        # The directory itself comes first on the path, before the page's.
        subprocess.run([sys.executable, "-c", code], cwd=self._directory / "before", check=True, timeout=60)

    def _sh(self, block: Block) -> None:
        self._shell.run(block.text)

    def _sql(self, block: Block) -> None:
        for statement in filter(str.strip, block.text.split(";")):
            sql(statement)

    def _yaml(self, block: Block) -> None:
        # A part of somebody's file: that it is well-formed is all that can be said.
        assert isinstance(YAML(typ="safe").load(block.text), dict)

    def _shown(self, text: object) -> None:
        """Assert that the page quotes ``text``."""
        said = _plain(str(text))
        for quote in self._quotes():
            pattern = ".*".join(re.escape(part) for part in _plain(quote).split("…"))
            if re.fullmatch(pattern, said):
                return
        raise AssertionError(f"{self._page.name} does not quote: {said}")

    def _quotes(self) -> list[str]:
        text = self._page.read_text(encoding="utf-8")
        text = re.sub(r"^(```|<!-- python).*?^(```|-->)$", "", text, flags=re.MULTILINE | re.DOTALL)
        fenced = [block.text for block in blocks(self._page) if block.language == "text"]
        return [*fenced, *(line for part in fenced for line in part.splitlines()), *re.findall(r"`([^`]+)`", text)]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def main() -> None:
    """Run the page that the command line names."""
    page, report = Path(sys.argv[1]), Path(sys.argv[2])
    directory = Path.cwd()
    sys.path.insert(0, str(directory))
    runner = Runner(page, directory)
    try:
        runner.run()
    finally:
        report.write_text(json.dumps(runner.executed))


if __name__ == "__main__":
    main()
