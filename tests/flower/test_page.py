"""The Pools page in a real browser, with workers of whatever state between it and a real broker."""

from __future__ import annotations

import itertools
import json
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.flower.fake import FakeWorkers, process, resource, told, worker_stats
from tests.support.browser import Browser
from tests.support.flower import FlowerProcess
from workerpools._stats.snapshot import Alert

pytestmark = [pytest.mark.worker, pytest.mark.timeout(240)]

NewFlower = Callable[..., FlowerProcess]

ONE_WORKER = "document.querySelectorAll('#wp-workers .wp-worker [data-status=online]').length >= 1"
TWO_WORKERS = "document.querySelectorAll('#wp-workers .wp-worker [data-status=online]').length === 2"
EMPTY = "!document.getElementById('wp-empty').hidden && !document.body.innerText.includes('Asking')"

# How many connections of shop-1 are in use, one look after the other.
USED = (0, 1, 1, 2, 4, 3, 2, 3)


def two_workers() -> dict[str, Any]:
    """What a busy and a calm worker say."""
    used = itertools.cycle(USED)
    asked = itertools.count()

    def busy() -> dict[str, Any]:
        now = next(used)
        reused = 880 + 40 * next(asked) * now
        http = resource("api", "http", open=2, in_use=min(now, 2), limit=2, opened=3, reused=reused, acquire_wait=0.004)
        db = resource(
            "db", open=2, in_use=now // 2, limit=2, opened=2, reused=910, acquire_wait=0.31, failures=1, replays=1
        )
        idle = (
            resource("api", "http", open=1, limit=2, opened=1, reused=640, acquire_wait=0.002),
            resource("db", open=1, limit=2, opened=1, reused=655, acquire_wait=0.02),
        )
        past = (resource("db", opened=4, reused=1200, leaks=1),)
        # A third child has opened nothing yet.
        most = {"concurrency": 3, "ceilings": (("db", 2),)}
        return told(worker_stats(process(4001, 0, http, db), process(4002, 1, *idle, tokens=498), past=past, **most))

    calm = worker_stats(
        process(5001, None, resource("cache", "", open=3, in_use=2, opened=3, reused=77)),
        pid=5001,
        execution_pool="threads",
    )
    return {"celery@shop-1": busy, "celery@shop-2": told(calm)}


def alerts(now: float) -> list[Alert]:
    return [
        Alert("utilisation", "db", None, now - 240, 1.0, 0.8, "100 % of the connections of db were in use for 240 s."),
        Alert("acquire_wait", "db", 4001, now - 65, 6.2, 5.0, "A task waited 6.2 s for a connection of db."),
        Alert("budget_empty", "", 4001, now - 5, 0.0, 1.0, "The retry budget of this process is empty."),
    ]


def in_trouble() -> dict[str, Any]:
    """What a worker in trouble says."""
    db = resource("db", open=2, in_use=2, limit=2, pending=3, opened=2, reused=99, acquire_wait=6.2, acquire_timeouts=4)
    return told(worker_stats(process(4001, 0, db, tokens=0), alerts=alerts(time.time()), unseen=1))


def opened(page: Browser, flower: FlowerProcess, until: str = ONE_WORKER, hash: str = "") -> FlowerProcess:
    page.open(flower.url("/pools") + hash)
    page.until(until)
    return flower


def cells(page: Browser, worker: str, group: str) -> list[list[str]]:
    """Return the texts of the rows of a group in the table of a worker."""
    return page.evaluate(  # type: ignore[no-any-return]
        f"""[...document.getElementById({json.dumps("worker:" + worker)}).querySelectorAll("tbody")]
        .filter((body) => body.querySelector("[data-part=title]").textContent === {json.dumps(group)})
        .flatMap((body) => [...body.querySelectorAll(".wp-row")])
        .map((row) => [...row.children].map((cell) => cell.innerText.replace(/\\s+/g, " ").trim()))"""
    )


def shape(path: Path) -> tuple[int, int]:
    """Return the width and height of a PNG file."""
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    return int(width), int(height)


