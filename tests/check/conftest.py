"""What the checks look at is of the test alone."""

from __future__ import annotations

import pytest
from celery import _state


@pytest.fixture(autouse=True)
def of_no_other_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app has the tasks of all others, unless these say `shared=False`: those of other tests, too."""
    celerys = {each for each in _state._on_app_finalizers if each.__module__ == "celery.app.builtins"}
    monkeypatch.setattr(_state, "_on_app_finalizers", celerys)
