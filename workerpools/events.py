"""Events and alerts, as passed to the listeners of ``WorkerPools.subscribe()`` and ``WorkerPools.on_alert()``."""

from workerpools._run.events import Event, EventKind, Listener
from workerpools._stats.alerts import AlertListener
from workerpools._stats.snapshot import Alert

__all__ = ["Alert", "AlertListener", "Event", "EventKind", "Listener"]
