"""Installing the page: once, late, and without harm where Flower is not what it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import flower as installed_flower
import pytest

from tests.support.flower import CONFIG, PLAIN, FlowerProcess
from tests.support.paths import environment
from workerpools.flower._templates import Unknown, with_link, with_tab

NewFlower = Callable[..., FlowerProcess]

TEMPLATES = Path(installed_flower.__file__).parent / "templates"

# The parts of Flower 2.0.1's templates that matter here.
OLD_NAVBAR = """\
    <ul class="navbar-nav mr-auto">
      <li class="nav-item">
        <a class="nav-link text-dark" href="{{ reverse_url('tasks') }}">Tasks</a>
      </li>
      <li class="nav-item">
        <a class="nav-link text-dark" href="{{ reverse_url('broker') }}">Broker</a>
      </li>
    </ul>
"""
OLD_WORKER = """\
{% set other = {key: value for key, value in worker['stats'].items() if key not in
'pool pid prefetch_count autoscaler consumer broker clock total rusage'.split()} %}
          <li class="nav-item" role="presentation"><a class="nav-link" href="#tab-system" data-bs-toggle="tab"
              data-bs-target="#tab-system" type="button" role="tab" aria-controls="tab-system"
              aria-selected="false">System</a></li>
          <div class="tab-pane fade" id="tab-system" role="tabpanel" aria-labelledby="tab-system">
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("source", [(TEMPLATES / "navbar.html").read_text(), OLD_NAVBAR], ids=["installed", "2.0.1"])
def test_link(source: str) -> None:
    """The link comes after that to the broker's page, and looks like it."""
    changed = with_link(source)
    assert changed.count("reverse_url('workerpools')") == 1
    assert changed.count(">Pools<") == changed.count(">Broker<") == 1
    assert changed.index(">Broker<") < changed.index(">Pools<")
    assert changed.count("<li") == source.count("<li") + 1
    assert changed.count("active_tab == 'workerpools'") == source.count("active_tab == 'broker'")


@pytest.mark.parametrize("source", [(TEMPLATES / "worker.html").read_text(), OLD_WORKER], ids=["installed", "2.0.1"])
def test_tab(source: str) -> None:
    """The tab comes after the system's, its pane before; what it shows is not among the other statistics."""
    changed = with_tab(source)
    assert changed.count('data-bs-target="#tab-workerpools"') == changed.count("workerpools/worker.html") == 1
    assert changed.count(">Connections<") == 1
    assert "total rusage workerpools'.split()" in changed
    assert changed.count("<li") == source.count("<li") + 1


@pytest.mark.parametrize("change", [with_link, with_tab])
@pytest.mark.parametrize(
    "source", ["", "<li>", (OLD_NAVBAR + OLD_WORKER) * 2, OLD_NAVBAR.replace("'broker'", "'brokers'")], ids=repr
)
def test_template_that_is_not_as_expected(change: Callable[[str], str], source: str) -> None:
    """What cannot be found once is not guessed at."""
    with pytest.raises(Unknown):
        change(source)


def test_importing_does_nothing() -> None:
    """Neither Flower nor Tornado is loaded by the import, and Flower is as it was."""
    code = "import workerpools.flower, sys; print(sorted({'flower', 'tornado'} & set(sys.modules)))"
    assert run(code).strip() == "[]"


def test_install_twice() -> None:
    """The second time there is nothing left to do."""
    code = """
import workerpools.flower
from flower.urls import handlers, settings
before = len(handlers)
workerpools.flower.install()
loader = settings["template_loader"]
workerpools.flower.install()
assert settings["template_loader"] is loader
print(len(handlers) - before, [handler.name for handler in handlers[-4:-1]], type(handlers[-1]).__name__)
"""
    assert run(code).strip() == "4 ['workerpools', 'workerpools_data', 'workerpools_static'] tuple"


def test_without_flower() -> None:
    """The error says what is missing and how to get it."""
    code = """
import sys
sys.modules["flower"] = None
import workerpools.flower
try:
    workerpools.flower.install()
except workerpools.ConfigurationError as error:
    print(error)
"""
    assert "which the extra 'flower' brings: pip install flower" in run(code)


@pytest.mark.parametrize(
    "change",
    [
        "del flower.urls.handlers",
        "del flower.urls.settings['template_path']",
        "del flower.views.BaseHandler",
        "flower.views.BaseHandler = object",
    ],
)
def test_structure_has_changed(change: str) -> None:
    """One line in the log, and Flower without the page: never a page without Flower's authentication."""
    code = f"""
import logging
import flower.urls, workerpools.flower
logging.basicConfig()
{change}
before = list(getattr(flower.urls, "handlers", []))
workerpools.flower.install()
assert before == list(getattr(flower.urls, "handlers", []))
"""
    lines = run(code).strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("ERROR:workerpools.flower:unsupported version of Flower")


@pytest.mark.worker
def test_templates_have_changed(flower: NewFlower) -> None:
    """A base without the block, a navigation bar and a worker's page without the places: plain, working, and logged."""
    broken = """
for name, text in (("navbar.html", "broker"), ("worker.html", "tab-system")):
    (templates / name).write_text((templates / name).read_text().replace(text, text + "s"))
"""
    head, _, tail = PLAIN.partition("base = ")
    running = flower(config=f"{head}{broken}base = {tail}".replace("url('brokers')", "url('broker')"))
    for _ in range(2):
        page = running.get("/pools")
        assert page.status == 200
        assert 'id="workerpools"' in page.body
        assert "app-navbar" not in page.body
    log = running.log()
    assert log.count("the Pools page is plain HTML") == 1
    assert log.count("the worker page shows its connection pools in raw form") == 1


@pytest.mark.worker
@pytest.mark.parametrize("broken", ["(templates / 'base.html').unlink()", "(templates / 'base.html').write_text('{%')"])
def test_base_cannot_be_used(flower: NewFlower, broken: str) -> None:
    """Whatever is wrong with it, the page is there, and the log says why it is plain."""
    running = flower(config=PLAIN.partition("base = ")[0] + broken + "\n" + CONFIG)
    page = running.get("/pools")
    assert page.status == 200
    assert "wp-plain" in page.body
    assert running.log().count("the Pools page is plain HTML") == 1


@pytest.mark.worker
def test_navigation_bar_has_changed(flower: NewFlower) -> None:
    """Without the place for the link Flower's pages are as they were; the Pools page is still within Flower's own."""
    change = """
bar = templates / "navbar.html"
bar.write_text(bar.read_text().replace("reverse_url('broker')", 'reverse_url("broker")'))
"""
    running = flower(config=PLAIN.partition("base = ")[0] + change + CONFIG)
    assert ">Pools<" not in running.get("/workers").body
    assert "app-navbar" in running.get("/pools").body
    assert running.log().count("the navigation bar has no link to the Pools page") == 1
