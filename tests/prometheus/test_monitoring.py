"""The alerting rules and the dashboard that are shipped, checked by Prometheus' own tool."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from ruamel.yaml import YAML

from tests.prometheus import dashboard
from tests.prometheus.test_prometheus import exposed
from tests.support.paths import ROOT
from tests.support.promtool import promtool

RULES = ROOT / "workerpools" / "monitoring" / "alerts.yml"
UNIT_TESTS = Path(__file__).parent / "alerts_test.yml"

_NAME = re.compile(r"workerpools_\w+")
# A selector, and what it says of one label.
_SELECTOR = re.compile(r"(workerpools_\w+)\{([^}]*)\}")
_LABEL = re.compile(r'(\w+)(=~?)"([^"]*)"')


def rules() -> list[dict[str, Any]]:
    (group,) = YAML(typ="safe").load(RULES)["groups"]
    return list(group["rules"])


def expressions() -> list[str]:
    shown = [target["expr"] for panel in dashboard.dashboard()["panels"] for target in panel["targets"]]
    variables = [each["definition"] for each in dashboard.dashboard()["templating"]["list"] if "definition" in each]
    return [*(rule["expr"] for rule in rules()), *shown, *variables]


def test_promtool_accepts_the_rules() -> None:
    """Their syntax, expressions and templates."""
    assert f"{len(rules())} rules found" in promtool("check", "rules", str(RULES))


def test_each_rule_is_raised_and_cleared() -> None:
    """As the file of unit tests says."""
    assert "SUCCESS" in promtool("test", "rules", str(UNIT_TESTS))


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_each_rule_has_a_unit_test_that_can_fail(rule: dict[str, Any], tmp_path: Path) -> None:
    """Without the rule its test fails, and with one that is always true, too."""
    yaml = YAML()
    unit_tests = yaml.load(UNIT_TESTS)
    unit_tests["rule_files"] = ["rules.yml"]
    yaml.dump(unit_tests, tmp_path / "tests.yml")
    for changed in ({"expr": "vector(0) > 1"}, {"expr": f"({rule['expr']}) or vector(1)"}):
        loaded = yaml.load(RULES)
        (found,) = (each for each in loaded["groups"][0]["rules"] if each["alert"] == rule["alert"])
        found.update(changed)
        yaml.dump(loaded, tmp_path / "rules.yml")
        with pytest.raises(AssertionError, match=rule["alert"]):
            promtool("test", "rules", str(tmp_path / "tests.yml"))


def test_every_name_exists_in_the_exposition() -> None:
    """A rule on a series that is not there is never raised; neither is one on a label that is not."""
    samples: dict[str, list[dict[str, str]]] = {}
    for family in parse(exposed()):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample.labels)
    texts = [*expressions(), *(text for rule in rules() for text in rule["annotations"].values())]
    # People are told of a histogram by its name alone.
    histograms = {name.removesuffix("_bucket") for name in samples if name.endswith("_bucket")}
    for text in texts:
        names = set(_NAME.findall(text))
        assert names <= set(samples) | histograms, text
    for text in expressions():
        assert not set(_NAME.findall(text)) & histograms, text
        for name, selector in _SELECTOR.findall(text):
            for label, operator, value in _LABEL.findall(selector):
                values = {labels[label] for labels in samples[name] if label in labels}
                assert values, f"{text}: {name} has no label {label}"
                assert operator == "=~" or value in values, f"{text}: {name} has no {label}={value}"
    for text in texts:
        for label in re.findall(r"\$labels\.(\w+)", text):
            assert label in ("worker", "resource")


def test_promtool_accepts_the_dashboards_expressions(tmp_path: Path) -> None:
    """As rules, with what Grafana puts in place of its variables."""
    replaced = {"$__rate_interval": "1m", "$worker": ".*", "$resource": ".*"}
    recorded = []
    for number, target in enumerate(target for panel in dashboard.dashboard()["panels"] for target in panel["targets"]):
        expression = target["expr"]
        for variable, value in replaced.items():
            expression = expression.replace(variable, value)
        assert "$" not in expression
        recorded.append({"record": f"panel:{number}", "expr": expression})
    path = tmp_path / "dashboard.yml"
    YAML().dump({"groups": [{"name": "dashboard", "rules": recorded}]}, path)
    assert f"{len(recorded)} rules found" in promtool("check", "rules", str(path))


def test_the_dashboard_is_up_to_date() -> None:
    """`python -m tests.prometheus.dashboard` writes it."""
    assert dashboard.FILE.read_text(encoding="utf-8") == dashboard.written()


def test_the_dashboards_panels_do_not_overlap() -> None:
    """Each has a place of its own on a grid of 24 columns, an id, and says what it shows."""
    panels = json.loads(dashboard.FILE.read_text(encoding="utf-8"))["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["title"]
        assert panel["description"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_series_is_on_the_dashboard() -> None:
    """What is counted and shown nowhere is not looked at."""
    exposition = {family.name for family in parse(exposed())}
    shown = " ".join(expressions())
    missing = {name for name in exposition if name not in shown}
    assert missing == {"workerpools_connections_open"} & missing
