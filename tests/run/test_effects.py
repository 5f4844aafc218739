"""What a task says about itself decides, too: effects, idempotence, its policy, and the process's budget."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import DBAPIError

from tests.support.databases import Database
from tests.support.proxy import TcpProxy
from tests.support.shop import Shop, insert
from tests.support.upstream import EchoUpstream
from workerpools import ConfigurationError, FailureKind, NoAttemptError, RetryPolicy, classify
from workerpools.events import EventKind


@pytest.fixture
def shop(database: Database, proxy_to: Any) -> Iterator[Shop]:
    """An app whose database is reached through a proxy."""
    made = Shop(database, "psycopg2", proxy=proxy_to(database))
    yield made
    made.pools.close()


@pytest.fixture
def api(shop: Shop, echo: EchoUpstream, proxy_to: Any) -> TcpProxy:
    """A proxy before the shop's upstream, to which one connection is open and idle."""
    proxy: TcpProxy = proxy_to(echo)
    shop.add_api(f"http://127.0.0.1:{proxy.port}")
    shop.api.get().get("/echo/warm")
    return proxy


def notes(caught: pytest.ExceptionInfo[BaseException]) -> str:
    return " ".join(caught.value.__notes__)


@pytest.mark.parametrize("where", ["body", "thread", "task inside"])
@pytest.mark.parametrize("idempotent", [False, True])
def test_a_declared_effect_forbids_a_replay(shop: Shop, where: str, idempotent: bool) -> None:
    """Wherever the body said it; a task that is idempotent may run again all the same."""
    runs: list[tuple[str, ...]] = []

    @shop.task()
    def inside(self: Any) -> None:
        self.effect("sent the mail")

    @shop.task(idempotent=idempotent)
    def task(self: Any) -> None:
        insert(self.session, 1)
        if where == "body":
            self.effect("sent the mail")
        elif where == "thread":
            thread = threading.Thread(target=self.effect, args=("sent the mail",))
            thread.start()
            thread.join()
        else:
            inside.apply()
        runs.append(tuple(map(str, self.effects)))
        if len(runs) == 1:
            shop.proxy.close_all()
        insert(self.session, 2)

    if idempotent:
        task()
    else:
        with pytest.raises(DBAPIError) as caught:
            task()
        assert "Not run again: sent the mail had left already" in notes(caught)
    assert runs == [("sent the mail",)] * (2 if idempotent else 1)
    assert shop.rows() == ([1, 2] if idempotent else [])


def test_effects_belong_to_an_attempt(shop: Shop) -> None:
    """A new run begins without any; outside of one there are none, and none can be declared."""

    @shop.task()
    def task(self: Any) -> tuple[Any, ...]:
        before = self.effects
        self.effect("sent the mail")
        return before

    assert task() == task() == ()
    assert task.effects == ()
    with pytest.raises(NoAttemptError, match="'sent the mail'"):
        task.effect("sent the mail")


@pytest.mark.parametrize(
    ("options", "named"),
    [({"idempotent": "yes"}, "idempotent='yes'"), ({"replay": 3}, "replay=3"), ({"replay": None}, "replay=None")],
)
def test_a_wrong_option_is_refused_when_the_task_is_bound(shop: Shop, options: dict[str, Any], named: str) -> None:
    """By the task's name, before a worker starts."""
    with pytest.raises(ConfigurationError, match=f"shop.wrong: {named}"):
        # Not shared: Celery would bind it to every app of the process, those of other tests included.
        @shop.task(name="shop.wrong", shared=False, **options)
        def task(self: Any) -> None: ...

        task.bind(shop.app)


@pytest.mark.parametrize(
    ("replay", "runs", "refused"),
    [(True, 3, "called directly"), (False, 1, "replay=False"), (RetryPolicy(replays=5), 6, "called directly")],
)
def test_the_policy_bounds_the_runs(shop: Shop, replay: Any, runs: int, refused: str) -> None:
    """Every run loses its connection."""
    done: list[int] = []

    @shop.task(replay=replay)
    def task(self: Any) -> None:
        done.append(1)
        insert(self.session, 1)
        shop.proxy.close_all()
        insert(self.session, 2)

    with pytest.raises(DBAPIError) as caught:
        task()
    assert len(done) == runs
    assert refused in notes(caught)


