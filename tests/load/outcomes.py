"""What became of each task, what the servers have of it, and where the two disagree."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.load.upstream import Payment

DRIVERS = ("psycopg2", "psycopg")
READS = ("read", "get")
IDEMPOTENT = ("write_idempotent", "pay_idempotent")
#: They add a row to `entries`.
ON_COMMIT = ("send_on_commit", "send_held")
SENDS = (*ON_COMMIT, "send_at_once")
WRITES = ("write", "write_and_commit_itself", "pay", "pay_with_key", *SENDS)
PAYMENTS = ("pay", "pay_with_key", "pay_idempotent")
KINDS = (*READS, *IDEMPOTENT, *WRITES)

#: The note on an error after which a task was not run again.
NOTE = re.compile(
    r"workerpools: (?P<what>.+?) failed: (?P<known>.+?)\. Not run again: (?P<reason>.+)\.\s*$", re.MULTILINE
)
#: What the notes call a COMMIT whose outcome could not be found out.
UNKNOWN = "the connection was lost during COMMIT"
EVENTS = ("attempt_replayed", "request_replayed", "commit_resolved", "task_retried", "replay_refused")


@dataclass(frozen=True)
class Outcome:
    """How one task has ended.

    Attributes:
        number: The task's own number.
        kind: Which task it was.
        task_id: Celery's id of it.
        status: Celery's state.
        result: What the body returned, or Celery's description of the error.
        traceback: As Celery stored it.
        notes: The error's notes, as the worker recorded them.
    """

    number: int
    kind: str
    task_id: str
    status: str
    result: Any
    traceback: str
    notes: Sequence[str]

    @property
    def succeeded(self) -> bool:
        """Whether the task says that it is done."""
        return self.status == "SUCCESS"

    @property
    def refusal(self) -> re.Match[str] | None:
        """The note that says why the task was not run again."""
        return next((found for note in self.notes if (found := NOTE.match(note))), None)

    @property
    def unknown(self) -> bool:
        """Whether the task says that it does not know if its transaction was committed."""
        return self.refusal is not None and self.refusal["known"] == UNKNOWN

    @property
    def committed_before(self) -> bool:
        """Whether the task says that it had committed before it failed."""
        return self.refusal is not None and "COMMIT by " in self.refusal["reason"]


@dataclass(frozen=True)
class Effects:
    """What the servers have.

    Attributes:
        entries: How many rows each number has.
        stock: The numbers that the idempotent tasks wrote.
        payments: Every POST that the upstream has read as a whole.
        children: How often the child of each number has run.
    """

    entries: Mapping[int, int]
    stock: frozenset[int]
    payments: Sequence[Payment]
    children: Mapping[int, int]
    requested: Mapping[int, int] = field(init=False)
    executed: Mapping[int, int] = field(init=False)

    def __post_init__(self) -> None:
        requested = collections.Counter(payment.number for payment in self.payments)
        executed = collections.Counter(payment.number for payment in self.payments if payment.executed)
        object.__setattr__(self, "requested", requested)
        object.__setattr__(self, "executed", executed)


def problems(outcomes: Iterable[Outcome], effects: Effects, *, traceback_has_notes: bool) -> list[str]:
    """Return what was lost, doubled or not explained; one line each."""
    found = []
    for outcome in outcomes:
        told = [
            *_how_it_ended(outcome, traceback_has_notes),
            *_rows(outcome, effects),
            *_payments(outcome, effects),
            *_children(outcome, effects),
        ]
        found += [f"{outcome.kind} {outcome.number} ({outcome.task_id}, {outcome.status}): {line}" for line in told]
    return found


def _how_it_ended(outcome: Outcome, traceback_has_notes: bool) -> Iterator[str]:
    if outcome.succeeded:
        wanted = outcome.number % 10 * 7 if outcome.kind == "read" else outcome.number
        if outcome.result != wanted:
            yield f"the answer is {outcome.result!r}, not {wanted}: somebody else's"
    elif outcome.status != "FAILURE":
        yield "this is neither success nor failure"
    elif outcome.refusal is None:
        yield f"no reason is named: {outcome.result!r} {outcome.notes!r}"
    elif traceback_has_notes and NOTE.search(outcome.traceback) is None:
        yield f"the stored traceback does not name the reason: {outcome.traceback!r}"


def _rows(outcome: Outcome, effects: Effects) -> Iterator[str]:
    rows = effects.entries.get(outcome.number, 0)
    if outcome.kind not in WRITES:
        wanted = {0}
    elif outcome.succeeded:
        wanted = {1}
    elif outcome.unknown:
        wanted = {0, 1}
    else:
        wanted = {int(outcome.committed_before)}
    if rows not in wanted:
        yield f"{rows} rows, wanted {sorted(wanted)}; {outcome.notes!r}"
    if outcome.kind in IDEMPOTENT and outcome.succeeded and outcome.number not in effects.stock:
        yield "its row is missing"


def _payments(outcome: Outcome, effects: Effects) -> Iterator[str]:
    requested, executed = effects.requested.get(outcome.number, 0), effects.executed.get(outcome.number, 0)
    if outcome.kind not in PAYMENTS:
        if requested:
            yield f"{requested} POSTs by a task that sends none"
        return
    if outcome.kind == "pay" and requested > 1:
        yield f"{requested} POSTs without a key"
    if outcome.kind == "pay_with_key" and executed > 1:
        yield f"{requested} POSTs, of which {executed} had a key that was new"
    if outcome.succeeded and not executed:
        yield "no POST has arrived"


def _children(outcome: Outcome, effects: Effects) -> Iterator[str]:
    runs = effects.children.get(outcome.number, 0)
    if outcome.kind in SENDS and outcome.succeeded:
        wanted = {1}
    else:
        # What waits for a commit is dropped with it, also with one of which nobody knows.
        wanted = {0, 1} if outcome.kind == "send_at_once" else {0}
    if runs not in wanted:
        yield f"its child ran {runs} times, wanted {sorted(wanted)}; {outcome.notes!r}"


def reasons(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """Count the refusals by kind of failure and reason."""
    found: collections.Counter[str] = collections.Counter()
    for outcome in outcomes:
        if outcome.refusal is not None:
            found[f"{outcome.refusal['known']} → {outcome.refusal['reason']}"] += 1
    return dict(found.most_common())


def events(log: str) -> collections.Counter[str]:
    """Count the library's events in a worker's log, a resolved COMMIT with what became of it."""
    found = collections.Counter(re.findall(rf"\b({'|'.join(EVENTS)}) resource=", log))
    found.update(f"commit_{outcome}" for outcome in re.findall(r"commit_resolved .*outcome=(\w+)", log))
    return found
