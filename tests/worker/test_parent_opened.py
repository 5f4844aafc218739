"""What the main process opened before it forked its children stays its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.stand import PATIENCE, Stand, sockets_to
from tests.support.tls import TlsProxy

pytestmark = pytest.mark.worker

CHILDREN = 3


@pytest.fixture(params=["plain", "tls"])
def ports(request: pytest.FixtureRequest, stand: Stand) -> Iterator[dict[str, str]]:
    """The application's environment: over TCP, or over TLS."""
    if request.param == "plain":
        yield {}
        return
    with ExitStack() as opened:
        api = opened.enter_context(TlsProxy(stand.echo.host, stand.echo.port))
        db = opened.enter_context(TlsProxy(stand.database.host, stand.database.port, postgres=True))
        url = f"{stand.database.through(db).url()}?sslmode=verify-full&sslrootcert={db.ca_file}"
        yield {
            "SHOP_API": f"https://localhost:{api.port}",
            "SHOP_AUTHORITY": str(api.ca_file),
            "SHOP_DATABASE": url,
        }


@pytest.mark.parametrize("when", ["import", "worker_init"])
def test_children_have_their_own_and_the_parent_goes_on(stand: Stand, ports: dict[str, str], when: str) -> None:
    """The parent used the client and the engine before the fork, and is in the middle of a response and of a
    transaction: no child shares a socket with it, no task gets another one's body, and the parent reads its response
    to the end and commits."""
    with stand.worker(concurrency=CHILDREN, env={**ports, "SHOP_PARENT": when}) as worker:
        children = worker.children()
        answers = stand.reach_all(children)
        sent = [stand.send("visit", f"{when}-{number}") for number in range(100)]
        (reply,) = stand.client.control.broadcast("parent_goes_on", reply=True, timeout=PATIENCE, limit=1)
        answers += [result.get(timeout=PATIENCE) for result in sent]
        assert all(answer["right"] for answer in answers)
        assert {answer["pid"] for answer in answers} == set(children)
        assert len({answer["backend"] for answer in answers}) == CHILDREN

        (parent,) = reply.values()
        assert parent == {"pid": worker.pid, "rows": 2, "chunks": 500, "right": True}
        environment = stand.environment(ports)
        for name in ("SHOP_API", "SHOP_DATABASE"):
            port = int(environment[name].rpartition(":")[2].split("/")[0])
            held = [sockets_to(port, pid) for pid in (worker.pid, *children)]
            assert all(held)
            assert sum(map(len, held)) == len(set().union(*held))
        assert stand.orders(1) == []
        assert worker.stop() == 0
        assert stand.entries("parent committed")
    assert stand.orders(1) == [0, 0]
    stand.wait_for_no_connection()
    assert stand.disorderly_ends() == 0
