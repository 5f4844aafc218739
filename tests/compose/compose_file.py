"""docker-compose.yml as values: what `docker compose config` would say, as far as our file needs it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docker-compose.yml"

# $$, ${NAME}, ${NAME:-default} and ${NAME:?message}: the forms that the file may use.
_VARIABLE = re.compile(r"\$(?:(?P<escaped>\$)|\{(?P<name>\w+)(?::(?P<operator>[-?])(?P<word>[^}]*))?\}|(?P<bad>))")


class MissingVariable(LookupError):
    """A ``${NAME:?message}`` whose variable is not set, as Compose would refuse it."""


def interpolate(text: str, environment: Mapping[str, str]) -> str:
    """Returns the text with its variables filled in, by the rules of the compose specification.

    Args:
        text: A scalar of the file.
        environment: The variables of the shell that calls ``docker compose``.

    Raises:
        MissingVariable: A required variable is unset or empty.
        ValueError: The text has a form of variable that is not known here.
    """

    def value(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "$"
        if match["bad"] is not None:
            raise ValueError(f"cannot interpolate {text!r}")
        found = environment.get(match["name"], "")
        if found or match["operator"] is None:
            return found
        if match["operator"] == "?":
            raise MissingVariable(f"{match['name']}: {match['word']}")
        return str(match["word"])

    return _VARIABLE.sub(value, text)


def _filled_in(node: Any, environment: Mapping[str, str]) -> Any:
    if isinstance(node, str):
        return interpolate(node, environment)
    if isinstance(node, list):
        return [_filled_in(item, environment) for item in node]
    if isinstance(node, dict):
        return {key: _filled_in(item, environment) for key, item in node.items()}
    return node


def load(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns the whole file, merge keys resolved and variables filled in."""
    return _filled_in(YAML(typ="safe").load(PATH), environment)


def services(environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Returns the services by name, each as in the file."""
    return load(environment)["services"]


_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def seconds(duration: str) -> float:
    """Returns a duration of the compose specification, like ``1m30s``, in seconds."""
    parts = re.findall(r"(\d+)(ms|h|m|s)", duration)
    if "".join(number + unit for number, unit in parts) != duration:
        raise ValueError(f"not a duration: {duration!r}")
    return sum(int(number) * _UNITS[unit] for number, unit in parts)
