"""What an adapter of your own is made of: the protocol, what it is told when it opens, and the one for functions."""

from workerpools._pools.adapter import Adapter, FunctionAdapter, Opening
from workerpools._pools.execution import ExecutionPool

__all__ = ["Adapter", "ExecutionPool", "FunctionAdapter", "Opening"]
