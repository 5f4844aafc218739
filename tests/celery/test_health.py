"""What makes a worker alive, and what makes it ready: a table, and the text of the answers."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from contextlib import closing

import pytest

from workerpools._celery.health import STALLED_AFTER, Check, Facts, live, ready
from workerpools.prometheus import serve


def failed(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.told for check in checks if not check.passed}


@pytest.mark.parametrize(
    ("facts", "not_live", "not_ready"),
    [
        (Facts(), {}, {}),
        (Facts(children=(2, 2)), {}, {}),
        (Facts(stalled=STALLED_AFTER), {}, {}),
        (Facts(stalled=31.0), {"main loop": "turned 31.0 s ago"}, {"main loop": "turned 31.0 s ago"}),
        (Facts(stalled=None, why_not="runs a task"), {}, {}),
        (Facts(connected=False, stalled=None), {}, {"broker": "not connected; reconnecting"}),
        (Facts(stopping=True, stalled=None, children=(0, 2)), {}, {"shutdown": None, "children": "0 of 2 alive"}),
        (Facts(children=(1, 2)), {}, {"children": "1 of 2 alive"}),
        (Facts(children=(0, 2)), {"children": "0 of 2 alive"}, {"children": "0 of 2 alive"}),
        # --autoscale may start with none.
        (Facts(children=(0, 0)), {}, {}),
        (Facts(children=(2, 2), unpublished=("process 7 hangs",)), {}, {"publishing": "process 7 hangs"}),
    ],
)
def test_checks(facts: Facts, not_live: dict[str, str | None], not_ready: dict[str, str | None]) -> None:
    """A restart mends what /livez reports; a broker that is down is none of it."""
    for checks, wanted in ((live(facts), not_live), (ready(facts), not_ready)):
        found = failed(checks)
        assert found.keys() == wanted.keys()
        assert all(told in (None, found[name]) for name, told in wanted.items())


def test_answers() -> None:
    """200 or 503, one line a check; the metrics are where they were."""
    probes: dict[str, Callable[[], list[Check]]] = {
        "/livez": lambda: live(Facts(stalled=0.25)),
        "/readyz": lambda: ready(Facts(connected=False)),
    }
    with closing(serve(dict, "127.0.0.1", 0, probes)) as endpoint:
        found = {}
        for path in ("/livez", "/readyz", "/metrics"):
            connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=10)
            connection.request("GET", path)
            answer = connection.getresponse()
            found[path] = (answer.status, answer.read().decode())
            connection.close()
    assert found["/livez"] == (200, "[+] main loop: turned 0.2 s ago\n")
    assert found["/readyz"][0] == 503
    assert "[-] broker: not connected; reconnecting\n" in found["/readyz"][1]
    assert found["/metrics"][0] == 200
    assert "workerpools_" in found["/metrics"][1]
