"""What ends a run early."""

from __future__ import annotations

__all__ = ["DemoError"]


class DemoError(RuntimeError):
    """The run cannot go on; the message is for the person at the terminal."""
