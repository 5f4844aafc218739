"""Whether a failed attempt may be run again: pure decisions over what was noted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from workerpools._core.scope import Effect, Stale

__all__ = ["MAX_REPLAYS", "causes", "may_replay"]

#: One automatic replay and not more: a client should not automatically retry a failed automatic retry
#: (RFC 9110 §9.2.2).
MAX_REPLAYS = 1


def may_replay(error: BaseException, stale: Stale | None, effects: Sequence[Effect], replays: int) -> bool:
    """Decide whether the body may run again at once, on a fresh connection.

    It may if a connection was dead before the server applied anything, nothing that cannot be taken back has left in
    this attempt, and nothing but the library's own errors is in the chain of causes: a soft time limit or a bug of the
    task may be masked by the driver's clean-up.

    Args:
        error: What ended the attempt.
        stale: What was noted of the error; None if it is not that of a dead connection.
        effects: What left in the attempt.
        replays: How often the body was run again already.
    """
    if stale is None or effects or replays >= MAX_REPLAYS:
        return False
    return all(_belongs(cause, stale.packages) for cause in causes(error))


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and everything it was raised from or during, each once."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            yield found
            pending += (found.__cause__, found.__context__)


def _belongs(error: BaseException, packages: tuple[str, ...]) -> bool:
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in packages
