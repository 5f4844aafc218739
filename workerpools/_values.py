"""Bounds of numbers and names, checked where they are declared."""

from __future__ import annotations

from workerpools._text import redact_url
from workerpools.errors import ConfigurationError

__all__ = [
    "COUNT",
    "NAME",
    "WEEK",
    "YEAR",
    "check_name",
    "number",
    "seconds",
    "shown",
    "wanted_seconds",
    "wanted_whole",
    "whole",
]

#: The longest wait, in seconds. Sockets count milliseconds in 32 bits: beyond 24 days a wait ends early, or never.
WEEK = 604_800.0

#: The longest time of another kind, such as an age, in seconds.
YEAR = 31_536_000.0

#: The highest count of anything: connections, tokens, retries.
COUNT = 1_000_000

#: How long a resource's name may be, in bytes of UTF-8: what shared memory holds.
NAME = 56

# Written out, so that a number can be compared with the message.
_NAMES = {WEEK: "604800 (a week)", YEAR: "31536000 (a year)"}


def number(value: object, least: float, most: float, *, above: bool = False) -> float | None:
    """Return ``value`` as a float; None if it is no int or float, or out of bounds.

    Args:
        value: Anything. A bool is no number, and neither is a text.
        least: The least that is accepted.
        most: The most that is accepted.
        above: Whether ``least`` itself is too little.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # Compared as it is: an int may be too large for a float. NaN fails each comparison.
    if not least <= value <= most or (above and value == least):
        return None
    return float(value)


def seconds(
    value: object, name: str, *, most: float = YEAR, above: bool = False, optional: bool = False, least: float = 0.0
) -> float:
    """Return ``value`` as a number of seconds.

    Args:
        value: Anything.
        name: What it was given as, for the message: ``SQLAlchemyEngine(connect_timeout``.
        most: The most that is accepted, in seconds: :data:`WEEK` for what is waited for, as a rule.
        above: Whether ``least`` itself is too little.
        optional: Whether the message is to mention None; the caller has let it pass.
        least: The least that is accepted, in seconds.

    Raises:
        ConfigurationError: It is none, or out of bounds.
    """
    found = number(value, least, most, above=above)
    if found is None:
        raise ConfigurationError(f"{name}={shown(value)}: wanted {wanted_seconds(most, above, least, optional)}")
    return found


def wanted_seconds(most: float = YEAR, above: bool = False, least: float = 0.0, optional: bool = False) -> str:
    """Return what :func:`seconds` accepts, in words."""
    lowest = f"above {least:g}" if above else f"at least {least:g}"
    return f"a number of seconds, {lowest} and at most {_NAMES.get(most, f'{most:g}')}{', or None' if optional else ''}"


def whole(value: object, name: str, *, least: int = 0, most: int = COUNT, optional: bool = False) -> int:
    """Return ``value``, a whole number.

    Args:
        value: Anything.
        name: What it was given as, for the message.
        least: The least that is accepted.
        most: The most that is accepted.
        optional: Whether the message is to mention None; the caller has let it pass.

    Raises:
        ConfigurationError: It is none, or out of bounds.
    """
    if not isinstance(value, int) or number(value, least, most) is None:
        wanted = f"{wanted_whole(least, most)}{', or None' if optional else ''}"
        raise ConfigurationError(f"{name}={shown(value)}: wanted {wanted}")
    return value


def wanted_whole(least: int, most: int = COUNT) -> str:
    """Return what :func:`whole` accepts, in words."""
    return f"a whole number of at least {least}, and at most {most}"


def shown(value: object) -> str:
    """Return a value that was refused as a message may show it: without secrets, and not a page long."""
    if isinstance(value, str):
        return repr(redact_url(value[:100]))
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (int, float)):
        return repr(value)
    return f"a value of the type {type(value).__name__}"


def check_name(name: object, where: str = "pools.add(…, name=…)") -> None:
    """Refuse what cannot be a resource's name.

    It is published in shared memory, and read in logs, labels and tables: one line of printable characters, without
    spaces at its ends or one of ``"``, ``\\``, ``,`` and ``=``, at most 56 bytes in UTF-8.

    Args:
        name: Anything.
        where: What gives the name, for the message.

    Raises:
        ConfigurationError: It is none.
    """
    if not isinstance(name, str):
        problem = f"{shown(name)} is no text"
    elif not name or name != name.strip():
        problem = f"{name[:NAME]!r} is empty, or has spaces at its ends"
    elif not name.isprintable() or not _APART.isdisjoint(name):
        problem = f"{name[:NAME]!r} is to be of printable characters other than {' '.join(sorted(_APART))}"
    elif (size := len(name.encode("utf-8", "replace"))) > NAME:
        problem = f"{name!r} takes {size} bytes in UTF-8, and {NAME} are the most that can be published; shorten it"
    else:
        return
    raise ConfigurationError(f"{where}: {problem}")


# They end a label, a field or a value where names are written into lines.
_APART = frozenset('"\\,=')