def refresh(page: Browser) -> None:
    """Have the page ask again at once, and wait until it has; Flower asks the workers not more often than it does."""
    time.sleep(2.0)
    page.evaluate("window.before = performance.getEntriesByType('resource').length")
    page.evaluate("document.getElementById('wp-pause').click(), document.getElementById('wp-pause').click()")
    page.until(
        "performance.getEntriesByType('resource').slice(window.before).some((each) => each.responseEnd"
        " && each.name.endsWith('/api/pools'))"
    )


def test_normal(page: Browser, flower: NewFlower, broker_url: str, pictures: Path) -> None:
    """A card for each worker, a row for each resource of it and of its processes, within Flower's own page."""
    page.size(1440, 900)
    with FakeWorkers(broker_url, two_workers()):
        address = opened(page, flower(), TWO_WORKERS).url()
        for _ in USED:
            refresh(page)
        page.evaluate("new Promise((done) => setTimeout(done, 500))")
        page.screenshot(pictures / "wide.png")
        assert shape(pictures / "wide.png")[0] == 1440

        assert page.evaluate("document.title") == "Pools · Flower"
        assert page.text("nav .nav-link[aria-current=page]") == "Pools"
        links = page.evaluate("[...document.querySelectorAll('nav .app-nav:first-of-type a')].map((a) => a.innerText)")
        assert links == ["Workers", "Tasks", "Broker", "Pools"]

        (http, db) = cells(page, "celery@shop-1", "All processes")
        assert http[0] == "api http"
        assert http[2:] == ["3", http[3], "4", "0", "4 ms", "99 %", "none"]
        assert db[0] == "db database"
        assert db[2:] == ["3 of 6", db[3], "7", "0", "310 ms", "99 %", "1 failure,1 replay,1 leak"]
        assert [row[0] for row in cells(page, "celery@shop-1", "Process 4001")] == ["api http", "db database"]
        assert cells(page, "celery@shop-1", "Process 4002")[1][1].startswith("0 of 2 · 0 % , at most 1.1 acquisitions")
        assert cells(page, "celery@shop-1", "Process 4002")[1][2] == "1"
        # Without a limit there is no utilisation; a process without children has no rows of children.
        ((name, used, *_),) = cells(page, "celery@shop-2", "Process 5001")
        assert (name, used.partition(" ")[0]) == ("cache", "2")
        assert cells(page, "celery@shop-2", "All processes") == []

        text = page.text("main")
        assert re.search(r"child 1 · retry budget 498 of 500 · last task \d+ s ago", text)
        assert "A process without enough of them replays nothing." in text
        assert re.search(r"9 open, \d+ idle, at most 3 more, 14 opened since start", text)
        assert "prefork · 2 processes" in text
        assert page.text("#wp-alert-count") == "0"
        points = page.evaluate("document.querySelector('.wp-spark-line').getAttribute('d').split('L').length")
        assert points >= 6
        # Everything is Flower's own, or ours: nothing is loaded from anywhere else.
        assert all(url.startswith((address, "about:", "data:")) for url in page.requested()), page.requested()
        assert page.problems() == []


def test_alerts(page: Browser, flower: NewFlower, broker_url: str, pictures: Path) -> None:
    """Alerts stand above the workers with their message and since when, and as badges where they belong."""
    page.size(1440, 900)
    with FakeWorkers(broker_url, {"celery@shop-1": in_trouble, "celery@shop-2": two_workers()["celery@shop-2"]}):
        opened(page, flower(), TWO_WORKERS)
        refresh(page)
        page.screenshot(pictures / "alert.png")
        items = page.evaluate("[...document.querySelectorAll('#wp-alert-list li')].map((li) => li.innerText)")
        assert len(items) == 3
        # The oldest first.
        assert items[0].startswith("▲ utilisation" if "▲" in items[0] else "utilisation")
        assert "100 % of the connections of db were in use for 240 s." in items[0]
        assert "celery@shop-1, db, since" in " ".join(items[0].split())
        assert "celery@shop-1, db, process 4001, since" in " ".join(items[1].split())
        moments = page.evaluate(
            "[...document.querySelectorAll('#wp-alert-list time')].map((t) => Date.parse(t.dateTime))"
        )
        assert moments == sorted(moments)
        assert 200 < time.time() - moments[0] / 1000 < 400
        assert page.text("#wp-alert-count") == "3"
        assert page.text("#wp-alert-workers") == "in 1 of 2 workers"
        # That of the worker on the row of all its processes, that of the process on its own.
        assert cells(page, "celery@shop-1", "All processes")[0][0] == "db database utilisation"
        assert cells(page, "celery@shop-1", "Process 4001")[0][0] == "db database acquire wait"
        assert re.search(r"retry budget 0 of 500 · last task \d+ s ago · alert: budget empty", page.text("main"))
        assert "1 child publishes nothing" in page.text("main")
        # Said aloud once; the numbers are not.
        assert page.evaluate("document.getElementById('wp-said').textContent") == "3 alerts"
        assert (
            page.evaluate("document.querySelectorAll('#workerpools [aria-live], #workerpools [role=status]').length")
            == 1
        )
        page.evaluate("document.querySelector('#wp-alert-list a').click()")
        assert page.evaluate("document.querySelector(':target').querySelector('h2').innerText") == "celery@shop-1"


