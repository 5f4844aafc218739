"""Flower's templates with our additions: a link in the navigation bar and a tab on the worker page."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from tornado import template

__all__ = ["OURS", "PREFIX", "PoolsLoader", "with_link", "with_tab"]

logger = logging.getLogger("workerpools.flower")

#: Where our templates are.
OURS = Path(__file__).parent / "templates"

#: The prefix of our templates' names, which sets them apart from Flower's files.
PREFIX = "workerpools/"

_ITEM = re.compile(r"[ \t]*<li\b(?:(?!<li\b).)*?</li>\s*?\n", re.DOTALL)


class Unknown(Exception):
    """A template of Flower has an unexpected structure; the message names the missing part."""


def with_link(source: str) -> str:
    """Return Flower's ``navbar.html`` with a link to the Pools page after the link to the broker page.

    Raises:
        Unknown: There is no link to the broker page.
    """
    item = _item(source, "reverse_url('broker')")
    link = item.replace("reverse_url('broker')", "reverse_url('workerpools')")
    link = link.replace("active_tab == 'broker'", "active_tab == 'workerpools'").replace(">Broker<", ">Pools<")
    return source.replace(item, item + link)


def with_tab(source: str) -> str:
    """Return Flower's ``worker.html`` with a tab for the connection pools, removed from the general statistics.

    Raises:
        Unknown: An expected tab or list is missing.
    """
    item = _item(source, 'data-bs-target="#tab-system"')
    tab = item.replace("tab-system", "tab-workerpools").replace(">System<", ">Connections<")
    pane = _once(source, r'[ \t]*<div class="tab-pane[^>]*id="tab-system"')
    known = _once(source, r"not in\s+'pool pid [a-z_ ]*rusage(?='\.split\(\))")
    only_some = "{%% if 'workerpools' in worker['stats'] %%}\n%s{%% end %%}\n"
    source = source.replace(known, f"{known} workerpools")
    source = source.replace(pane, only_some % f'{{% include "{PREFIX}worker.html" %}}\n' + pane)
    return source.replace(item, item + only_some % tab)


def _item(source: str, mark: str) -> str:
    found: list[str] = [item for item in _ITEM.findall(source) if mark in item]
    if len(found) != 1:
        raise Unknown(f"{len(found)} list items with {mark}")
    return found[0]


def _once(source: str, pattern: str) -> str:
    found = re.findall(pattern, source)
    if len(found) != 1 or source.count(found[0]) != 1:
        raise Unknown(f"{len(found)} places like {pattern}")
    return str(found[0])


_CHANGED: dict[str, tuple[Callable[[str], str], str]] = {
    "navbar.html": (with_link, "the navigation bar has no link to the Pools page"),
    "worker.html": (with_tab, "the worker page shows its connection pools in raw form"),
}


class PoolsLoader(template.Loader):
    """Loads Flower's templates, some with additions, and ours.

    Args:
        directory: The directory of Flower's templates.
    """

    def resolve_path(self, name: str, parent_path: str | None = None) -> str:
        # Our templates name what they extend or include in full; it may be a template of Flower.
        if parent_path is not None and parent_path.startswith(PREFIX):
            return name
        return super().resolve_path(name, parent_path)

    def load(self, name: str, parent_path: str | None = None) -> template.Template:
        name = self.resolve_path(name, parent_path)
        with self.lock:
            if name not in self.templates and (name.startswith(PREFIX) or name in _CHANGED):
                self.templates[name] = self._ours(name) if name.startswith(PREFIX) else self._changed(name)
        return super().load(name)

    def _ours(self, name: str) -> template.Template:
        text = (OURS / name.removeprefix(PREFIX)).read_text(encoding="utf-8")
        return template.Template(text, name=name, loader=self)

    def _changed(self, name: str) -> template.Template:
        text = (Path(self.root) / name).read_text(encoding="utf-8")
        change, otherwise = _CHANGED[name]
        try:
            return template.Template(change(text), name=name, loader=self)
        except (Unknown, template.ParseError, SyntaxError) as error:
            logger.warning("Flower's %s has an unexpected structure (%s): %s", name, error, otherwise)
            return template.Template(text, name=name, loader=self)
