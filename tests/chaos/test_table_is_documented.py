"""The documentation prints the table that the tests are made from."""

from __future__ import annotations

from tests.chaos import table
from workerpools.failures import FailureKind


def test_the_page_has_the_table() -> None:
    """`python -m tests.chaos.table --write` writes it."""
    text = table.PAGE.read_text(encoding="utf-8")
    assert text == table.written(text)


def test_every_kind_and_action_is_in_the_table() -> None:
    """What the library can say and do is said and done somewhere."""
    cells = (*table.OVER_DATABASE, *table.OVER_PGBOUNCER, *table.OVER_HTTP, *table.OVER_REDIS)
    steps = {step for cell in cells for step in cell.steps}
    assert {kind for kind, _ in steps} - {None} == set(FailureKind)
    done = {table.REPLAYED, table.SENT_AGAIN, table.RESOLVED, table.RETRIED, table.RAISED, table.TIMED_OUT}
    assert {action for _, action in steps} == done
    assert any(not cell.steps for cell in cells)


def test_no_effect_is_done_twice_undeclared() -> None:
    """Only what may be sent again, or a task that says so, is seen twice by a server."""
    for cell in (*table.OVER_DATABASE, *table.OVER_PGBOUNCER, *table.OVER_HTTP, *table.OVER_REDIS):
        if "idempotent=True" in cell.declared:
            continue
        assert (cell.rows or 0) <= 1, cell
        assert (cell.increments or 0) <= 1, cell
        if "POST" in (*cell.methods, cell.before):
            # A POST before another request is seen as well as that one.
            assert (cell.requests or 0) <= 1 + bool(cell.before and cell.methods != ("",)), cell
