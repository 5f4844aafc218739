"""Checks and retirement of pooled connections: pure decisions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from workerpools._values import number, seconds, shown
from workerpools.errors import ConfigurationError

__all__ = ["Due", "Lifetime", "due"]


class Due(Enum):
    """The action required before a pooled connection is used."""

    NOTHING = "nothing"
    CHECK = "check"
    RETIREMENT = "retirement"


@dataclass(frozen=True)
class Lifetime:
    """How long connections are kept and trusted. Times are in seconds; None means for ever.

    Attributes:
        check_after: A connection that has been idle for this long is checked before use.
        max_idle: A connection that has been idle for this long is replaced.
        max_lifetime: A connection of this age is replaced.
        max_lifetime_jitter: The maximum random reduction of ``max_lifetime``, as a fraction from 0 to 1, so that
            connections opened together are not replaced together.

    Raises:
        ConfigurationError: A value is out of range.
    """

    check_after: float | None = 1.0
    max_idle: float | None = 600.0
    max_lifetime: float | None = 1800.0
    max_lifetime_jitter: float = 0.1

    def __post_init__(self) -> None:
        for name in ("check_after", "max_idle", "max_lifetime"):
            value = getattr(self, name)
            if value is not None:
                seconds(value, name, optional=True)
        if number(self.max_lifetime_jitter, 0, 1) is None:
            raise ConfigurationError(
                f"max_lifetime_jitter={shown(self.max_lifetime_jitter)}: wanted a number from 0 to 1"
            )

    def drawn(self, chance: float) -> float | None:
        """Return the maximum lifetime of one connection, in seconds; None for no limit.

        Args:
            chance: A random number from 0 to 1, drawn when the connection was opened.
        """
        return None if self.max_lifetime is None else self.max_lifetime * (1 - self.max_lifetime_jitter * chance)


def due(lifetime: Lifetime, *, age: float, idle: float, lives: float | None) -> Due:
    """Return the action required before a pooled connection is used.

    Args:
        lifetime: The options.
        age: The time since the connection was opened, in seconds.
        idle: The time since it was last used, in seconds.
        lives: Its own maximum lifetime, in seconds (see :meth:`Lifetime.drawn`); None for no limit.
    """
    if (lives is not None and age >= lives) or (lifetime.max_idle is not None and idle >= lifetime.max_idle):
        return Due.RETIREMENT
    if lifetime.check_after is not None and idle >= lifetime.check_after:
        return Due.CHECK
    return Due.NOTHING
