"""What the demo gives its worker to do: for each order the eight tasks of the shop, in turn."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

__all__ = ["TABLES", "USES", "rows"]

#: Which resources each task uses, in the order of the tasks; twice where it uses two connections of one at a time. With
#: a client per task, each run of it would open each of these connections.
USES: Mapping[str, tuple[str, ...]] = {
    "fetch_price": ("api",),
    "place_order": ("db",),
    "take_payment": ("api", "db"),
    "sync_shipment": ("api", "db"),
    "check_address": ("api",),
    "track_parcel": ("carrier",),
    "reserve_article": ("cache",),
    "compare_suppliers": ("suppliers", "suppliers"),
}

#: Which table each task writes a row to. Reservations are in Redis, a key each.
TABLES: Mapping[str, str] = {
    "place_order": "orders",
    "take_payment": "payments",
    "sync_shipment": "shipments",
    "reserve_article": "reservations",
}


def rows(tasks: int) -> dict[str, int]:
    """Return how many rows each table has after the first ``tasks`` tasks, if nothing was lost.

    Args:
        tasks: How many tasks were submitted.
    """
    counted = dict.fromkeys(TABLES.values(), 0)
    for name in itertools.islice(itertools.cycle(USES), tasks):
        if name in TABLES:
            counted[TABLES[name]] += 1
    return counted
