"""The script behind `fork_in_script`: it forks, and its child ends as any interpreter does."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any

from tests.support.forking import ChildDied, ChildError, Forked, start_child, wait_for_child


def run(before: Callable[[], Any], in_child: Callable[[Any], Any], kept: list[Any]) -> Callable[[float], Any]:
    """Open what `before` opens, fork, and return a function that waits for the child's answer."""
    kept.append(before())
    child = start_child(lambda: in_child(kept[0]), exit="sys")
    return lambda timeout: wait_for_child(child, timeout)


def main(kept: list[Any]) -> None:
    """Do what the request on standard input says, and write the pickled answer to standard output."""
    # Prints of the functions go to standard error: standard output carries the answer alone.
    answers = os.dup(1)
    os.dup2(2, 1)
    sys.path[:] = pickle.load(sys.stdin.buffer)
    before, in_child, after, timeout = pickle.load(sys.stdin.buffer)
    answer: Forked | ChildError
    try:
        child_result = run(before, in_child, kept)(timeout)
        answer = Forked(child_result, after(kept[0]) if after is not None else None)
    except ChildError as exc:
        answer = type(exc)(str(exc))
    except Exception as exc:
        answer = ChildDied(f"in the script: {exc!r}\n{traceback.format_exc()}")
    with os.fdopen(answers, "wb") as stream:
        pickle.dump(answer, stream)


if __name__ == "__main__":
    # Global, so that it is alive until the interpreter itself is torn down, in the child as in the parent.
    what_was_open: list[Any] = []
    main(what_was_open)
