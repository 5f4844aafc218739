"""The errors that users catch."""

from __future__ import annotations

import pickle

import pytest

import workerpools
from workerpools import errors

ALL = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("error", ALL)
def test_errors_survive_pickling(error: type[Exception]) -> None:
    """Celery pickles exceptions: type, arguments and text come back."""
    copy = pickle.loads(pickle.dumps(error("what", 1)))
    assert type(copy) is error
    assert copy.args == ("what", 1)


@pytest.mark.parametrize("error", ALL)
def test_errors_join_the_tree(error: type[Exception]) -> None:
    """Every error is a WorkerPoolsError, exported at the root, and none is swallowed by ``__getattr__``."""
    assert issubclass(error, errors.WorkerPoolsError)
    assert not issubclass(error, AttributeError)
    assert getattr(workerpools, error.__name__) is error


def test_errors_are_caught_by_the_builtin_they_refine() -> None:
    """``except ValueError`` and ``except TimeoutError`` keep working."""
    assert issubclass(errors.ConfigurationError, ValueError)
    assert issubclass(errors.NoAttemptError, RuntimeError)
    assert issubclass(errors.OpenTimeoutError, TimeoutError)
