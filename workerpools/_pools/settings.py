"""Settings from the app's configuration and the environment: definitions and parsers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from workerpools._values import COUNT, WEEK, YEAR, number, wanted_seconds, wanted_whole

__all__ = ["PREFIX", "Setting", "parse_number", "port", "text", "time", "time_or_none", "timeout", "url", "whole"]

#: The prefix of every setting's key.
PREFIX = "workerpools_"


def text(value: object) -> str:
    """Return a non-empty string, stripped.

    Raises:
        ValueError: ``value`` is anything else. The message, as in all parsers, describes the accepted values.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not empty")
    return value.strip()


def url(example: str) -> Callable[[object], str]:
    """Return a parser for URLs with a scheme.

    Args:
        example: An example for the error message.
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


#: Parses a timeout in seconds: above 0, at most a week.
timeout = _seconds(WEEK, above=True)
#: Parses any other duration in seconds: above 0, at most a year.
time = _seconds(YEAR, above=True)
#: The same, or 0.
time_or_none = _seconds(YEAR, above=False)


def whole(least: int, most: int = COUNT, wanted: str = "") -> Callable[[object], int]:
    """Return a parser for whole numbers.

    Args:
        least: The minimum.
        most: The maximum.
        wanted: The description of the accepted values, for the error message.
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
    """Return ``value`` as a float; strings are converted, because environment variables are strings.

    Args:
        value: The raw value.
        wanted: The description of the accepted values, for the error message.
        least: The minimum.
        most: The maximum.
        above: Whether the minimum itself is out of bounds.

    Raises:
        ValueError: ``value`` is not a number, or is out of bounds.
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
        parse: Converts the raw value; raises ValueError with a description of the accepted values.
        meaning: One line for the documentation, with the default in parentheses.
        secret: Whether the raw value may contain a password, and so is never shown.
    """

    name: str
    parse: Callable[[object], Any]
    meaning: str
    secret: bool = False

    @classmethod
    def text(cls, name: str, meaning: str) -> Setting:
        """Return a setting for a non-empty string.

        Args:
            name: The name after the prefix.
            meaning: One line for the documentation.
        """
        return cls(name, text, meaning)

    @classmethod
    def url(cls, name: str, meaning: str, *, example: str) -> Setting:
        """Return a setting for a URL with a scheme, which is never shown, because it may contain a password.

        Args:
            name: The name after the prefix.
            meaning: One line for the documentation.
            example: An example for the error message.
        """
        return cls(name, url(example), meaning, secret=True)

    @classmethod
    def timeout(cls, name: str, meaning: str) -> Setting:
        """Return a setting for a timeout in seconds: above 0, at most a week.

        Args:
            name: The name after the prefix.
            meaning: One line for the documentation.
        """
        return cls(name, timeout, meaning)

    @classmethod
    def whole(cls, name: str, meaning: str, *, least: int = 0) -> Setting:
        """Return a setting for a whole number.

        Args:
            name: The name after the prefix.
            meaning: One line for the documentation.
            least: The minimum.
        """
        return cls(name, whole(least), meaning)

    @property
    def key(self) -> str:
        """The key in ``app.conf``."""
        return PREFIX + self.name

    @property
    def variable(self) -> str:
        """The environment variable."""
        return self.key.upper()