def test_longest_wait_and_what_is_not_known(page: Browser, flower: NewFlower, broker_url: str) -> None:
    """A wait counts while it lasts; of a value that a function made nothing tells of waits and uses, which is a dash,
    and not nothing."""
    db = resource("db", open=1, in_use=1, limit=1, pending=2, opened=1, reused=3, acquire_wait=0.009, longest_wait=4.6)
    first = resource("first", open=1, in_use=1, limit=1, pending=1, opened=1, longest_wait=2.5)
    cache = resource("cache", "", open=1, opened=5)
    told_of = told(worker_stats(process(5001, None, db, first, cache), pid=5001, execution_pool="threads"))
    with FakeWorkers(broker_url, {"celery@shop-2": told_of}):
        opened(page, flower())
        rows = {row[0]: (row[6], row[7]) for row in cells(page, "celery@shop-2", "Process 5001")}
        assert rows == {"db database": ("4.6 s", "75 %"), "first database": ("2.5 s", "—"), "cache": ("—", "—")}
        assert page.text("#wp-longest-wait") == "longest wait ever 4.6 s"
        assert (page.text("#wp-reused"), page.text("#wp-opened")) == ("75 %", "of 4 acquisitions")


def test_address_with_a_password(page: Browser, flower: NewFlower, broker_url: str) -> None:
    """The page that was opened as http://user:password@host/pools gets its numbers, which browsers refuse to fetch by
    an address that carries these."""
    with FakeWorkers(broker_url, {"celery@shop-2": two_workers()["celery@shop-2"]}):
        running = flower(arguments=["--basic_auth=someone:a-password"])
        page.open(running.url("/pools").replace("://", "://someone:a-password@"))
        page.until(f"({ONE_WORKER}) || !document.getElementById('wp-problem').hidden")
        assert page.text("#wp-problem") == ""
        assert [row[0] for row in cells(page, "celery@shop-2", "Process 5001")] == ["cache"]
        assert page.problems() == []


@pytest.mark.parametrize("width", [390, 360])
def test_narrow(page: Browser, flower: NewFlower, broker_url: str, pictures: Path, width: int) -> None:
    """On a phone nothing is cut off, and each number has its name beside it."""
    page.size(width, 800, phone=True)
    with FakeWorkers(broker_url, {"celery@shop-1": in_trouble, "celery@shop-2": two_workers()["celery@shop-1"]}):
        opened(page, flower(), TWO_WORKERS)
        refresh(page)
        page.screenshot(pictures / f"narrow-{width}.png")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        cut = page.evaluate(
            """[...document.querySelectorAll("#workerpools *")]
            .filter((each) => !each.closest(".wp-unseen, thead, svg"))
            .filter((each) => each.getBoundingClientRect().right > innerWidth + 1)
            .map((each) => each.outerHTML)"""
        )
        assert cut == []
        named = page.evaluate("getComputedStyle(document.querySelector('[data-label=Waiting]'), '::before').content")
        assert named == '"Waiting"' or named == "attr(data-label)"
        # What looks like cards is still a table to who does not see it.
        roles = page.evaluate("[...document.querySelectorAll('.wp-table *')].map((each) => each.getAttribute('role'))")
        assert {"rowgroup", "row", "columnheader", "rowheader", "cell"} <= set(roles)


