"""The connection budget: what workers may open against what their servers allow. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from workerpools._check.findings import Code, Finding
from workerpools._pools.limits import Limit
from workerpools._pools.shared import ExecutionPool

__all__ = ["CODES", "UNKNOWN", "Ceiling", "Row", "Workers", "budget", "findings"]

#: Returns the most connections of one process, by resource, execution pool, and tasks at a time in that process; 0 for
#: no limit, None for a resource that no server counts.
Ceiling = Callable[[str, str, int], "int | None"]


@dataclass(frozen=True)
class Workers:
    """Workers that are alike.

    Attributes:
        count: How many.
        kind: Their execution pool: ``prefork``, ``threads``, ….
        concurrency: The most tasks that each runs at a time.
        ceilings: The most connections of one process, by resource; 0 without a limit.
        open: The connections that all of them have open now, by resource; None for workers that do not run yet.
    """

    count: int
    kind: str
    concurrency: int
    ceilings: Mapping[str, int]
    open: Mapping[str, int] | None = None

    @property
    def processes(self) -> int:
        """The processes of all of them that run tasks."""
        return self.count * (self.concurrency if self.kind == "prefork" else 1)

    def share(self, resource: str, limit: Limit) -> int:
        """Return the most connections of a resource in one process that count against a limit; 0 for no limit."""
        if limit.capacity is None:
            return self.ceilings[resource]
        return limit.capacity(ExecutionPool(self.kind, 1 if self.kind == "prefork" else self.concurrency))

    def surely_open(self, resource: str, limit: Limit) -> int:
        """Return the connections of a resource that are open now and count against a limit, at the least."""
        opened = (self.open or {}).get(resource, 0)
        if not opened or limit.capacity is None:
            return opened
        elsewhere = self.ceilings[resource] - self.share(resource, limit)
        return max(0, opened - self.processes * elsewhere)


@dataclass(frozen=True)
class Row:
    """One limit, and what counts against it.

    Attributes:
        limit: The limit.
        parts: The processes of each worker and the most connections of one of them, by resource; 0 without a limit.
        sum: The most connections of all resources; None if one has no limit.
        others: The connections of others that are open now; None if unknown.
        head_room: What is left with every connection open; None if unknown.
        largest: The highest concurrency of these workers that fits; 0 if none does, None if unknown or any.
        largest_overlapping: The same with each worker twice, as while a rolling deploy replaces them.
    """

    limit: Limit
    parts: Mapping[str, Sequence[tuple[int, int]]]
    sum: int | None
    others: int | None
    head_room: int | None
    largest: int | None
    largest_overlapping: int | None

    @property
    def resources(self) -> Mapping[str, int | None]:
        """The most connections of the workers, by resource; None without a limit."""
        return {name: _sum(parts) for name, parts in self.parts.items()}

    @property
    def overlaps(self) -> bool:
        """Whether the old and the new workers of a rolling deploy fit together."""
        return self.head_room is None or self.sum is None or self.head_room >= self.sum


def budget(workers: Sequence[Workers], limits: Mapping[str, Sequence[Limit]], ceiling: Ceiling) -> list[Row]:
    """Return a row per limit, by server.

    Args:
        workers: The workers.
        limits: The limits that each resource counts against, by resource; all of those of ``workers``.
        ceiling: The declared ceilings, to try other concurrencies.
    """
    shared: dict[str, list[tuple[str, Limit]]] = {}
    for resource, found in limits.items():
        for each in found:
            shared.setdefault(each.key, []).append((resource, each))
    rows = [_row(workers, found, ceiling) for found in shared.values()]
    order = list(dict.fromkeys(row.limit.server for row in rows))
    return sorted(rows, key=lambda row: order.index(row.limit.server))


def _row(workers: Sequence[Workers], found: Sequence[tuple[str, Limit]], ceiling: Ceiling) -> Row:
    # Two roles may be kept from a different number of slots.
    limit = max((each for _, each in found), key=lambda each: each.reserved)
    parts = {
        name: [(each.processes, each.share(name, own)) for each in workers if name in each.ceilings]
        for name, own in found
    }
    total = _sum([part for of_resource in parts.values() for part in of_resource])
    others = None
    if limit.open is not None:
        running = [each for each in workers if each.open is not None]
        ours = (
            sum(each.surely_open(name, own) for each in running for name, own in found if name in each.ceilings)
            if running
            else sum(each.own for _, each in found)
        )
        others = max(0, limit.open - ours)
    if limit.most is None or total is None:
        return Row(limit, parts, total, others, None, None, None)
    left = limit.most - limit.reserved - (others or 0)
    largest = [_largest(workers, found, left // times, ceiling) for times in (1, 2)]
    return Row(limit, parts, total, others, left - total, *largest)


def _sum(parts: Sequence[tuple[int, int]]) -> int | None:
    """Return what processes may open together; None without a limit."""
    return None if any(most == 0 for _, most in parts) else sum(count * most for count, most in parts)


def _largest(workers: Sequence[Workers], found: Sequence[tuple[str, Limit]], left: int, ceiling: Ceiling) -> int | None:
    """Return the highest concurrency with which ``left`` connections suffice; None if every one does, or none is known.

    Workers that run one task at a time, ``solo``, stay as they are.
    """

    def needed(concurrency: int) -> int:
        total = 0
        for each in workers:
            size = 1 if each.kind == "solo" else concurrency
            processes = each.count * (size if each.kind == "prefork" else 1)
            tasks = 1 if each.kind == "prefork" else size
            for name, limit in found:
                if name not in each.ceilings:
                    continue
                if limit.capacity is not None:
                    most: int | None = limit.capacity(ExecutionPool(each.kind, tasks))
                else:
                    most = ceiling(name, each.kind, tasks)
                # Not declared here: what the worker says of itself holds at least for the concurrency that it has.
                total += processes * (each.ceilings[name] if most is None else most)
        return total

    if needed(1) > max(left, 0):
        return 0
    # A process needs one connection at least, unless its number does not depend on the concurrency.
    fits, above = 1, max(left, 0) + 1
    if needed(above) <= left:
        return None
    while above - fits > 1:
        middle = (fits + above) // 2
        if needed(middle) <= left:
            fits = middle
        else:
            above = middle
    return fits


OVER = Code(
    "WP401",
    "error",
    "The workers may open more connections than the server allows",
    "Under load the server refuses the connections above the limit, to other applications as well as to tasks: "
    "PostgreSQL with “too many clients already” or “remaining connection slots are reserved”.",
    "Lower the concurrency or the number of workers, give the engine a smaller pool_size and max_overflow=0, put "
    "PgBouncer in front of the server, or raise its limit.",
    "celery -A shop pools check --budget --workers 20 --concurrency 8    # 20 × 8 × 2 connections, of 100",
)
OVERLAP = Code(
    "WP402",
    "warning",
    "A rolling deploy has no room: old and new workers at once need more connections than there are",
    "While a deploy starts new workers before the old ones have ended, both hold connections.",
    "Lower the concurrency to the value for a deploy in the table, stop the old workers first, or raise the limit.",
    "celery -A shop pools check --budget --workers 4 --concurrency 8     # 64 connections of 97, and 64 more",
)
UNKNOWN = Code(
    "WP403",
    "hint",
    "The connection budget of a resource is not known",
    "Whether the workers fit is not known until the server refuses them.",
    "Let the role see the limit (a stats user of PgBouncer, say), give the pool an upper bound, or use --workers and "
    "--concurrency if no workers run.",
    "engine = SQLAlchemyEngine(url, max_overflow=-1)",
)
CODES = (OVER, OVERLAP, UNKNOWN)


def findings(rows: Iterable[Row], places: Mapping[str, str]) -> list[Finding]:
    """Return what is wrong with a budget.

    Args:
        rows: The budget.
        places: Where each resource is declared.
    """
    found = []
    for row in rows:
        limit = row.limit
        where = ", ".join(places.get(name, name) for name in row.resources)
        which = f"{limit.name} of {limit.server}"
        if limit.waits:
            # More clients than server connections are what PgBouncer is for.
            continue
        if limit.most is None:
            found.append(UNKNOWN.at(where, f"{which} is not known: {limit.unknown}"))
        elif row.sum is None:
            unbounded = ", ".join(name for name, most in row.resources.items() if most is None)
            found.append(UNKNOWN.at(where, f"nothing limits the connections of {unbounded} but {which}, {limit.most}"))
        elif row.head_room is not None and row.head_room < 0:
            found.append(OVER.at(where, f"{_arithmetic(row)}: {-row.head_room} too many; {_advice(row.largest)}"))
        elif not row.overlaps:
            found.append(
                OVERLAP.at(
                    where,
                    f"{_arithmetic(row)}: {row.head_room} are left, and a deploy needs {row.sum}; "
                    f"{_advice(row.largest_overlapping)}",
                )
            )
    return found


def _arithmetic(row: Row) -> str:
    limit = row.limit
    less = [f"{limit.reserved} reserved"] if limit.reserved else []
    less += [f"{row.others} in use by others"] if row.others else []
    but = f", less {' and '.join(less)}" if less else ""
    return f"the workers may open {row.sum} connections; {limit.name} of {limit.server} is {limit.most}{but}"


def _advice(largest: int | None) -> str:
    if largest is None:
        return "the concurrency does not matter"
    return f"the largest concurrency that fits is {largest}" if largest else "no concurrency fits so many workers"
