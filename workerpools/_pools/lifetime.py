"""When a pooled connection is due for a check, and when for retirement: pure decisions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from workerpools._values import number, seconds, shown
from workerpools.errors import ConfigurationError

__all__ = ["Due", "Lifetime", "due"]


class Due(Enum):
    """What a pooled connection needs before it is used."""

    NOTHING = "nothing"
    CHECK = "check"
    RETIREMENT = "retirement"


@dataclass(frozen=True)
class Lifetime:
    """How long connections are kept and trusted. Times in seconds; None is for ever.

    Attributes:
        check_after: A connection that was used less than this ago is trusted; an older one is checked before it is
            used.
        max_idle: One that was not used for so long is replaced.
        max_lifetime: One that is so old is replaced.
        max_lifetime_jitter: The part of ``max_lifetime``, from 0 to 1, by which it is shortened at random, so that
            connections that were opened together are not replaced together.

    Raises:
        ConfigurationError: A value is out of its range.
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
        """Return how long one connection lives.

        Args:
            chance: A number from 0 to 1, drawn at random when it was opened.
        """
        return None if self.max_lifetime is None else self.max_lifetime * (1 - self.max_lifetime_jitter * chance)


def due(lifetime: Lifetime, *, age: float, idle: float, lives: float | None) -> Due:
    """Return what a pooled connection needs before it is used.

    Args:
        lifetime: The options.
        age: Since it was opened, in seconds.
        idle: Since it was last used, in seconds.
        lives: How long this one may live (see :meth:`Lifetime.drawn`).
    """
    if (lives is not None and age >= lives) or (lifetime.max_idle is not None and idle >= lifetime.max_idle):
        return Due.RETIREMENT
    if lifetime.check_after is not None and idle >= lifetime.check_after:
        return Due.CHECK
    return Due.NOTHING
