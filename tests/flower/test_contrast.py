"""Whoever sees less contrast than others can read the page: measured on what the browser has computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flower.fake import FakeWorkers, told, worker_stats
from tests.flower.test_page import NewFlower, in_trouble, opened
from tests.support.browser import Browser
from tests.support.flower import CONFIG, PLAIN

pytestmark = [pytest.mark.worker, pytest.mark.timeout(240)]

# Every text of the page with its colour and the colour below it, as they are computed: [text, ratio, is large].
CONTRASTS = """
(() => {
    const parse = (colour) => { const n = colour.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
    const over = (top, below) => [0, 1, 2].map((n) => top[n] * top[3] + below[n] * (1 - top[3])).concat(1);
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
    const ratio = (one, other) => {
        const [high, low] = [light(one), light(other)].sort((a, b) => b - a);
        return (high + 0.05) / (low + 0.05);
    };
    const below = (element) => {
        if (!element) { return [255, 255, 255, 1]; }
        const own = parse(getComputedStyle(element).backgroundColor);
        return own[3] === 1 ? own : over(own, below(element.parentElement));
    };
    const found = [];
    const walker = document.createTreeWalker(document.getElementById("workerpools"), NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const element = node.parentElement;
        const shown = element.checkVisibility() && !element.closest(".wp-unseen, noscript, template");
        if (node.textContent.trim() && shown) {
            const ground = below(element);
            found.push([node.textContent.trim(), ratio(over(parse(getComputedStyle(element).color), ground), ground)]);
        }
    }
    for (const fill of document.querySelectorAll("[data-part=fill]")) {
        const [colour, ground] = [getComputedStyle(fill).backgroundColor, below(fill.parentElement)].map(
            (each) => typeof each === "string" ? parse(each) : each);
        // A graphic, of which WCAG asks for 3 to 1.
        found.push(["bar", ratio(colour, ground) * 1.5]);
        found.push(["track", ratio(parse(getComputedStyle(fill.parentElement).borderTopColor), ground) * 1.5]);
    }
    return found;
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("plain", [False, True], ids=["within Flower", "plain"])
def test_contrast(page: Browser, flower: NewFlower, broker_url: str, pictures: Path, scheme: str, plain: bool) -> None:
    """Every text has a contrast of 4.5 to 1 or more, every bar one of 3 to 1: WCAG 2.2, AA."""
    page.media(prefers_color_scheme=scheme)
    page.size(1440, 900)
    workers = {"celery@shop-1": in_trouble, **{f"celery@{name}": told(worker_stats()) for name in ("busy", "gone")}}
    with FakeWorkers(broker_url, workers) as fake:
        running = opened(page, flower(config=PLAIN if plain else CONFIG))
        page.until("document.querySelectorAll('[data-status=online]').length === 3")
        fake.busy.add("celery@busy")
        fake.dead.add("celery@gone")
        page.until("document.querySelectorAll('[data-status=silent], [data-status=offline]').length === 2")
        running.stop()
        page.until("!document.getElementById('wp-problem').hidden")
        page.screenshot(pictures / f"{scheme}-{'plain' if plain else 'flower'}.png")
        found = page.evaluate(CONTRASTS)
        assert len(found) > 50
        assert [(text, round(ratio, 2)) for text, ratio in found if ratio < 4.5] == []
        lowest = min(found, key=lambda each: each[1])
        print(f"lowest contrast: {lowest[1]:.2f} of {lowest[0]!r}")
