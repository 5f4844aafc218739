"""How often, and after what delay, a task runs again after a failure of a connection."""

from __future__ import annotations

from dataclasses import dataclass, fields

from workerpools.errors import ConfigurationError

__all__ = ["RetryPolicy"]


@dataclass(frozen=True)
class RetryPolicy:
    """How often a task runs again after a failure of a connection. Times in seconds.

    Attributes:
        replays: How often the body, or a request of it, may run again at once in the process. Counted over all
            deliveries of the task, so that replays and retries add up and never multiply.
        max_retries: How often the task may be put back on the broker, counted as Celery counts (``request.retries``).
        backoff: The upper bound of the first delay; it doubles with each retry. The delay is drawn evenly from 0 to
            the bound (full jitter).
        backoff_max: The highest bound.

    Raises:
        ConfigurationError: A value is negative or no number.
    """

    replays: int = 2
    max_retries: int = 3
    backoff: float = 2.0
    backoff_max: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.name in ("replays", "max_retries")
            right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and value >= 0
            if not right:
                wanted = "a whole number of at least 0" if whole else "a number of seconds, at least 0"
                raise ConfigurationError(f"RetryPolicy({field.name}={value!r}): wanted {wanted}")

    @property
    def longest_delay(self) -> float:
        """The longest delay that may be drawn, in seconds; 0 without retries."""
        return min(self.backoff_max, self.backoff * 2.0 ** (self.max_retries - 1)) if self.max_retries else 0.0

    @classmethod
    def of(cls, value: object, where: str) -> RetryPolicy | None:
        """Return the policy that a task's ``replay`` option stands for; None for ``replay=False``.

        Args:
            value: A policy, True or False.
            where: The task, for the message.

        Raises:
            ConfigurationError: It is something else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, bool):
            return cls() if value else None
        raise ConfigurationError(f"{where}: replay={value!r}; wanted: a RetryPolicy, True or False")
