"""Resources without a declaration: created from an app's settings."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Generic, TypeVar, overload

from celery import Celery, current_app

from workerpools._celery.pools import WorkerPools
from workerpools._celery.settings import read_settings
from workerpools._pools.adapter import Adapter, Opening
from workerpools._pools.holder import Holder
from workerpools._pools.limits import Limit
from workerpools._pools.resource import Overridable, Resource
from workerpools._pools.shared import ExecutionPool
from workerpools._run.failure import Failure

__all__ = ["ConfiguredResource"]

T = TypeVar("T")


class ConfiguredResource(Overridable[T]):
    """One resource per app, created from the app's ``workerpools_…`` settings.

    On an instance, the class attribute returns the value for the task's app; on the class, it is a handle for the
    current app.

    Args:
        adapter: The adapter's class, or ``"module:class"`` to import it on first use.
    """

    def __init__(self, adapter: type[Adapter[T]] | str) -> None:
        super().__init__()
        self._adapter = adapter
        self._name = ""
        self._key = ""
        self._resources: weakref.WeakKeyDictionary[Any, Resource[T]] = weakref.WeakKeyDictionary()

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = self._name or name
        # The shared task object may keep the holder, which, unlike a value, belongs to no attempt.
        self._key = f"_workerpools_{self._name}"

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> ConfiguredResource[T]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...
    def __get__(self, instance: Any, owner: type | None = None) -> ConfiguredResource[T] | T:
        if instance is None:
            return self
        if self._overrides:
            return self._overrides[-1]
        holder: Holder[T] | None = instance.__dict__.get(self._key)
        if holder is None:
            holder = instance.__dict__[self._key] = self.resource_for(instance.app)._holder
        return holder.use()

    def resource_for(self, app: Celery, name: str = "") -> Resource[T]:
        """Return the app's resource; the first call declares it."""
        resource = self._resources.get(app)
        if resource is None:
            pools = WorkerPools.of(app)
            name = name or self._name
            if pools.has(name):
                # The name is taken by a declared resource: keep both, distinguishable.
                name += " (settings)"
            resource = pools.add(_FromSettings(app, self._adapter), name=name)
            self._resources[app] = resource
        return resource

    def get(self) -> T:
        """Return the current app's value (see :meth:`workerpools.Resource.get`)."""
        return self._overrides[-1] if self._overrides else self.resource_for(_app()).get()

    def close(self, timeout: float | None = None) -> None:
        """Close the current app's value (see :meth:`workerpools.Resource.close`)."""
        self.resource_for(_app()).close(timeout)

    def recycle(self) -> None:
        """Replace the current app's connections (see :meth:`workerpools.Resource.recycle`)."""
        self.resource_for(_app()).recycle()


def _app() -> Celery:
    return current_app._get_current_object()


_OF_THE_ADAPTER = frozenset(
    ("event_attributes", "kind", "leak_after", "libraries", "on_open", "server", "unseen_effects")
)


class _FromSettings(Adapter[T], Generic[T]):
    """An adapter created on first use, since settings may change until then."""

    def __init__(self, app: Celery, adapter: type[Adapter[T]] | str) -> None:
        # Weak: the app owns its pools, and they own this.
        self._app = weakref.ref(app)
        self._class = adapter
        self._settings: Mapping[str, Any] | None = None
        self._made: Adapter[T] | None = None

    def _adapter(self) -> Adapter[T]:
        app = self._app()
        settings = read_settings(app.conf) if app is not None else self._settings or {}
        made = self._made
        if made is None or settings != self._settings:
            self._made = made = _imported(self._class).from_settings(settings)
            self._settings = settings
        return made

    def __getattribute__(self, name: str) -> Any:
        if name in _OF_THE_ADAPTER:
            return getattr(self._known(), name)
        return super().__getattribute__(name)

    def _known(self) -> Any:
        """Return the adapter, or its class while there is none; what any has while it is not imported."""
        return self._made or (Adapter if isinstance(self._class, str) else self._class)

    def prepare(self) -> None:
        self._adapter().prepare()

    def open(self, opening: Opening) -> T:
        return self._adapter().open(opening)

    def close(self, value: T, timeout: float) -> None:
        if self._made is not None:
            self._made.close(value, timeout)

    def discard(self, value: T) -> None:
        if self._made is not None:
            self._made.discard(value)

    def recycle(self, value: T, since: float) -> bool:
        return self._made is not None and self._made.recycle(value, since)

    def attached(self, value: T) -> Iterable[tuple[str, object]]:
        return () if self._made is None else self._made.attached(value)

    def capacity(self, execution_pool: ExecutionPool) -> int | None:
        return self._adapter().capacity(execution_pool)

    def limits(self, value: T, resource: str) -> Sequence[Limit]:
        return () if self._made is None else self._made.limits(value, resource)

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Failure | None:
        return None if self._made is None else self._made.classify(error, earlier)

    def describe(self) -> str:
        return "from settings" if self._made is None else self._made.describe()


def _imported(adapter: type[Adapter[T]] | str) -> type[Adapter[T]]:
    if not isinstance(adapter, str):
        return adapter
    module, _, name = adapter.partition(":")
    found: type[Adapter[T]] = getattr(import_module(module), name)
    return found
