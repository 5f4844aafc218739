"""What ``WorkerPools.subscribe()`` and ``WorkerPools.on_alert()`` tell a listener."""

from workerpools._core.alerts import Alert, AlertListener
from workerpools._core.events import Event, EventKind, Listener

__all__ = ["Alert", "AlertListener", "Event", "EventKind", "Listener"]
