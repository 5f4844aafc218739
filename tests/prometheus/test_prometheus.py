"""Snapshots as Prometheus' series, checked by Prometheus' own tool."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.stats.test_snapshot import stats
from tests.stats.test_workers import process, worker
from tests.support.promtool import check_metrics
from workerpools._stats.metrics import BOUNDS, DEFINITIONS, FIRST, WIDTH, MetricType
from workerpools._stats.snapshot import OF_WORKERS, Alert, ResourceStats, WorkerStats
from workerpools.prometheus import ALERT, register

FULL = ResourceStats("db", "database", tuple(float(number + 1) for number in range(WIDTH)))
WORKERS: dict[str, list[WorkerStats]] = {
    "celery@one": [worker(process(2, resources=(FULL,)), process(3, 5, resources=(FULL,)), past=(FULL,))],
    "celery@two": [worker(process(4, resources=(stats("api"),)), alerts=(Alert("utilisation", "api", 4),))],
}


def exposed(workers: Mapping[str, Sequence[WorkerStats]] = WORKERS) -> str:
    registry = CollectorRegistry()
    register(lambda: workers, registry)
    return generate_latest(registry).decode()


def samples(text: str, name: str, **labels: str) -> list[float]:
    """Return the values of a series that has these labels."""
    return [
        sample.value
        for family in parse(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


def test_promtool_finds_nothing_to_complain_about() -> None:
    """Neither in a full exposition nor in an empty one."""
    check_metrics(exposed())
    check_metrics(exposed({}))


def test_the_names_are_stable() -> None:
    """Dashboards and rules are written against them: a new one changes this test."""
    assert [each.prometheus for each in DEFINITIONS] == [
        "workerpools_connections_open",
        "workerpools_connections_in_use",
        "workerpools_connections_idle",
        "workerpools_connections_limit",
        "workerpools_acquisitions_pending",
        "workerpools_longest_wait_seconds",
        "workerpools_longest_use_seconds",
        "workerpools_connections_opened_total",
        "workerpools_connections_closed_total",
        "workerpools_acquisitions_reused_total",
        "workerpools_acquire_wait_seconds",
        "workerpools_acquire_timeouts_total",
        "workerpools_create_time_seconds",
        "workerpools_use_time_seconds",
        "workerpools_open_time_seconds",
        "workerpools_checks_total",
        "workerpools_failed_checks_total",
        "workerpools_failures_total",
        "workerpools_replays_total",
        "workerpools_retries_total",
        "workerpools_refused_replays_total",
        "workerpools_resolved_commits_total",
        "workerpools_transactions_unbatched_total",
        "workerpools_attempts_total",
        "workerpools_leaks_total",
    ]
    assert [each.definition.prometheus for each in OF_WORKERS] == [
        "workerpools_processes_running",
        "workerpools_processes_unseen",
        "workerpools_processes_interrupted",
        "workerpools_resources_overflowing",
        "workerpools_retry_budget_tokens",
        "workerpools_retry_budget_capacity_tokens",
        "workerpools_snapshot_timestamp_seconds",
    ]


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda each: each.name)
def test_every_definition_is_exposed(definition: object) -> None:
    """With its meaning, its type, and the totals of a worker: two processes and what has ended."""
    name, kind = definition.name, definition.type  # type: ignore[attr-defined]
    text, first, series = exposed(), FIRST[definition.name], definition.prometheus  # type: ignore[attr-defined]
    types = {MetricType.COUNTER: "counter", MetricType.HISTOGRAM: "histogram"}
    assert f"# HELP {series} {definition.meaning}\n# TYPE {series} {types.get(kind, 'gauge')}\n" in text  # type: ignore[attr-defined]
    of = {"worker": "celery@one", "resource": "db"}
    together = 1 if kind is MetricType.MAX else 3
    if kind is MetricType.HISTOGRAM:
        buckets = samples(text, f"{series}_bucket", **of)
        counts = [together * (first + 1 + n) for n in range(len(BOUNDS) + 1)]
        assert buckets == [sum(counts[: n + 1]) for n in range(len(counts))]
        assert samples(text, f"{series}_count", **of) == [sum(counts)]
        assert samples(text, f"{series}_sum", **of) == [together * (first + len(BOUNDS) + 2)]
        assert samples(text, f"{series}_bucket", le="+Inf", **of) == [sum(counts)]
    elif definition.values:  # type: ignore[attr-defined]
        for n, value in enumerate(definition.values):  # type: ignore[attr-defined]
            label = {definition.label: value}  # type: ignore[attr-defined]
            assert samples(text, series, **of, **label) == [together * (first + 1 + n)]
    else:
        assert samples(text, series, **of) == [together * (first + 1)], name


def test_no_series_has_a_process_id() -> None:
    """Each recycled child would leave some behind."""
    labels = {label for family in parse(exposed()) for sample in family.samples for label in sample.labels}
    assert labels == {"worker", "resource", "kind", "reason", "rule", "le"}


def test_numbers_of_a_worker() -> None:
    """One series a worker."""
    text = exposed()
    assert samples(text, "workerpools_processes_running") == [2, 1]
    assert samples(text, "workerpools_retry_budget_tokens", worker="celery@one") == [5]
    assert samples(text, "workerpools_snapshot_timestamp_seconds", worker="celery@two") == [100]


def test_no_limit_is_no_series() -> None:
    """A rule that divides by it finds nothing, and does not see infinity."""
    assert samples(exposed(), "workerpools_connections_limit", worker="celery@two") == []
    assert samples(exposed(), "workerpools_connections_limit", worker="celery@one") != []


def test_names_that_need_escaping() -> None:
    """What users call a worker or a resource cannot break the exposition."""
    odd = 'a"b\\c\nd}é'
    text = exposed({odd: [worker(process(2, resources=(stats(odd, opened=1),)))]})
    assert samples(text, "workerpools_connections_opened_total", worker=odd, resource=odd) == [1]
    check_metrics(text)


def test_openmetrics() -> None:
    """What newer scrapers ask for can be parsed strictly."""
    registry = CollectorRegistry()
    register(lambda: WORKERS, registry)
    families = {family.name: family for family in parse_openmetrics(generate_openmetrics(registry).decode())}
    assert families["workerpools_connections_opened"].type == "counter"
    assert families["workerpools_acquire_wait_seconds"].type == "histogram"


def test_an_alert_is_1_while_raised_and_0_afterwards() -> None:
    """A gap would end a graph where it should fall; and a worker that is gone leaves nothing."""
    registry = CollectorRegistry()
    workers: dict[str, list[WorkerStats]] = {}
    register(lambda: workers, registry)

    def active(**labels: str) -> list[float]:
        return samples(generate_latest(registry).decode(), ALERT, **labels)

    assert active() == []
    workers["w"] = [worker(alerts=(Alert("wait", "db", 2), Alert("wait", "db", 3), Alert("budget", pid=2)))]
    assert active(worker="w", rule="wait", resource="db") == [1]
    assert active(worker="w", rule="budget", resource="") == [1]
    workers["w"] = [worker(alerts=(Alert("budget", pid=2),))]
    assert active(worker="w", rule="wait", resource="db") == [0]
    assert active(worker="w", rule="budget") == [1]
    workers["w"] = [worker()]
    assert active() == [0, 0]
    del workers["w"]
    assert active() == []
    workers["w"] = [worker()]
    assert active() == []


def test_a_source_that_fails_costs_its_own_series_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Flower's `/metrics` shows more than ours."""
    from prometheus_client import Gauge

    registry = CollectorRegistry()

    def fail() -> Mapping[str, Sequence[WorkerStats]]:
        raise RuntimeError("unread")

    Gauge("another", "Of somebody else.", registry=registry).set(7)
    register(fail, registry)
    with caplog.at_level(logging.ERROR, "workerpools"):
        text = generate_latest(registry).decode()
    assert samples(text, "another") == [7]
    assert "workerpools_" not in text
    assert "unread" in caplog.text


def test_registering_asks_for_nothing_and_can_be_repeated() -> None:
    """As a configuration file that is read twice does; the last source counts."""
    asked: list[int] = []
    registry = CollectorRegistry()

    def source(number: int) -> Mapping[str, Sequence[WorkerStats]]:
        asked.append(number)
        return {}

    first = register(lambda: source(1), registry)
    assert register(lambda: source(2), registry) is first
    assert asked == []
    generate_latest(registry)
    assert asked == [2]
    registry.unregister(first)
    assert b"workerpools" not in generate_latest(registry)
    assert register(lambda: source(3), registry) is first
    generate_latest(registry)
    assert asked == [2, 3]


def test_the_names_are_taken() -> None:
    """Whoever has them already is not replaced in silence."""
    from prometheus_client import Gauge

    registry = CollectorRegistry()
    Gauge("workerpools_connections_open", "Of somebody else.", registry=registry)
    with pytest.raises(ValueError, match="workerpools_connections_open"):
        register(dict, registry)


def test_importing_registers_nothing() -> None:
    """Nothing happens at import."""
    assert "workerpools_connections_open" not in generate_latest(REGISTRY).decode()
