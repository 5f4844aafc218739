"""Writes the table of ``docs/versions.md``: ``python -m tests.docs.versions_page``.

The table is made from ``pyproject.toml`` and ``noxfile.py``; a test fails while the page says something else.
"""

from __future__ import annotations

import ast
import re
import sys
from typing import Any

from tests.docs.tables import begin, replaced
from tests.support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = ROOT / "docs" / "versions.md"
BEGIN = begin("versions_page")
REQUIREMENT = re.compile(r"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)(?:; python_version >= '([\d.]+)')?")


def project() -> dict[str, Any]:
    """Return the table ``project`` of ``pyproject.toml``."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def promised() -> dict[str, Any]:
    """Return what ``noxfile.py`` names: PYTHONS, CELERY, SQLALCHEMY, VERSIONS."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in {"PYTHONS", "CELERY", "SQLALCHEMY", "VERSIONS"}
    }


def bounds() -> dict[str, tuple[str, str, list[str]]]:
    """Return each distribution's lowest version, the Python that it needs, and the extras that bring it."""
    found: dict[str, tuple[str, str, list[str]]] = {}
    wanted = {"": project()["dependencies"], **project()["optional-dependencies"]}
    for extra, requirements in wanted.items():
        for requirement in requirements:
            matched = REQUIREMENT.fullmatch(requirement)
            if matched is None:
                assert requirement.startswith("workerpools["), requirement
                continue
            name, lowest, python = matched.groups()
            known = found.get(name)
            if known is None or (known[0] == lowest and known[1] == (python or "")):
                found.setdefault(name, (lowest, python or "", []))[2].append(extra)
            else:
                # A higher bound of another extra: a line of its own.
                found[f"{name} ({extra})"] = (lowest, python or "", [extra])
    return found


def table() -> str:
    """Return the table, with a line for Python and one for each library."""
    names = promised()
    lowest, *newest = [python for python, _ in names["VERSIONS"]]
    rows = [f"| Python | {names['PYTHONS'][0]} to {names['PYTHONS'][-1]} | |"]
    for name, (version, python, extras) in bounds().items():
        needs = f"; Python {python} or newer" if python else ""
        brought = "always" if "" in extras else ", ".join(f"`{extra}`" for extra in extras)
        rows.append(f"| {name.partition(' ')[0]} | {version} or newer{needs} | {brought} |")
    head = f"| | allowed; the lowest is tested on Python {lowest}, the newest on {' and '.join(newest)} | extra |"
    return "\n".join([head, "|---|---|---|", *rows])


def written(text: str) -> str:
    """Return the page's text with its table as it should be."""
    return replaced(PAGE, text, BEGIN, table())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
