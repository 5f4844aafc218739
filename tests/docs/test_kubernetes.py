"""The manifests of the Kubernetes page have what the API server requires of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.docs.markdown import blocks
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "kubernetes.md"
#: What the schema of ``apps/v1`` requires, by path.
REQUIRED = (
    ("metadata", "name"),
    ("spec", "selector", "matchLabels"),
    ("spec", "template", "metadata", "labels"),
    ("spec", "template", "spec", "containers"),
)
ACTIONS = {"exec", "grpc", "httpGet", "tcpSocket"}


def manifests() -> list[Any]:
    """Every document of the page's YAML."""
    loader = YAML(typ="safe")
    return [each for block in blocks(PAGE) if block.language == "yaml" for each in loader.load_all(block.text)]


def at(document: Any, path: tuple[str, ...]) -> Any:
    """What stands at a path."""
    for key in path:
        document = document[key]
    return document


@pytest.fixture
def deployment() -> Any:
    """The one whole manifest; what else the page shows is a part of a container."""
    whole = [each for each in manifests() if "kind" in each]
    assert {frozenset(each) for each in manifests() if "kind" not in each} <= {frozenset({"env"})}
    assert [(each["apiVersion"], each["kind"]) for each in whole] == [("apps/v1", "Deployment")]
    return whole[0]


def test_required_fields_are_there(deployment: Any) -> None:
    """And the selector finds the pods."""
    assert all(at(deployment, path) for path in REQUIRED)
    labels = at(deployment, ("spec", "template", "metadata", "labels"))
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for container in at(deployment, ("spec", "template", "spec", "containers")):
        assert container["name"]
        assert container["image"]
        assert all(isinstance(each, str) for each in container["command"])
        for variable in container["env"]:
            # A number or a truth value that is not quoted is refused.
            assert {type(each) for each in variable.values()} == {str}
        ports = {each["name"] for each in container["ports"]}
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            (action,) = ACTIONS & container[name].keys()
            assert container[name][action]["port"] in ports


def test_the_grace_period_is_what_the_page_derives(deployment: Any) -> None:
    """The longest task, the time to close, and 5 s."""
    text = PAGE.read_text()
    assert "*the longest task + `workerpools_close_timeout` + 5 s*" in text
    longest = re.search(r"task_time_limit = (\d+)", text)
    assert longest is not None
    pod = deployment["spec"]["template"]["spec"]
    given = {each["name"]: each["value"] for container in pod["containers"] for each in container["env"]}
    least = int(longest[1]) + float(given["WORKERPOOLS_CLOSE_TIMEOUT"]) + 5
    assert pod["terminationGracePeriodSeconds"] >= least