@pytest.mark.parametrize(
    ("workers", "title", "text"),
    [
        ({}, "No worker has replied", "as soon as one does"),
        ({"celery@old": None}, "1 worker without connection pools", "celery@old: the app has no WorkerPools"),
    ],
    ids=["no worker", "no WorkerPools"],
)
def test_empty(
    page: Browser, flower: NewFlower, broker_url: str, pictures: Path, workers: dict[str, Any], title: str, text: str
) -> None:
    """The page says that there is nothing to show, and why."""
    with FakeWorkers(broker_url, workers):
        opened(page, flower(), f"document.body.innerText.includes({json.dumps(title)})")
        page.screenshot(pictures / f"empty-{len(workers)}.png")
        assert page.text("#wp-empty-title") == title
        assert text in page.text("#wp-empty")
        assert not page.evaluate("document.getElementById('wp-metrics').checkVisibility()")


def test_worker_without_resources(page: Browser, flower: NewFlower, broker_url: str) -> None:
    """A worker whose app has a WorkerPools and no resource has a card that says so; so has one that cannot be read."""
    workers = {"celery@bare": told(worker_stats(process(1, 0))), "celery@strange": {"snapshots": "?"}}
    with FakeWorkers(broker_url, {**workers, "celery@old": None}):
        opened(page, flower(), TWO_WORKERS)
        assert "No resource is declared in this worker." in page.text("[id='worker:celery@bare']")
        assert "cannot be read" in page.text("[id='worker:celery@strange']")
        page.until("document.body.innerText.includes('Without a WorkerPools: celery@old')")


def test_flower_is_down(page: Browser, flower: NewFlower, broker_url: str, pictures: Path) -> None:
    """The last numbers stay, with their age and what is wrong; when Flower is back, they are refreshed again."""
    with FakeWorkers(broker_url, two_workers()):
        running = opened(page, flower(), TWO_WORKERS)
        running.stop()
        page.until("!document.getElementById('wp-problem').hidden")
        page.screenshot(pictures / "error.png")
        assert page.text("#wp-problem").startswith("Flower does not respond. These numbers are ")
        assert page.text("#wp-refreshed").startswith("Not refreshed, ")
        assert cells(page, "celery@shop-2", "Process 5001")[0][0] == "cache"
        assert page.evaluate("document.getElementById('wp-said').textContent") == "Flower does not respond."
        running.start()
        page.until("document.getElementById('wp-problem').hidden && document.body.innerText.includes('Updated')")


def test_workers_that_do_not_answer(page: Browser, flower: NewFlower, broker_url: str, pictures: Path) -> None:
    """A busy one is not answering, one that is gone is offline; both keep their last numbers, with their age."""
    with FakeWorkers(broker_url, two_workers()) as workers:
        opened(page, flower(), TWO_WORKERS)
        workers.busy.add("celery@shop-1")
        workers.dead.add("celery@shop-2")
        page.until("document.querySelectorAll('[data-status=offline]').length === 1")
        page.until("document.querySelectorAll('[data-status=silent]').length === 1")
        page.screenshot(pictures / "offline.png")
        silent, offline = page.text("[id='worker:celery@shop-1']"), page.text("[id='worker:celery@shop-2']")
        assert "not responding" in silent
        assert "last reply" in silent
        assert "offline" in offline
        assert "These are its last numbers." in offline
        # Who is gone uses nothing.
        assert page.text("#wp-in-use").endswith(" of 8")
        workers.dead.clear()
        workers.busy.clear()
        page.until(TWO_WORKERS)


def test_names_are_text(page: Browser, flower: NewFlower, broker_url: str) -> None:
    """Markup in the name of a worker or resource, or in a message, is shown as it is, on both pages."""
    bad = "<img src=x onerror=\"window.injected='%s'\">"
    worker = "celery@<b>&amp;'\"%2F"
    db = resource(bad % "r", bad % "kind", open=1, in_use=1, limit=1)
    alert = Alert(bad % "rule", bad % "r", None, 1.0, message=bad % "message")
    pools = told(worker_stats(process(1, 0, db), alerts=[alert], execution_pool=bad % "pool"))
    pools["processes"] = {bad % "pid": {bad % "name": bad % "text"}}
    with FakeWorkers(broker_url, {worker: pools}):
        running = opened(page, flower())
        assert page.evaluate("document.querySelectorAll('#workerpools :is(img, b)').length") == 0
        text = page.text("#workerpools")
        for shown in (worker, bad % "r", bad % "kind", bad % "message", bad % "pool", (bad % "rule").replace("_", " ")):
            assert shown in text
        href = page.evaluate("document.querySelector('.wp-worker-name a').getAttribute('href')")
        page.open(running.url(href))
        page.until("document.getElementById('workername')?.textContent")
        assert page.evaluate("document.getElementById('workername').textContent") == worker
        pane = page.evaluate("document.getElementById('tab-workerpools').textContent")
        for shown in (bad % "pid", bad % "name", bad % "text", bad % "r"):
            assert shown in pane
        assert page.evaluate("window.injected") is None


