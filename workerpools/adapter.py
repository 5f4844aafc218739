"""What an adapter of your own is made of: the protocol, what it is told when it opens, and the one for functions."""

from workerpools._core.adapter import Adapter, FunctionAdapter, Opening
from workerpools._core.execution import ExecutionPool

__all__ = ["Adapter", "ExecutionPool", "FunctionAdapter", "Opening"]
