"""The project's own tests, as Django runs them: eager tasks, views, other databases, forks."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
from celery import current_app
from django.db import connection, connections, transaction
from django.test import TestCase, TransactionTestCase

from tests.django.project.shop.models import Order
from tests.django.project.shop.tasks import ShopTask, both, ends, note, place
from workerpools.django import DjangoTask
from workerpools.errors import ConfigurationError


class InATestCase(TestCase):
    """Each test is a transaction that is rolled back: a run in it is a savepoint."""

    databases = {"default"}

    def test_a_run(self) -> None:
        """Its rows are seen, and its hooks wait for the transaction around it."""
        hook = mock.Mock()
        patched = mock.patch("tests.django.project.shop.tasks.record", hook)
        with self.captureOnCommitCallbacks() as waiting, patched:
            assert ends.apply((1, "return")).get() == "returned"
        assert Order.objects.filter(number=1).count() == 1
        assert len(waiting) == 1

    def test_a_failure(self) -> None:
        """It undoes its own work, and no more."""
        Order.objects.create(number=2, note="before")
        assert isinstance(ends.apply((2, "raise")).result, ValueError)
        assert [order.note for order in Order.objects.filter(number=2)] == ["before"]

    def test_a_message(self) -> None:
        """In a view it waits for the view's transaction."""
        with mock.patch.object(type(current_app.tasks[note.name]), "apply_async") as sent:
            with self.captureOnCommitCallbacks(execute=True):
                with transaction.atomic():
                    result = note.delay_on_commit(3, "view")
                sent.assert_not_called()
            sent.assert_called_once_with((3, "view"), {}, task_id=result.id)
            with pytest.raises(TypeError):
                note.delay_on_commit()


class Committed(TransactionTestCase):
    """Transactions are real."""

    databases = {"default", "other", "sqlite"}

    def test_a_direct_call(self) -> None:
        """It is a run: committed, and the thread's connection stays Django's."""
        self._session()
        before = connection.connection
        assert place(4)["in_block"]
        assert connection.connection is before
        assert not connection.in_atomic_block
        with pytest.raises(ValueError):
            both(5, "raise")
        assert [Order.objects.using(alias).filter(number=5).count() for alias in ("default", "other")] == [0, 0]

    def test_nested(self) -> None:
        """A task that a body runs is a savepoint of the body's transaction; a call is the body's own."""

        @current_app.task(base=ShopTask, bind=True, name="shop.outer")
        def outer(self: Any) -> None:
            assert isinstance(ends.apply((6, "raise")).result, ValueError)
            ends.apply((7, "return"))
            place(8)
            raise KeyError

        with pytest.raises(KeyError):
            outer()
        assert Order.objects.count() == 0

    def test_another_database(self) -> None:
        """Its statements are effects, because nothing is known of them."""

        @current_app.task(base=ShopTask, bind=True, name="shop.sqlite", atomic=("sqlite",))
        def on_sqlite(self: Any, fail: bool) -> list[str]:
            with connections["sqlite"].cursor() as cursor:
                cursor.execute("CREATE TABLE seen (number int)" if not fail else "INSERT INTO seen VALUES (1)")
            if fail:
                raise ValueError
            return [str(effect) for effect in self.effects]

        assert on_sqlite(False) == ["a statement on 'sqlite' (sqlite)"]
        with pytest.raises(ValueError):
            on_sqlite(True)
        with connections["sqlite"].cursor() as cursor:
            assert cursor.execute("SELECT count(*) FROM seen").fetchone() == (0,)

    def test_a_thread_of_the_body(self) -> None:
        """It has a connection of its own, which commits by itself: an effect."""
        from concurrent.futures import ThreadPoolExecutor

        def write() -> None:
            Order.objects.create(number=9)
            connection.close()

        @current_app.task(base=ShopTask, bind=True, name="shop.threads")
        def threads(self: Any) -> list[str]:
            with ThreadPoolExecutor(1) as executor:
                executor.submit(write).result()
            return [str(effect) for effect in self.effects]

        assert set(threads()) == {"a statement on 'default' outside of the run's transaction"}

    def test_a_fork(self) -> None:
        """A child neither uses nor closes what its parent has open, also in the middle of a transaction."""
        Order.objects.create(number=10)
        with transaction.atomic():
            session = self._session()
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    assert connection.connection is None
                    assert not connection.in_atomic_block
                    os.write(writing, str(self._session()).encode())
                    connections.close_all()
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            os.close(writing)
            theirs = os.read(reading, 100)
            os.close(reading)
            assert theirs
            assert int(theirs) != session == self._session()
            assert Order.objects.count() == 1

    def _session(self) -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return int(cursor.fetchone()[0])

    def test_mistakes(self) -> None:
        """Each is refused when the task is made."""

        async def coroutine(self: Any) -> None: ...

        def body(self: Any) -> None: ...

        for made, options, said in (
            (coroutine, {}, "async def"),
            (body, {"atomic": "default"}, "wanted: a sequence of aliases"),
            (body, {"atomic": ("defualt",)}, r"no defualt \(did you mean default\?\)"),
            (body, {"atomic": ("manual",)}, "AUTOCOMMIT"),
        ):
            with pytest.raises(ConfigurationError, match=said):
                current_app.task(base=DjangoTask, bind=True, name=f"shop.{said}", **options)(made).name  # noqa: B018


__all__ = ["Committed", "InATestCase"]