def test_an_empty_budget_ends_the_replays(shop: Shop) -> None:
    """Of 12 tokens two replays can be paid; then the error comes out, and says so to the listeners."""
    shop.app.conf.workerpools_retry_budget = 12
    shop.pools.close()
    shop.pools.shared._budget = None
    done: list[int] = []

    @shop.task(replay=RetryPolicy(replays=100))
    def task(self: Any) -> None:
        done.append(1)
        insert(self.session, 1)
        shop.proxy.close_all()
        insert(self.session, 2)

    with pytest.raises(DBAPIError):
        task()
    assert len(done) == 3
    assert shop.pools.shared.budget.tokens == 2
    assert [event.kind for event in shop.events if event.kind.value.startswith(("attempt", "replay"))] == [
        EventKind.ATTEMPT_REPLAYED,
        EventKind.ATTEMPT_REPLAYED,
        EventKind.REPLAY_REFUSED,
    ]

    @shop.task()
    def fine(self: Any) -> None:
        insert(self.session, 7)

    fine()
    assert shop.pools.shared.budget.tokens == 3


@pytest.mark.parametrize("retried", ["GET", "POST with a key"])
def test_a_request_that_alone_was_lost_is_sent_again(
    shop: Shop, api: TcpProxy, echo: EchoUpstream, retried: str
) -> None:
    """The body runs once, with whatever it did before; the replay counts against the task's policy."""
    method, headers = ("GET", {}) if retried == "GET" else ("POST", {"Idempotency-Key": "1"})

    @shop.task()
    def task(self: Any) -> int:
        self.effect("sent the mail")
        insert(self.session, 1)
        return int(self.api.request(method, "/echo/1", headers=headers).status_code)

    api.cut_when(lambda chunk: method.encode() in chunk, deliver=True)
    assert task() == 200
    assert [request.method for request in echo.requests()[1:]] == [method, method]
    assert shop.rows() == [1]
    assert [event.kind for event in shop.events].count(EventKind.REQUEST_REPLAYED) == 1
    assert shop.replays() == 0


@pytest.mark.parametrize("reason", ["replay=False", "one-shot body", "replays used up"])
def test_a_request_is_not_sent_again(shop: Shop, api: TcpProxy, echo: EchoUpstream, reason: str) -> None:
    """Where the task turned it off, the body cannot be sent twice, or there were too many already."""
    options = {"replay=False": False, "replays used up": RetryPolicy(replays=0)}

    @shop.task(replay=options.get(reason, True), idempotent=True)
    def task(self: Any) -> None:
        content = iter([b"or", b"der"]) if reason == "one-shot body" else b"order"
        self.effect("sent the mail")
        self.api.put("/echo/1", content=content)

    cut = api.cut_when(lambda chunk: b"PUT" in chunk, deliver=False, times=None)
    with pytest.raises(httpx.TransportError) as caught:
        task()
    # A body that is made anew is no one-shot body: the task is idempotent, so the attempt is replayed.
    assert cut.fired == (3 if reason == "one-shot body" else 1)
    assert EventKind.REQUEST_REPLAYED not in [event.kind for event in shop.events]
    assert classify(caught.value) is not None


def test_a_lost_request_retires_its_siblings(shop: Shop, api: TcpProxy, echo: EchoUpstream) -> None:
    """Three connections are dead without a word, and the first request finds out: it is sent again on a fresh one,
    and so are those after it, without a failure; what is in flight meanwhile ends undisturbed."""
    client = shop.api.get()
    streams = [client.stream("GET", f"/echo/{number}") for number in range(3)]
    for response in [stream.__enter__() for stream in streams]:
        response.read()
    for stream in streams:
        stream.__exit__(None, None, None)
    accepted = api.accepted

    cut = api.cut_when(lambda chunk: b"GET" in chunk, scope="open", times=None)
    with client.stream("GET", "/echo/slow?delay=0.3&free=1") as slow:
        assert slow.status_code == 200
        assert [client.get(f"/echo/{number}").text for number in range(3)] == ["0", "1", "2"]
    assert cut.fired == 1
    assert api.accepted <= accepted + 2


def test_a_classified_error_names_its_resource(shop: Shop, api: TcpProxy, echo: EchoUpstream) -> None:
    """``classify`` in the body's own ``except`` tells more than the exception's class."""

    @shop.task()
    def task(self: Any) -> Any:
        try:
            self.api.post("/orders")
        except httpx.TransportError as error:
            return classify(error)

    api.cut_when(lambda chunk: b"POST" in chunk, deliver=True)
    failure = task()
    assert (failure.kind, failure.resource, failure.phase.value) == (FailureKind.INDETERMINATE, "api", "request")
    api.stop()
    api.close_all()
    failure = task()
    assert (failure.kind, failure.sent.value, failure.phase.value) == (FailureKind.UNAVAILABLE, "nothing", "connect")
