"""Validation of numbers and names at declaration."""

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

#: The longest wait, in seconds. Socket timeouts are 32-bit milliseconds: above 24 days a wait ends early, or never.
WEEK = 604_800.0

#: The longest duration of any other kind, such as an age, in seconds.
YEAR = 31_536_000.0

#: The largest count of connections, tokens or retries.
COUNT = 1_000_000

#: The longest resource name, in bytes of UTF-8: its room in shared memory.
NAME = 56

# Spelled out, so that the number appears in the message.
_NAMES = {WEEK: "604800 (a week)", YEAR: "31536000 (a year)"}


def number(value: object, least: float, most: float, *, above: bool = False) -> float | None:
    """Return ``value`` as a float; None if it is not an int or float, or out of bounds.

    Args:
        value: Any object. A bool is not a number, nor is a string.
        least: The minimum.
        most: The maximum.
        above: Whether the minimum itself is out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # Compared before conversion: an int may be too large for a float. NaN fails every comparison.
    if not least <= value <= most or (above and value == least):
        return None
    return float(value)


def seconds(
    value: object, name: str, *, most: float = YEAR, above: bool = False, optional: bool = False, least: float = 0.0
) -> float:
    """Return ``value`` as a number of seconds.

    Args:
        value: Any object.
        name: The parameter, for the message: ``SQLAlchemyEngine(connect_timeout``.
        most: The maximum, in seconds; usually :data:`WEEK` for a timeout.
        above: Whether the minimum itself is out of bounds.
        optional: Whether the message mentions None. The caller handles None itself.
        least: The minimum, in seconds.

    Raises:
        ConfigurationError: ``value`` is not a number, or is out of bounds.
    """
    found = number(value, least, most, above=above)
    if found is None:
        raise ConfigurationError(f"{name}={shown(value)}: wanted {wanted_seconds(most, above, least, optional)}")
    return found


def wanted_seconds(most: float = YEAR, above: bool = False, least: float = 0.0, optional: bool = False) -> str:
    """Return a description of the values accepted by :func:`seconds`."""
    lowest = f"above {least:g}" if above else f"at least {least:g}"
    return f"a number of seconds, {lowest} and at most {_NAMES.get(most, f'{most:g}')}{', or None' if optional else ''}"


def whole(value: object, name: str, *, least: int = 0, most: int = COUNT, optional: bool = False) -> int:
    """Return ``value`` as a whole number.

    Args:
        value: Any object.
        name: The parameter, for the message.
        least: The minimum.
        most: The maximum.
        optional: Whether the message mentions None. The caller handles None itself.

    Raises:
        ConfigurationError: ``value`` is not a whole number, or is out of bounds.
    """
    if not isinstance(value, int) or number(value, least, most) is None:
        wanted = f"{wanted_whole(least, most)}{', or None' if optional else ''}"
        raise ConfigurationError(f"{name}={shown(value)}: wanted {wanted}")
    return value


def wanted_whole(least: int, most: int = COUNT) -> str:
    """Return a description of the values accepted by :func:`whole`."""
    return f"a whole number of at least {least}, and at most {most}"


def shown(value: object) -> str:
    """Return a rejected value in a form fit for a message: short, and without secrets."""
    if isinstance(value, str):
        return repr(redact_url(value[:100]))
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (int, float)):
        return repr(value)
    return f"a value of the type {type(value).__name__}"


def check_name(name: object, where: str = "pools.add(…, name=…)") -> None:
    """Raise an error unless ``name`` is a valid resource name.

    Names appear in shared memory, logs, labels and tables. A valid one is printable, without leading or trailing spaces
    and without ``"``, ``\\``, ``,`` and ``=``, and at most 56 bytes long in UTF-8.

    Args:
        name: Any object.
        where: The source of the name, for the message.

    Raises:
        ConfigurationError: The name is invalid.
    """
    if not isinstance(name, str):
        problem = f"{shown(name)} is not a string"
    elif not name or name != name.strip():
        problem = f"{name[:NAME]!r} is empty, or has leading or trailing spaces"
    elif not name.isprintable() or not _APART.isdisjoint(name):
        problem = f"{name[:NAME]!r} must consist of printable characters other than {' '.join(sorted(_APART))}"
    elif (size := len(name.encode("utf-8", "replace"))) > NAME:
        problem = f"{name!r} takes {size} bytes in UTF-8, more than the {NAME} that can be published; shorten it"
    else:
        return
    raise ConfigurationError(f"{where}: {problem}")


# Delimiters of labels, fields and values in formatted lines.
_APART = frozenset('"\\,=')
