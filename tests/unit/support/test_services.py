"""The rule for missing services: skipped on a laptop, failed in CI."""

from __future__ import annotations

import pytest

from tests.support.services import require


def test_what_is_there_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition that holds neither skips nor fails."""
    monkeypatch.setenv("CI", "true")
    require(True, "nothing is missing")


def test_missing_skips_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CI the test is skipped and says why."""
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="install it"):
        require(None, "install it")


def test_missing_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CI set the same is a failure."""
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="required in CI: install it"):
        require(False, "install it")
