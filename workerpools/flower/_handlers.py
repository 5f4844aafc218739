"""The Pools page, its document and its files, as handlers of Flower's application."""

from __future__ import annotations

import logging
from http.client import responses
from pathlib import Path
from typing import Any

from flower.views import BaseHandler
from flower.views.monitor import Metrics
from tornado import template, web

from workerpools._stats.metrics import DEFINITIONS
from workerpools.flower._source import Source
from workerpools.flower._templates import PREFIX

__all__ = ["STATIC", "Assets", "PoolsData", "PoolsMetrics", "PoolsView"]

logger = logging.getLogger("workerpools.flower")

#: Where the page's script and style are.
STATIC = Path(__file__).parent / "static"

_PAGE, _PLAIN = f"{PREFIX}pools.html", f"{PREFIX}plain.html"

#: What the page is recognised by, in whatever surroundings.
_MARK = b'id="workerpools"'


class PoolsView(BaseHandler):
    """The page: within Flower's own, or a plain one where that cannot be."""

    def initialize(self, loader: template.BaseLoader) -> None:
        self._loader = loader

    def get_template_path(self) -> str:
        # Tornado keeps one loader for each path: not Flower's.
        return str(STATIC.parent)

    def create_template_loader(self, template_path: str) -> template.BaseLoader:
        return self._loader

    @web.authenticated
    def get(self) -> None:
        flower: Any = self.application
        values = {
            "meanings": {each.name: each.meaning for each in DEFINITIONS},
            "refreshes": flower.options.auto_refresh,
            "worker_url": self._worker_url(),
        }
        try:
            self.render(_PAGE, **values)
        except web.HTTPError:
            raise
        except Exception as error:
            _tell_once(error)
            namespace = {**self.get_template_namespace(), **values}
            self.finish(self._loader.load(_PLAIN).generate(**namespace))

    def render_string(self, template_name: str, **kwargs: Any) -> bytes:
        text: bytes = super().render_string(template_name, **kwargs)
        if template_name == _PAGE and _MARK not in text:
            raise LookupError("base.html has no block named container")
        return text

    def _worker_url(self) -> str:
        # The address of the page of a worker named "0": the script puts the name in its place.
        try:
            return str(self.reverse_url("worker", "0"))
        except KeyError:
            return ""


_told: set[str] = set()


def _tell_once(error: Exception) -> None:
    text = f"{type(error).__name__}: {error}"
    if text not in _told:
        _told.add(text)
        logger.warning("Flower's templates are not as expected (%s): the Pools page is a plain one", text)


class PoolsData(BaseHandler):
    """The document that the page is made from, as JSON."""

    def initialize(self, source: Source) -> None:
        self._source = source

    async def get(self) -> None:
        # A script that is sent to a log-in page would read that. With a wrong password Flower raises this by itself.
        if not self.current_user:
            raise web.HTTPError(401)
        self.set_header("Cache-Control", "no-store")
        self.finish(await self._source.document(self.application))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        flower: Any = self.application
        # Flower's error pages are for people.
        if status_code == 401 and flower.options.basic_auth:
            self.set_header("WWW-Authenticate", 'Basic realm="flower"')
        self.finish({"error": responses.get(status_code, "Unknown")})


class PoolsMetrics(Metrics):
    """Flower's own series and ours, once the workers were asked. Open to everyone, as Flower's are."""

    def initialize(self, source: Source) -> None:
        self._source = source

    async def get(self) -> None:
        await self._source.refresh(self.application)
        await super().get()


class Assets(web.StaticFileHandler):
    """The page's script and style. Open to everyone, as Flower's own are."""

    def set_extra_headers(self, path: str) -> None:
        # They belong to the installed version: asked for each time, and sent again only if they have changed.
        self.set_header("Cache-Control", "no-cache")
        self.set_header("X-Content-Type-Options", "nosniff")
