"""The documentation names everything public, every setting, and pages that exist."""

from __future__ import annotations

import inspect
import io
import re
from pathlib import Path

import pytest

import workerpools
import workerpools.adapter
import workerpools.fastapi
import workerpools.flask
import workerpools.flower
import workerpools.httpx
import workerpools.opentelemetry
import workerpools.prometheus
import workerpools.redis
import workerpools.requests
import workerpools.sqlalchemy
import workerpools.testing
from demo_tasks.runner.screen import Screen
from demo_tasks.summary import Summary
from tests.docs import (
    alerts_page,
    check_page,
    demo_picture,
    exporter_pages,
    settings_page,
    statistics_page,
    versions_page,
)
from tests.docs.markdown import pages
from tests.support.paths import ROOT
from workerpools._celery.settings import all_settings
from workerpools._stats.metrics import AGES, BOUNDS
from workerpools._stats.rules import RULES, Thresholds
from workerpools.adapter import Setting
from workerpools.httpx import _CLIENT_OPTIONS, HttpxClient
from workerpools.redis import RedisClient
from workerpools.requests import RequestsSession
from workerpools.sqlalchemy import SQLAlchemyEngine

# Two sides of one page: a link to a heading, and what GitHub makes of the heading.
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (?P<title>.+)$", re.MULTILINE)
_FENCED = re.compile(r"^(```|<!--).*?(```|-->)$", re.MULTILINE | re.DOTALL)


def _api() -> str:
    return (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        *workerpools.__all__,
        *(f"adapter.{name}" for name in workerpools.adapter.__all__),
        *(f"fastapi.{name}" for name in workerpools.fastapi.__all__),
        *(f"flask.{name}" for name in workerpools.flask.__all__),
        *(f"flower.{name}" for name in workerpools.flower.__all__),
        *(f"httpx.{name}" for name in workerpools.httpx.__all__),
        *(f"opentelemetry.{name}" for name in workerpools.opentelemetry.__all__),
        *(f"prometheus.{name}" for name in workerpools.prometheus.__all__),
        *(f"redis.{name}" for name in workerpools.redis.__all__),
        *(f"requests.{name}" for name in workerpools.requests.__all__),
        *(f"sqlalchemy.{name}" for name in workerpools.sqlalchemy.__all__),
        *(f"testing.{name}" for name in workerpools.testing.__all__),
    ],
)
def test_public_name_is_described(name: str) -> None:
    """Each public name is in the API page's prose or headings, not only in its list of imports."""
    text = _FENCED.sub("", _api()) if not name.endswith("Error") else _api()
    assert re.search(rf"\b{name.rpartition('.')[2]}\b", text)


