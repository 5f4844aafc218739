"""A Pools page for Flower, and our series on its ``/metrics``: the connection pools of every worker process.

In ``flowerconfig.py``::

    import workerpools.flower

    workerpools.flower.install()

Importing this module does nothing, and does not import Flower.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from workerpools._values import seconds
from workerpools.errors import ConfigurationError

__all__ = ["install"]

logger = logging.getLogger("workerpools.flower")

#: The page's name in Flower's templates and ours.
_NAME = "workerpools"


def install(*, metrics_interval: float | None = None) -> None:
    """Add the Pools page, a link to it in the navigation bar, a tab on the worker page, and our series.

    The series are those of :mod:`workerpools.prometheus`, on Flower's ``/metrics``.

    Call it in ``flowerconfig.py``, before Flower builds its application. Idempotent. With an unsupported version of
    Flower the page falls back to plain HTML and logs a warning. It always requires the same login as Flower's own
    pages, and its JSON the same as Flower's own API.

    Args:
        metrics_interval: The minimum time between two queries to the workers that requests to ``/metrics`` without a
            password may cause, in seconds, for a Prometheus that has none; None for no such queries.

    Raises:
        ConfigurationError: Flower is not installed, or ``metrics_interval`` is out of range.
    """
    if metrics_interval is not None:
        seconds(metrics_interval, "workerpools.flower.install(): metrics_interval", above=True, optional=True)
    try:
        importlib.import_module("flower")
    except ModuleNotFoundError as error:
        if error.name != "flower":
            raise
        raise ConfigurationError(
            "workerpools.flower.install() needs Flower, which the extra 'flower' brings: pip install flower"
        ) from None
    _set_up(metrics_interval)


def _set_up(metrics_interval: float | None) -> None:
    # Imported late: only the extra 'flower' installs their dependencies.
    from tornado.web import RequestHandler, url

    from workerpools.flower._templates import PoolsLoader
    from workerpools.prometheus import register

    try:
        from flower import urls

        from workerpools.flower._page import STATIC, Assets, PoolsData, PoolsMetrics, PoolsView, Source
        from workerpools.flower._servers import Servers

        handlers: list[Any] = urls.handlers
        settings: dict[str, Any] = urls.settings
        directory = settings["template_path"]
        bases: tuple[Any, ...] = (PoolsView, PoolsData)
        if not all(issubclass(each, RequestHandler) for each in bases):
            raise TypeError("flower.views.BaseHandler is not a request handler")
    except (AttributeError, ImportError, KeyError, TypeError) as error:
        # No page is better than one without a login, or than a Flower that does not start.
        logger.error("unsupported version of Flower (%s: %s); there is no Pools page", type(error).__name__, error)
        return
    if any(getattr(handler, "name", None) == _NAME for handler in handlers):
        return
    loader, source = PoolsLoader(str(directory)), Source()
    if metrics_interval is not None:
        # Two queries may be missed.
        source.kept = max(source.kept, 3 * metrics_interval)
    register(source.snapshots)
    # Before the last handler, which matches everything. Objects, not tuples: Flower drops the name of a tuple under
    # --url_prefix.
    handlers[-1:-1] = [
        url(r"/pools", PoolsView, {"loader": loader}, name=_NAME),
        url(r"/api/pools", PoolsData, {"source": source, "servers": Servers()}, name=f"{_NAME}_data"),
        url(r"/pools/static/(.*)", Assets, {"path": str(STATIC)}, name=f"{_NAME}_static"),
    ]
    # Before Flower's own handler, which does not query the workers.
    handlers.insert(
        0,
        url(r"/metrics", PoolsMetrics, {"source": source, "interval": metrics_interval}, name=f"{_NAME}_metrics"),
    )
    if settings.setdefault("template_loader", loader) is not loader:
        logger.warning("Flower already has a template loader; its pages have no link to the Pools page")
        return
    for name in ("navbar.html", "worker.html"):
        try:
            loader.load(name)
        except Exception as error:
            # Flower could not load it without us either, and the Pools page does not need it.
            logger.warning("cannot load Flower's %s: %s: %s", name, type(error).__name__, error)