def test_keyboard(page: Browser, flower: NewFlower, broker_url: str) -> None:
    """Everything that can be clicked can be reached and used with the keyboard, and keeps the focus at a refresh."""
    with FakeWorkers(broker_url, two_workers()):
        opened(page, flower(), TWO_WORKERS)
        reached = []
        for _ in range(40):
            page.press("Tab", 9)
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.dataset.part"))
            if reached[-1] == "toggle":
                break
        assert {"wp-pause", "wp-filter", "name", "toggle"} <= set(reached)
        assert page.evaluate("getComputedStyle(document.activeElement).boxShadow") != "none"
        assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
        page.press("Enter", 13)
        assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "false"
        assert page.text("[id='worker:celery@shop-1'] [data-part=toggle]") == "Show 2 processes"
        assert cells(page, "celery@shop-1", "Process 4001") == []
        row = "document.querySelector('.wp-row')"
        page.evaluate(f"window.row = {row}")
        refresh(page)
        # What was there is changed, not made anew.
        assert page.evaluate(f"window.row === {row}")
        assert page.evaluate("document.activeElement.dataset.part") == "toggle"
        assert cells(page, "celery@shop-1", "Process 4001") == []


def test_pause_and_filter(page: Browser, flower: NewFlower, broker_url: str) -> None:
    """A paused page asks for nothing, and says so; what is typed leaves the workers and resources with that name."""
    with FakeWorkers(broker_url, two_workers()) as workers:
        opened(page, flower(), TWO_WORKERS)
        page.evaluate("document.getElementById('wp-pause').click()")
        assert page.text("#wp-refreshed").startswith("Paused, ")
        asked = dict(workers.asked)
        time.sleep(6.0)
        assert workers.asked == asked
        for typed, shown in (("shop-2", ["celery@shop-2"]), ("API", ["celery@shop-1"]), ("nothing", [])):
            page.evaluate(
                f"(box => {{ box.value = {json.dumps(typed)}; box.dispatchEvent(new Event('input')) }})"
                "(document.getElementById('wp-filter'))"
            )
            names = page.evaluate("[...document.querySelectorAll('.wp-worker-name')].map((each) => each.innerText)")
            assert names == shown
        assert page.text("#wp-empty-text") == "No worker or resource has “nothing” in its name."


def test_many_processes(page: Browser, flower: NewFlower, broker_url: str, pictures: Path) -> None:
    """The processes of a large worker are shown on demand; the address of a worker's card leads there."""
    many = [process(6000 + n, n, resource("db", open=1, limit=1)) for n in range(64)]
    pools = {f"celery@shop-{n}": told(worker_stats(*many)) for n in range(3)}
    with FakeWorkers(broker_url, pools):
        opened(page, flower(), "document.querySelectorAll('.wp-worker').length === 3", "#worker:celery%40shop-2")
        assert page.evaluate("document.querySelectorAll('.wp-row').length") == 3
        page.until("document.getElementById('worker:celery@shop-2').getBoundingClientRect().top < innerHeight")
        page.evaluate("document.querySelector('[data-part=toggle]').click()")
        assert page.evaluate("document.querySelectorAll('.wp-row').length") == 3 + 64


def test_motion_is_reduced(page: Browser, flower: NewFlower, broker_url: str) -> None:
    """Nothing moves for who does not want it."""
    with FakeWorkers(broker_url, two_workers()):
        opened(page, flower(), TWO_WORKERS)
        duration = "getComputedStyle(document.querySelector('[data-part=fill]')).transitionDuration"
        assert page.evaluate(duration) == "0.3s"
        page.media(prefers_reduced_motion="reduce")
        assert page.evaluate(duration) == "0s"
