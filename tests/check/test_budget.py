"""The arithmetic of the connection budget."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from workerpools._check.budget import Row, Workers, budget, findings
from workerpools._check.budget_table import document, sections
from workerpools._pools.limits import Limit


def limit(most: int | None = 100, **more: object) -> Limit:
    return Limit(**{"server": "PostgreSQL 16 at db:5432", "name": "max_connections", "key": "1", "most": most, **more})  # type: ignore[arg-type]


def declared(name: str, kind: str, concurrency: int) -> int | None:
    """As engines are declared: by default, with sizes of its own, without a limit; and a Redis client."""
    return {"db": concurrency + 1, "sized": 5, "endless": 0, "cache": max(10, concurrency)}.get(name)


def fleet(count: int, kind: str, concurrency: int, *names: str, opened: Mapping[str, int] | None = None) -> Workers:
    own = 1 if kind in ("prefork", "solo") else concurrency
    return Workers(count, kind, concurrency, {name: declared(name, kind, own) or 0 for name in names}, opened)


# Each with the sum, the others, the head room, and the largest concurrency, also during a deploy.
CASES = {
    # 4 × 8 × 2 of 97; twelve children of each worker fit, and six of each of eight.
    "prefork": ([fleet(4, "prefork", 8, "db")], limit(reserved=3), (64, None, 33, 12, 6)),
    "just": ([fleet(4, "prefork", 12, "db")], limit(reserved=3), (96, None, 1, 12, 6)),
    "too many": ([fleet(4, "prefork", 13, "db")], limit(reserved=3), (104, None, -7, 12, 6)),
    "others": ([fleet(4, "prefork", 8, "db")], limit(reserved=3, open=40), (64, 40, -7, 7, 3)),
    "one too many": ([fleet(60, "prefork", 1, "db")], limit(), (120, None, -20, 0, 0)),
    "fits once": ([fleet(50, "prefork", 1, "db")], limit(), (100, None, 0, 1, 0)),
    # What planned workers' predecessors have open is theirs to inherit; it is told by its names.
    "predecessors": ([fleet(4, "prefork", 8, "db")], limit(open=40, own=30), (64, 10, 26, 11, 5)),
    # What running workers have open is in the sum already.
    "running": ([fleet(1, "prefork", 8, "db", opened={"db": 9})], limit(open=12, own=11), (16, 3, 81, 48, 24)),
    "counted late": ([fleet(1, "prefork", 8, "db", opened={"db": 9})], limit(open=8), (16, 0, 84, 50, 25)),
    # One process each, whatever its concurrency.
    "threads": ([fleet(2, "threads", 20, "db")], limit(), (42, None, 58, 49, 24)),
    "gevent": ([fleet(1, "gevent", 500, "db")], limit(), (501, None, -401, 99, 49)),
    "sized": ([fleet(2, "threads", 20, "sized")], limit(), (10, None, 90, None, None)),
    "sized, none fits": ([fleet(21, "threads", 20, "sized")], limit(), (105, None, -5, 0, 0)),
    "solo": ([fleet(3, "solo", 1, "db")], limit(), (6, None, 94, None, None)),
    "solo, none fits": ([fleet(51, "solo", 1, "db")], limit(), (102, None, -2, 0, 0)),
    "cache": ([fleet(2, "threads", 4, "cache")], limit(30), (20, None, 10, 15, 0)),
    # Workers of two kinds: every one of them with the same concurrency.
    "mixed": ([fleet(2, "prefork", 8, "db"), fleet(1, "threads", 10, "db")], limit(), (43, None, 57, 19, 9)),
    "not used": ([fleet(9, "prefork", 9)], limit(), (0, None, 100, None, None)),
    "endless": ([fleet(1, "prefork", 1, "endless")], limit(open=3), (None, 3, None, None, None)),
    "unknown": ([fleet(1, "prefork", 4, "db")], limit(None, unknown="refused"), (8, None, None, None, None)),
    # What the server has no room for already.
    "full": ([fleet(1, "prefork", 1, "db")], limit(10, reserved=5, open=7), (2, 7, -4, 0, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_fits(name: str) -> None:
    """Sum, head room and the largest concurrency, which fits, while one more does not."""
    workers, given, expected = CASES[name]
    (resource,) = {name for each in workers for name in each.ceilings} or {"db"}
    (row,) = budget(workers, {resource: [given]}, declared)
    assert (row.sum, row.others, row.head_room, row.largest, row.largest_overlapping) == expected
    if row.largest:
        for concurrency, fits in ((row.largest, True), (row.largest + 1, False)):
            same = [fleet(each.count, each.kind, concurrency, *each.ceilings, opened=each.open) for each in workers]
            (again,) = budget(same, {resource: [given]}, declared)
            assert again.head_room is not None
            assert (again.head_room >= 0) is fits


def test_resources_of_one_server_share_its_limits() -> None:
    """A limit is one row, however its server is called; roles and databases have limits of their own."""
    role = limit(20, name="role app", key="1 app")
    limits = {
        "db": [limit(open=30, own=4, reserved=3), role],
        # A superuser, by another name of the server.
        "reports": [limit(open=30, own=5, server="PostgreSQL 16 at localhost:5432")],
        "other": [limit(50, server="PostgreSQL 16 at other:5432", key="2")],
    }
    ceilings = {"db": 2, "reports": 3, "other": 4}
    shared, of_role, other = budget([Workers(1, "prefork", 8, ceilings)], limits, lambda name, *_: ceilings[name])
    assert (dict(shared.resources), shared.sum, shared.others) == ({"db": 16, "reports": 24}, 40, 21)
    assert (shared.limit.reserved, shared.head_room, shared.largest) == (3, 100 - 3 - 21 - 40, 15)
    assert (of_role.sum, of_role.head_room, of_role.largest) == (16, 4, 10)
    assert (other.sum, other.largest) == (32, 12)


def test_a_resource_with_several_servers() -> None:
    """As Django's: of the connections of a process each limit counts its own; where the open ones are is not known,
    and only those that cannot be elsewhere are ours."""
    one = limit(20, open=9, capacity=lambda pool: pool.concurrency or 1)
    other = limit(30, key="2", server="PostgreSQL 16 at other:5432", open=9, capacity=lambda pool: 4)

    def declared(name: str, kind: str, concurrency: int) -> int:
        return concurrency + 4

    def told(kind: str, opened: int | None) -> list[tuple[int | None, int | None, int | None]]:
        processes = Workers(1, kind, 3, {"django": 5 if kind == "prefork" else 7}, opened and {"django": opened})
        found = budget([processes], {"django": [one, other]}, declared)
        return [(row.sum, row.others, row.largest) for row in found]

    assert told("prefork", None) == [(3, 9, 11), (12, 9, 5)]
    assert told("threads", None) == [(3, 9, 11), (4, 9, None)]
    # All of them are open, and half of them.
    assert told("prefork", 15) == [(3, 6, 14), (12, 0, 7)]
    assert told("prefork", 8) == [(3, 9, 11), (12, 4, 6)]
    (drawn, _) = sections(budget([fleet(1, "prefork", 3, "django")], {"django": [one, other]}, declared), [])
    assert drawn.notes[0][0][0] == "django: 3 × 1 (processes × connections)"


def rows(workers: Workers, given: Limit) -> list[Row]:
    return budget([workers], {"db": [given]}, declared)


@pytest.mark.parametrize(
    ("workers", "given", "said"),
    [
        (fleet(4, "prefork", 6, "db"), limit(reserved=3), ""),
        (
            fleet(4, "prefork", 8, "db"),
            limit(reserved=3, open=40),
            "WP401 error: the workers may open 64 connections; max_connections of PostgreSQL 16 at db:5432 is 100, "
            "less 3 reserved and 40 in use by others: 7 too many; the largest concurrency that fits is 7",
        ),
        (fleet(60, "prefork", 1, "db"), limit(), "20 too many; no concurrency fits so many workers"),
        (
            fleet(4, "prefork", 8, "db"),
            limit(),
            "WP402 warning: the workers may open 64 connections; max_connections of PostgreSQL 16 at db:5432 is 100: "
            "36 are left, and a deploy needs 64; the largest concurrency that fits is 6",
        ),
        (fleet(1, "prefork", 1, "db"), limit(None, unknown="no console"), "WP403 hint: max_connections of PostgreSQL"),
        # Above a pool of PgBouncer's in transaction mode, transactions wait.
        (fleet(4, "prefork", 80, "db"), limit(waits=True), ""),
    ],
)
def test_findings(workers: Workers, given: Limit, said: str) -> None:
    """What does not fit is an error, what leaves no room for a deploy a warning, what is unknown a hint."""
    found = [str(each) for each in findings(rows(workers, given), {"db": "ShopTask.db"})]
    assert len(found) == bool(said)
    assert all(said in each and each.startswith("ShopTask.db: ") for each in found)


def test_a_pool_without_a_limit_is_a_hint() -> None:
    """Nothing can be summed up."""
    workers = fleet(1, "prefork", 1, "endless")
    (found,) = findings(budget([workers], {"endless": [limit()]}, declared), {})
    assert str(found).startswith("endless: WP403 hint: nothing limits the connections of endless but max_connections")


def test_table_and_document() -> None:
    """The same numbers in both; what is unknown is told, and is None."""
    workers = [fleet(1, "prefork", 8, "db", opened={"db": 9}), fleet(1, "prefork", 8, "db", opened={"db": 9})]
    known = limit(
        reserved=3, open=30, clients=(("app (workerpools db)", 18), ("web", 9), *((f"c{n}", 1) for n in range(3)))
    )
    unknown = limit(None, name="max_client_conn", key="2", server="PgBouncer at db:6432", unknown="its console refuses")
    found = budget(workers, {"db": [known, unknown]}, declared)
    server, bouncer = sections(found, workers)
    assert "".join(text for text, _ in server.title) == "PostgreSQL 16 at db:5432  2 workers, 16 processes"
    (row,) = server.rows
    cells = ["".join(text for text, _ in cell) for cell in row.cells]
    assert cells == ["max_connections", "db", "100", "3", "12", "32", "53", "21", "10"]
    notes = ["".join(text for text, _ in note) for note in server.notes]
    assert notes[0] == "db: 2 × 8 × 2 (processes × connections)"
    assert notes[1] == "open now, max_connections: 18 app (workerpools db), 9 web, 1 c0, 1 c1, 1 more"
    assert not bouncer.rows
    assert bouncer.notes[-1][0][0] == "max_client_conn is not known: its console refuses"
    told = document(found, workers)
    assert (told["version"], told["workers"][0]["open"], told["limits"][0]["others"]) == (1, {"db": 9}, 12)
    assert told["limits"][0]["largest_concurrency"] == 21
    assert told["limits"][1]["head_room"] is None
