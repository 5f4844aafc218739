"""The project's tasks."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from contextlib import closing
from typing import Any

from celery import shared_task
from celery.exceptions import Ignore
from django.db import IntegrityError, OperationalError, connection, connections, transaction

from tests.django.project.shop.models import Order
from tests.support.recorder import record
from workerpools import RetryPolicy
from workerpools.django import DjangoTask

logger = logging.getLogger(__name__)


class ShopTask(DjangoTask):
    """What the tasks have in common."""

    replay = RetryPolicy(max_retries=0)


def task(name: str, base: type[Any] = ShopTask, **options: Any) -> Any:
    return shared_task(base=base, bind=True, name=f"shop.{name}", **options)


def pid_of(alias: str = "default") -> int:
    """Return the process id of the session on the server."""
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


def die() -> None:
    """End the session in the middle of the body, as a server does that is shut down."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")


@task("place")
def place(self: Any, number: int, note: str = "") -> dict[str, Any]:
    """Write a row in a block of the body's own."""
    record("body", number)
    with transaction.atomic():
        Order.objects.create(number=number, note=note)
    return {"pid": os.getpid(), "session": pid_of(), "in_block": connection.in_atomic_block}


@task("plain", base=None)
def plain(self: Any) -> int:
    """A task of another base: Celery's own for Django."""
    Order.objects.count()
    return os.getpid()


@task("idle")
def idle(self: Any) -> None:
    """Do not use the database."""


@task("ends")
def ends(self: Any, number: int, how: str) -> Any:
    """Write, and end in each way."""
    record("body", number)
    Order.objects.create(number=number)
    transaction.on_commit(lambda: record("hook", number))
    if how == "raise":
        raise ValueError(number)
    if how == "ignore":
        raise Ignore
    if how == "set_rollback":
        transaction.set_rollback(True)
    if how == "caught":
        with_error(number)
    if how == "savepoint":
        try:
            with transaction.atomic():
                transaction.on_commit(lambda: record("hook of the savepoint", number))
                note.delay_on_commit(number, "savepoint")
                Order.objects.create(number=number)
                raise ValueError(number)
        except ValueError:
            return "returned"
    if how == "close":
        connection.close()
    return "returned"


def with_error(number: int) -> None:
    """Catch an error that aborts the transaction."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO shop_order (id, number, note) VALUES (NULL, %s, '')", [number])
    except IntegrityError:
        pass


@task("note")
def note(self: Any, number: int, word: str) -> int:
    """Say how many rows of a number there are: those of the sender are committed, or not there."""
    found = Order.objects.filter(number=number).count()
    record("note", [number, word, found])
    return found


@task("lost")
def lost(self: Any, number: int, before: str = "", **options: Any) -> list[str]:
    """Lose the connection in the first run, after something."""
    logger.warning("lost, %s, %s", before, number)
    runs = number_of_runs(number)
    Order.objects.create(number=number)
    transaction.on_commit(lambda: record("hook", number))
    note.delay_on_commit(number, "once")
    if before == "raw commit" and runs == 1:
        with connection.cursor() as cursor:
            cursor.execute("/* here */ COMMIT")
    if before == "past Django" and runs == 1:
        connection.connection.commit()
    if before == "two statements" and runs == 1:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1; COMMIT; BEGIN")
    if before == "other alias" and runs == 1:
        Order.objects.using("other").create(number=number, note="other")
    if before == "message" and runs == 1:
        note.delay(number, "at once")
    if before == "durable":
        with transaction.atomic(durable=True):
            pass
    if runs == 1:
        if before == "cursor":
            list(reversed_rows())
        else:
            die()
    return [str(effect) for effect in self.effects]


def reversed_rows() -> Any:
    """Lose the connection between the rows of a server-side cursor."""
    rows = Order.objects.order_by("-id").iterator(chunk_size=1)
    first = next(rows)
    # Past Django: it is none of the body's statements.
    with closing(connection.Database.connect(**connection.get_connection_params())) as other:
        other.cursor().execute("SELECT pg_terminate_backend(%s, 5000)", [pid_by_driver()])
    yield first
    yield from rows


def pid_by_driver() -> int:
    """Return the process id of the session without asking it."""
    return int(connection.connection.info.backend_pid)


_runs: dict[int, int] = {}


def number_of_runs(number: int) -> int:
    """Count the runs of a task in this process."""
    record("body", number)
    _runs[number] = _runs.get(number, 0) + 1
    return _runs[number]


@task("both", atomic=("default", "other"))
def both(self: Any, number: int, how: str = "") -> None:
    """Write on two aliases."""
    runs = number_of_runs(number)
    Order.objects.create(number=number)
    Order.objects.using("other").create(number=number, note="other")
    if how == "raise":
        raise ValueError(number)
    if how == "lost" and runs == 1:
        die()


@task("by_itself", atomic=())
def by_itself(self: Any, number: int, lose: bool = False) -> None:
    """Commit as the body likes."""
    record("body", number)
    with transaction.atomic(durable=True):
        Order.objects.create(number=number)
        note.delay_on_commit(number, "by itself")
    if lose:
        die()


@task("locked")
def locked(self: Any, number: int) -> int:
    """Find a row locked in the first run: the server rolls the transaction back."""
    runs = number_of_runs(number)
    with closing(connection.Database.connect(**connection.get_connection_params())) as other:
        if runs == 1:
            other.cursor().execute("SELECT id FROM shop_order WHERE number = %s FOR UPDATE", [number])
        return runs * len(Order.objects.select_for_update(nowait=True).filter(number=number))


@task("sleeps", soft_time_limit=2, time_limit=20)
def sleeps(self: Any, how: str = "") -> None:
    """Wait for the server for longer than the task may take."""
    if how == "own":
        try:
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute("SET LOCAL statement_timeout = 100")
                cursor.execute("SELECT pg_sleep(30)")
        except OperationalError as error:
            record("own", str(error))
        return
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(30)")


@task("forks")
def forks(self: Any, number: int) -> list[int]:
    """Fork in the middle of the body, with a transaction open; the child uses the database."""
    Order.objects.create(number=number)
    context = multiprocessing.get_context("fork")
    mine = pid_of()
    reading, writing = context.Pipe(duplex=False)
    current = multiprocessing.current_process()
    daemon, current._config["daemon"] = current._config.get("daemon"), False  # type: ignore[attr-defined]
    try:
        child = context.Process(target=in_child, args=(writing,))
        child.start()
        writing.close()
        theirs = reading.recv()
        child.join(30)
    finally:
        current._config["daemon"] = daemon  # type: ignore[attr-defined]
    assert child.exitcode == 0
    # The parent's transaction goes on.
    return [mine, theirs, pid_of(), Order.objects.filter(number=number).count()]


def in_child(writing: Any) -> None:
    """Answer with the session of the child's own."""
    writing.send(pid_of())
    connections.close_all()


@task("hold")
def hold(self: Any, seconds: float) -> None:
    """Have the connection for a while."""
    pid_of()
    record("hold")
    time.sleep(seconds)
