"""What leaves in an attempt and cannot be taken back."""

from __future__ import annotations

from workerpools._core import scope
from workerpools.errors import NoAttemptError

__all__ = ["Effect", "declare_effect", "note_effect", "withdraw_effect"]

#: How many effects an attempt remembers: the first one decides already, the others are there to be read.
MAX_EFFECTS = 100


class Effect:
    """Something that left in an attempt and cannot be taken back. Two of the same text are two effects.

    Attributes:
        what: A short phrase without secrets, like ``POST by 'api'``.
    """

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def __repr__(self) -> str:
        return f"Effect({self.what!r})"

    def __str__(self) -> str:
        return self.what


def note_effect(effect: Effect) -> None:
    """Note that something leaves which cannot be taken back.

    It counts for the attempt of the calling context and for those it runs inside of. A thread that a body started has
    no attempt: what leaves there counts for every attempt of the process, since any of them may have started it.

    Args:
        effect: What leaves. The same object may be noted again: it counts once.
    """
    for attempt in scope.concerned():
        if len(attempt.effects) < MAX_EFFECTS and effect not in attempt.effects:
            # A new tuple: another thread may be looking at this one.
            attempt.effects = (*attempt.effects, effect)


def withdraw_effect(effect: Effect) -> None:
    """Take back a noted effect: it turned out that the server cannot have acted on it."""
    for attempt in {*scope.running(), *scope.concerned()}:
        attempt.effects = tuple(noted for noted in attempt.effects if noted is not effect)


def declare_effect(what: str) -> None:
    """Note an effect that no resource sees: a mail, a file, a call of somebody else's client.

    Args:
        what: A short phrase without secrets, for the message that says why a task was not run again.

    Raises:
        NoAttemptError: No task body runs in this process.
    """
    if not scope.concerned():
        raise NoAttemptError(f"the effect {what!r} belongs to one run of a task body, and none runs here")
    note_effect(Effect(what))
