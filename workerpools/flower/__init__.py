"""Flower's Pools page and our series on its ``/metrics``: what every connection pool of every worker process is doing.

In ``flowerconfig.py``::

    import workerpools.flower

    workerpools.flower.install()

Importing this module does nothing, and does not import Flower.
"""

from __future__ import annotations

import importlib

from workerpools.errors import ConfigurationError

__all__ = ["install"]


def install() -> None:
    """Add the Pools page, its link in the navigation bar, readable numbers on the page of a worker, and our series.

    The series are those of :mod:`workerpools.prometheus`, at Flower's ``/metrics``.

    To be called in ``flowerconfig.py``, before Flower builds its application. May be called again. Where this version
    of Flower is not built as expected, the page is a plain one, and the log says so; it is never open to who may not
    open Flower's own pages.

    Raises:
        ConfigurationError: Flower is not installed.
    """
    try:
        importlib.import_module("flower")
    except ModuleNotFoundError as error:
        if error.name != "flower":
            raise
        raise ConfigurationError(
            "workerpools.flower.install() needs Flower, which the extra 'flower' brings: pip install flower"
        ) from None
    from workerpools.flower._setup import set_up

    set_up()
