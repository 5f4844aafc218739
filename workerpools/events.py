"""What ``WorkerPools.subscribe()`` tells a listener."""

from workerpools._core.events import Event, EventKind, Listener

__all__ = ["Event", "EventKind", "Listener"]
