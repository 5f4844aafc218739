"""The same through a PgBouncer in transaction mode."""

from __future__ import annotations

import pytest

from tests.chaos import table
from tests.chaos.breaks import DatabaseSite
from tests.chaos.table import Cell
from tests.chaos.test_database import check


@pytest.mark.parametrize(("cell", "broken", "driver", "method"), table.parameters(*table.OVER_PGBOUNCER))
def test_cell(cell: Cell, broken: str, driver: str, method: str, database_site: DatabaseSite) -> None:
    """What the task did, and how many rows are there in the end."""
    check(cell, broken, database_site)
