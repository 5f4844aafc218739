"""Settings that are read from an app's configuration and the environment: what one is, and how its value is parsed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from workerpools._values import COUNT, WEEK, YEAR, number, wanted_seconds, wanted_whole

__all__ = ["PREFIX", "Setting", "parse_number", "port", "text", "time", "time_or_none", "timeout", "url", "whole"]

#: What every setting's key begins with.
PREFIX = "workerpools_"


def text(value: object) -> str:
    """Return a text that is not empty, stripped.

    Raises:
        ValueError: It is none; the message says what was wanted, and so do those of the others.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not empty")
    return value.strip()


def url(example: str) -> Callable[[object], str]:
    """Return what parses a URL with a scheme.

    Args:
        example: Shown where the value is none.
    """

    def parse(value: object) -> str:
        found = text(value)
        if "://" not in found:
            raise ValueError(f"a URL with a scheme, like {example}")
        return found

    return parse


def _seconds(most: float, above: bool) -> Callable[[object], float]:
    wanted = wanted_seconds(most, above)
    return lambda value: parse_number(value, wanted, 0, most, above=above)


#: Parses seconds to wait: above 0, at most a week.
timeout = _seconds(WEEK, above=True)
#: Parses another time in seconds: above 0, at most a year.
time = _seconds(YEAR, above=True)
#: The same, or 0.
time_or_none = _seconds(YEAR, above=False)


def whole(least: int, most: int = COUNT, wanted: str = "") -> Callable[[object], int]:
    """Return what parses a whole number.

    Args:
        least: The least that is accepted.
        most: The most that is accepted.
        wanted: What to say was wanted.
    """
    wanted = wanted or wanted_whole(least, most)

    def parse(value: object) -> int:
        found = parse_number(value, wanted, least, most)
        if not found.is_integer():
            raise ValueError(wanted)
        return int(found)

    return parse


#: Parses a TCP port; 0 for any free one.
port = whole(0, 65535, "a port from 0 to 65535")


def parse_number(value: object, wanted: str, least: float, most: float, *, above: bool = False) -> float:
    """Return ``value`` as a float; variables of the environment are text.

    Args:
        value: The raw value.
        wanted: What to say was wanted.
        least: The least that is accepted.
        most: The most that is accepted.
        above: Whether ``least`` itself is too little.
    """
    try:
        found = number(float(value) if isinstance(value, str) else value, least, most, above=above)
    except ValueError:
        found = None
    if found is None:
        raise ValueError(wanted)
    return found


class Setting(NamedTuple):
    """One setting.

    Attributes:
        name: The name after the prefix ``workerpools_``.
        parse: Turns the raw value into the setting's own; raises ValueError with what was wanted instead.
        meaning: One line for the documentation, with the default in parentheses.
        secret: Whether the raw value may hold a password, and is in no message.
    """

    name: str
    parse: Callable[[object], Any]
    meaning: str
    secret: bool = False

    @classmethod
    def text(cls, name: str, meaning: str) -> Setting:
        """Return a setting that is a text, not empty."""
        return cls(name, text, meaning)

    @classmethod
    def url(cls, name: str, meaning: str, *, example: str) -> Setting:
        """Return a setting that is a URL with a scheme; it is in no message, as it may hold a password.

        Args:
            name: The name after the prefix.
            meaning: One line for the documentation.
            example: Shown where the value is no URL.
        """
        return cls(name, url(example), meaning, secret=True)

    @classmethod
    def timeout(cls, name: str, meaning: str) -> Setting:
        """Return a setting that is a number of seconds to wait: above 0, at most a week."""
        return cls(name, timeout, meaning)

    @classmethod
    def whole(cls, name: str, meaning: str, *, least: int = 0) -> Setting:
        """Return a setting that is a whole number of at least ``least``."""
        return cls(name, whole(least), meaning)

    @property
    def key(self) -> str:
        """The key in ``app.conf``."""
        return PREFIX + self.name

    @property
    def variable(self) -> str:
        """The environment variable."""
        return self.key.upper()