@pytest.mark.parametrize("adapter", [HttpxClient, RedisClient, RequestsSession, SQLAlchemyEngine])
def test_options_are_described(adapter: type) -> None:
    """Each argument of an adapter is in the API page."""
    names = {
        name
        for name, parameter in inspect.signature(adapter).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    if adapter is HttpxClient:
        names |= _CLIENT_OPTIONS
    described = set(re.findall(r"`(\w+)`", _api())) | {"url"}
    assert names <= described


@pytest.mark.parametrize("setting", all_settings(), ids=lambda setting: setting.key)
def test_setting_is_described(setting: Setting) -> None:
    """Each setting is in the settings page, with its environment variable."""
    text = settings_page.PAGE.read_text(encoding="utf-8")
    assert f"| `{setting.key}` | `{setting.variable}` |" in text


def test_settings_page_is_up_to_date() -> None:
    """The table is what the code says; `python -m tests.docs.settings_page` writes it."""
    text = settings_page.PAGE.read_text(encoding="utf-8")
    assert text == settings_page.written(text)


def test_versions_page_is_up_to_date() -> None:
    """The table is what pyproject.toml and noxfile.py say; `python -m tests.docs.versions_page` writes it."""
    text = versions_page.PAGE.read_text(encoding="utf-8")
    assert text == versions_page.written(text)


def test_every_place_names_the_same_versions() -> None:
    """README's line, the classifiers, the lowest versions and nox's sessions."""
    named, project = versions_page.promised(), versions_page.project()
    pythons, lowest = named["PYTHONS"], versions_page.bounds()
    line = next(line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "Celery 5" in line)
    celery, sqlalchemy = f"{named['CELERY'][0]}–{named['CELERY'][-1]}", ", ".join(named["SQLALCHEMY"])
    assert line.startswith(f"Python {pythons[0]}–{pythons[-1]} · Celery {celery} · SQLAlchemy {sqlalchemy} ·")
    classifiers = [entry.rpartition(" ")[2] for entry in project["classifiers"] if ":: Python :: 3." in entry]
    assert (classifiers, project["requires-python"]) == (pythons, f">={pythons[0]}")
    assert lowest["celery"][0] == named["CELERY"][0]
    assert lowest["sqlalchemy"][0].startswith(f"{named['SQLALCHEMY'][0]}.")
    assert {python for python, _ in named["VERSIONS"]} <= set(pythons)
    assert named["VERSIONS"][0] == (pythons[0], "lowest-direct")


def test_check_page_is_up_to_date() -> None:
    """The table is what the code says; `python -m tests.docs.check_page` writes it."""
    text = check_page.PAGE.read_text(encoding="utf-8")
    assert text == check_page.written(text)


def test_statistics_page_is_up_to_date() -> None:
    """The table is what the code says; `python -m tests.docs.statistics_page` writes it."""
    text = statistics_page.PAGE.read_text(encoding="utf-8")
    assert text == statistics_page.written(text)
    for bounds in (BOUNDS, AGES):
        assert ", ".join(f"{bound:g}" for bound in bounds[:-1]) + f" and {bounds[-1]:g} s" in " ".join(text.split())


@pytest.mark.parametrize("page", [exporter_pages.PROMETHEUS, exporter_pages.OPENTELEMETRY], ids=lambda page: page.stem)
def test_exporter_pages_are_up_to_date(page: Path) -> None:
    """The tables are what the code says; `python -m tests.docs.exporter_pages` writes them."""
    assert page.read_text(encoding="utf-8") == exporter_pages.written(page)


def test_every_alerting_rule_is_described() -> None:
    """By its name, in the page's table."""
    rules = re.findall(r"alert: (\w+)", (ROOT / "workerpools" / "monitoring" / "alerts.yml").read_text())
    text = exporter_pages.PROMETHEUS.read_text(encoding="utf-8")
    assert len(rules) > 5
    assert [rule for rule in rules if f"| `{rule}` |" not in text] == []


def test_alerts_page_is_up_to_date() -> None:
    """The table is what the code says; `python -m tests.docs.alerts_page` writes it."""
    text = alerts_page.PAGE.read_text(encoding="utf-8")
    assert text == alerts_page.written(text)


def test_rules_name_settings_that_exist() -> None:
    """Each setting of a rule, and every threshold has its setting."""
    names = {setting.name for setting in all_settings()}
    assert {name for rule in RULES for name in rule.settings} <= names
    assert {f"alert_{name}" for name in Thresholds.__dataclass_fields__} - {"alert_leak_after"} <= names


def _anchors(page: Path) -> set[str]:
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    titles = (match["title"].lower() for match in _HEADING.finditer(text))
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*pages(), ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """A link within the checkout leads to a file that exists and to a heading that it has."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    for match in _LINK.finditer(text):
        target, _, anchor = match["target"].partition("#")
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.is_file(), f"{page.name}: {match['target']}"
        assert path.is_relative_to(ROOT), f"{page.name}: {match['target']} leads out of the checkout"
        assert not anchor or anchor in _anchors(path), f"{page.name}: {match['target']}"


def test_every_page_is_linked() -> None:
    """README and the index lead to every page."""
    names = {page.name for page in pages()} - {"README.md", "index.md"}
    for start in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        linked = {
            Path(match["target"].partition("#")[0]).name for match in _LINK.finditer(start.read_text(encoding="utf-8"))
        }
        assert names <= linked


def test_code_comes_early() -> None:
    """The README shows code within its first thirty lines, after a picture, and ends after 150."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    code = lines.index("```python")
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", "\n".join(lines[:code]))
    assert code < 30
    assert len(lines) <= 150
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_the_map_has_every_room() -> None:
    """Each public module and package of the library, and those of its layers that hold several."""
    picture = (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
    told = {word.strip("/") for text in re.findall(r">([^<]+)</text>", picture) for word in text.split(" · ")}
    rooms = {path.stem for path in (ROOT / "workerpools").iterdir() if (path / "__init__.py").is_file()}
    rooms |= {path.stem for path in (ROOT / "workerpools").glob("*.py") if not path.stem.startswith("_")}
    assert rooms - {"errors"} <= told


def test_the_picture_shows_todays_demo() -> None:
    """Its first lines and its headings are what the demo says; `python -m tests.docs.demo_picture` draws it again."""
    shown = demo_picture.text(demo_picture.PICTURE.read_text(encoding="utf-8"))
    stream = io.StringIO()
    screen = Screen(stream)
    screen.opening(2000, 4)
    nobody = Summary(2000, 2000, 0, 1.0, {}, {}, {}, backends_killed=8)
    screen.summary(nobody)
    lines, said = (
        [re.sub(r"[\s|│]+", " ", line).strip() for line in each] for each in (stream.getvalue().splitlines(), shown)
    )
    assert said[1:4] == lines[:3]
    headings = [line for line in lines if line.endswith(("suppliers:", "async httpx"))]
    assert len(headings) == 2
    assert set(headings) <= set(said)
    assert nobody.closing()[0] in said
    assert any(line.startswith("2,000 tasks: 2,000 succeeded, 0 failed") for line in said)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_prose_fits(page: Path) -> None:
    """Prose is wrapped; tables and quoted messages are as wide as they need."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    wide = [line for line in text.splitlines() if len(line) > 115 and not line.startswith("|")]
    assert not wide
