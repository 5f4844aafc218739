"""A connection is cut after each byte of a small transaction: the rows and the outcome agree."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.support.cuts import Direction
from tests.support.shop import Shop
from tests.support.sockets import Ending
from workerpools import FailureKind, classify

ADD = text("insert into entries values (:number)")
DIRECTIONS: tuple[Direction, ...] = ("to_server", "to_client")
ENDINGS: tuple[Ending, ...] = ("fin", "rst")


class Cutting:
    """Tasks that write one row each, over a connection that is cut.

    Attributes:
        outcomes: How often each outcome was seen.
    """

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.outcomes: Counter[str] = Counter()
        self._runs: list[tuple[set[int], str]] = [({2}, "not cut")]
        shop.database.execute("create table entries (number int)")

        def write(task: Any, number: int) -> None:
            task.session.execute(ADD, {"number": number})

        self._tasks = {replay: shop.task(replay=replay)(write) for replay in (True, False)}

    def traffic(self) -> dict[Direction, int]:
        """Return how many bytes a task moves over an open connection."""
        proxy = self.shop.proxy
        self._tasks[True](0)
        before = proxy.bytes_to_server, proxy.bytes_to_client
        self._tasks[True](0)
        return {
            "to_server": proxy.bytes_to_server - before[0],
            "to_client": proxy.bytes_to_client - before[1],
        }

    def cut(self, after: int, direction: Direction, how: Ending, *, times: int, replay: bool) -> None:
        """Run a task over a connection that is cut after so many bytes.

        Args:
            after: The number of bytes.
            direction: The bytes that count.
            how: How the connection ends.
            times: How many connections are cut so: the task's, then that of the replay or of the question what became
                of a COMMIT.
            replay: Whether the body may run again.
        """
        with self.shop.engine.get().connect():
            pass
        number = len(self._runs)
        scope = "open" if times == 1 else "all"
        cut = self.shop.proxy.cut_after(after, direction, how, scope=scope, times=times)
        try:
            self._tasks[replay](number)
            outcome, allowed = "done", {1}
        except DBAPIError as error:
            failure = classify(error)
            kind = None if failure is None else failure.kind
            outcome = str(kind)
            allowed = {0, 1} if kind is FailureKind.INDETERMINATE else {0}
        finally:
            cut.cancel()
            self.shop.proxy.pass_through()
        self.outcomes[outcome] += 1
        self._runs.append((allowed, f"{after} bytes {direction}, {how}, {times} times, {replay=}: {outcome}"))

    def wrong(self) -> list[str]:
        """Return the runs whose rows do not agree with their outcomes."""
        rows = Counter(number for (number,) in self.shop.database.execute("select number from entries"))
        return [
            f"{run}, {rows[number]} rows"
            for number, (allowed, run) in enumerate(self._runs)
            if rows[number] not in allowed
        ]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("replay", [True, False], ids=["replayed", "not replayed"])
def test_a_cut_after_each_byte(shop: Shop, direction: Direction, replay: bool) -> None:
    cutting = Cutting(shop)
    most = cutting.traffic()[direction]
    assert most > 50
    for after in range(1, most + 1):
        cutting.cut(after, direction, "fin", times=1, replay=replay)
    assert cutting.wrong() == []
    # Without a replay the early cuts fail; with one every task succeeds.
    assert (cutting.outcomes["done"] == most) is replay


@pytest.mark.soak
def test_cuts_at_random(shop: Shop, request: pytest.FixtureRequest) -> None:
    """As many as ``--cuts`` says, of one connection or of the next ones as well."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    cutting = Cutting(shop)
    traffic = cutting.traffic()
    for _ in range(request.config.getoption("--cuts")):
        direction, how = chance.choice(DIRECTIONS), chance.choice(ENDINGS)
        after = chance.randint(1, 2 * traffic[direction])
        times, replay = chance.choice((1, 1, 2, 3)), chance.random() < 0.7
        cutting.cut(after, direction, how, times=times, replay=replay)
    print(f"seed {seed}: {dict(cutting.outcomes)}")
    assert cutting.wrong() == [], f"seed {seed}"
