"""The rule for missing services: skipped on a laptop, failed in CI."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.services import require


def test_what_is_there_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition that holds neither skips nor fails."""
    monkeypatch.setenv("CI", "true")
    require(True, "nothing is missing")


# Both are caught in both tests: a skip that came in the place of a failure would end this test as skipped.
_OUTCOMES: tuple[Any, ...] = (pytest.skip.Exception, pytest.fail.Exception)


def test_missing_skips_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CI the test is skipped and says why."""
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(_OUTCOMES, match="install it") as outcome:
        require(None, "install it")
    assert outcome.type is pytest.skip.Exception


def test_missing_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CI set the same is a failure."""
    monkeypatch.setenv("CI", "1")
    with pytest.raises(_OUTCOMES, match="required in CI: install it") as outcome:
        require(False, "install it")
    assert outcome.type is pytest.fail.Exception
