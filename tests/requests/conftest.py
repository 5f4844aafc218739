"""A shop whose tasks have a session, ``self.api``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import requests

from tests.support.shop import Shop
from workerpools import Resource
from workerpools.requests import RequestsSession


class RequestsShop(Shop):
    """An app whose base has a ``requests.Session``."""

    def add_session(self, base_url: str = "", **options: Any) -> Resource[requests.Session]:
        """Give the base a session, ``self.api``; options are those of `RequestsSession`."""
        # However slow the machine is, an idle connection is used again.
        options = {"trust_env": False, "max_idle": None, **options}
        session = self.pools.add(RequestsSession(base_url, **options), name="api")
        self._extend(api=session)
        return session

    def run(self, body: Callable[[requests.Session], Any], **options: Any) -> Any:
        """Return what a task's body returns for its session."""

        @self.task(**options)
        def task(self: Any) -> Any:
            return body(self.api)

        return task.apply().get()


@pytest.fixture
def shop() -> Iterator[RequestsShop]:
    with closing(RequestsShop()) as made:
        yield made
