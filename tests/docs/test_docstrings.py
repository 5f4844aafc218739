"""The examples in docstrings, executed."""

from __future__ import annotations

import doctest

import pytest

import workerpools
from workerpools import Adapter, PooledTask, Resource, WorkerPools


@pytest.mark.parametrize("documented", [WorkerPools.add, PooledTask, Resource, Adapter], ids=lambda each: each.__name__)
def test_the_example_runs(documented: object) -> None:
    """And there is one."""
    # Of these alone: a class would bring its methods along.
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, globs=vars(workerpools).copy())
    assert example.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    said: list[str] = []
    runner.run(example, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
