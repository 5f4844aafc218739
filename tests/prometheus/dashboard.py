"""Writes the Grafana dashboard: ``python -m tests.prometheus.dashboard``.

Grafana's JSON is long and repeats itself; what differs between the panels is here. A test fails while the file says
something else.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tests.support.paths import ROOT

FILE = ROOT / "workerpools" / "monitoring" / "dashboard.json"

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
OF = '{worker=~"$worker",resource=~"$resource"}'
EACH = "{{worker}} {{resource}}"


class Panel(NamedTuple):
    """One panel.

    Attributes:
        title: Its title.
        meaning: What it says, shown beside the title.
        queries: Each with its legend.
        unit: Grafana's name of the unit.
        kind: Grafana's name of the kind of panel.
        width: Of 24.
        stacked: Whether the lines add up to something.
        limit: The value from which on it is red.
    """

    title: str
    meaning: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    limit: float | None = None


def _quantiles(name: str) -> tuple[tuple[str, str], ...]:
    buckets = f"sum by (resource, le) (rate(workerpools_{name}_seconds_bucket{OF}[$__rate_interval]))"
    return tuple(
        (f"histogram_quantile({part}, {buckets})", f"{{{{resource}}}} p{part * 100:.0f}") for part in (0.5, 0.95)
    )


def _rate(name: str, by: str) -> str:
    return f"sum by ({by}) (rate(workerpools_{name}_total{OF}[$__rate_interval]))"


def _sum(name: str) -> str:
    return f'sum(workerpools_{name}{{worker=~"$worker"}})'


PANELS = (
    Panel(
        "Alerts",
        "Raised by the workers' own rules.",
        ((f"sum(workerpools_alert_active{OF}) or vector(0)", "raised"),),
        kind="stat",
        width=4,
        limit=1,
    ),
    Panel(
        "Processes",
        "That run tasks and whose numbers are known.",
        ((_sum("processes_running"), "running"),),
        kind="stat",
        width=4,
    ),
    Panel(
        "Processes not seen",
        "They found no slot, are just starting, or stopped in the middle of publishing.",
        ((f"{_sum('processes_unseen')} + {_sum('processes_interrupted')}", "not seen"),),
        kind="stat",
        width=4,
        limit=1,
    ),
    Panel(
        "Resources not seen",
        "They found no place in shared memory.",
        ((_sum("resources_overflowing"), "not seen"),),
        kind="stat",
        width=4,
        limit=1,
    ),
    Panel(
        "Retry budget",
        "What is left in the process that has the smallest part left.",
        (
            (
                'min(workerpools_retry_budget_tokens{worker=~"$worker"} '
                '/ workerpools_retry_budget_capacity_tokens{worker=~"$worker"})',
                "left",
            ),
        ),
        unit="percentunit",
        kind="stat",
        width=4,
    ),
    Panel(
        "Age of the numbers",
        "Of the worker that has not answered for longest.",
        (('max(time() - workerpools_snapshot_timestamp_seconds{worker=~"$worker"})', "age"),),
        unit="s",
        kind="stat",
        width=4,
        limit=300,
    ),
    Panel(
        "Utilisation",
        "Connections in use, as a part of those that may be open.",
        ((f"workerpools_connections_in_use{OF} / workerpools_connections_limit{OF}", EACH),),
        unit="percentunit",
        limit=0.8,
    ),
    Panel(
        "Connections",
        "In use and idle; the limit is that of all processes that have opened the resource.",
        tuple(
            (f"sum by (resource) (workerpools_connections_{state}{OF})", f"{{{{resource}}}} {words}")
            for state, words in (("in_use", "in use"), ("idle", "idle"), ("limit", "limit"))
        ),
    ),
    Panel(
        "Waiting callers",
        "How long the longest-waiting caller has waited, and how long the longest-held connection has been in use.",
        (
            (f"sum by (resource) (workerpools_acquisitions_pending{OF})", "{{resource}} waiting"),
            (f"max by (resource) (workerpools_longest_wait_seconds{OF})", "{{resource}} longest wait, s"),
            (f"max by (resource) (workerpools_longest_use_seconds{OF})", "{{resource}} longest use, s"),
        ),
    ),
    Panel("Waits for a connection", "Without the time to open one.", _quantiles("acquire_wait"), unit="s", limit=5),
    Panel("Uses of a connection", "For how long at a time.", _quantiles("use_time"), unit="s"),
    Panel("Time to open a connection", "With TLS and log-in.", _quantiles("create_time"), unit="s"),
    Panel(
        "Waits that took more than 5 s or ended in vain",
        "A second.",
        (
            (
                f"sum by (resource) (rate(workerpools_acquire_wait_seconds_count{OF}[$__rate_interval])) - "
                "sum by (resource) (rate(workerpools_acquire_wait_seconds_bucket"
                '{worker=~"$worker",resource=~"$resource",le="5.0"}[$__rate_interval]))',
                "{{resource}} above 5 s",
            ),
            (_rate("acquire_timeouts", "resource"), "{{resource}} timed out"),
        ),
        unit="ops",
    ),
    Panel("Connections opened", "A second.", ((_rate("connections_opened", "worker, resource"), EACH),), unit="ops"),
    Panel(
        "Connections closed",
        "A second, by reason.",
        ((_rate("connections_closed", "resource, reason"), "{{resource}} {{reason}}"),),
        unit="ops",
        stacked=True,
    ),
    Panel(
        "Reuse",
        "Acquisitions that got an open connection, as a part of all.",
        (
            (
                f"{_rate('acquisitions_reused', 'resource')} / ({_rate('acquisitions_reused', 'resource')} "
                f"+ {_rate('connections_opened', 'resource')})",
                "{{resource}}",
            ),
        ),
        unit="percentunit",
    ),
    Panel(
        "How long connections were open",
        "Told when they are closed.",
        _quantiles("open_time"),
        unit="s",
    ),
    Panel(
        "Checks of idle connections",
        "A second.",
        ((_rate("checks", "resource"), "{{resource}}"), (_rate("failed_checks", "resource"), "{{resource}} dead")),
        unit="ops",
    ),
    Panel(
        "Failures",
        "A second, by what they prove.",
        ((_rate("failures", "resource, kind"), "{{resource}} {{kind}}"),),
        unit="ops",
        stacked=True,
    ),
    Panel(
        "What was done about failures",
        "A second.",
        (
            (_rate("replays", "resource"), "{{resource}} run again"),
            (_rate("retries", "resource"), "{{resource}} back to the broker"),
            (_rate("refused_replays", "resource"), "{{resource}} raised"),
            (_rate("resolved_commits", "resource"), "{{resource}} COMMIT resolved"),
        ),
        unit="ops",
    ),
    Panel(
        "Runs of task bodies",
        "A second; those that left a connection in use; and transactions that began in a round trip of their own.",
        (
            (_rate("attempts", "resource"), "{{resource}}"),
            (_rate("leaks", "resource"), "{{resource}} leaks"),
            (_rate("transactions_unbatched", "resource"), "{{resource}} unbatched"),
        ),
        unit="ops",
    ),
)


def _thresholds(limit: float | None) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if limit is not None:
        steps.append({"color": "red", "value": limit})
    return {"mode": "absolute", "steps": steps}


def _panel(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    stat = panel.kind == "stat"
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": _thresholds(panel.limit)}
    if not stat:
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        style = "dashed" if panel.limit is not None else "off"
        defaults["custom"] = {
            "fillOpacity": 20 if panel.stacked else 0,
            "stacking": stacking,
            "thresholdsStyle": {"mode": style},
        }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.meaning,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": 4 if stat else 8},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}}
        if stat
        else {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for n, (expression, legend) in enumerate(panel.queries)
        ],
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    panels: list[dict[str, Any]] = []
    x = y = 0
    for number, panel in enumerate(PANELS, start=1):
        panels.append(_panel(number, panel, x, y))
        x += panel.width
        if x >= 24:
            x, y = 0, y + panels[-1]["gridPos"]["h"]
    return {
        "title": "workerpools",
        "uid": "workerpools",
        "description": "The connection pools of Celery workers.",
        "tags": ["celery", "workerpools"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                _variable("worker", "label_values(workerpools_processes_running, worker)"),
                _variable("resource", 'label_values(workerpools_connections_open{worker=~"$worker"}, resource)'),
            ]
        },
        "panels": panels,
    }


def written() -> str:
    """Return the file's text."""
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
