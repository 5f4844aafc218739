"""The flat settings, read from ``app.conf`` and the environment and validated.

Flat, because Celery hides secrets by key name: ``workerpools_database_url`` is hidden, a key inside a dictionary is
not.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from celery.utils.serialization import strtobool

from workerpools._pools.found import adapters, not_installed
from workerpools._pools.settings import PREFIX, Setting, parse_number, port, text, time, time_or_none, timeout, whole
from workerpools._stats.metrics import BOUNDS
from workerpools._text import ALIKE, meant
from workerpools._values import COUNT, shown
from workerpools.errors import ConfigurationError

__all__ = ["SETTINGS", "all_settings", "read_setting", "read_settings"]

logger = logging.getLogger("workerpools")

#: The similarity to a known name, from 0 to 1, from which an unknown name counts as a typo although it may belong to
#: an adapter whose client is not installed.
_TYPO = 0.85


def _fraction(value: object) -> float:
    return parse_number(value, "a fraction above 0 and at most 1", 0, 1, above=True)


def _multiple(value: object) -> float:
    return parse_number(value, f"a number above 1 and at most {COUNT}", 1, COUNT, above=True)


def _bound(value: object) -> float:
    # Waits are counted in buckets with these bounds; others cannot be evaluated.
    known = ", ".join(f"{bound:g}" for bound in BOUNDS)
    wanted = f"one of these numbers of seconds: {known}"
    found = parse_number(value, wanted, 0, max(BOUNDS))
    if found not in BOUNDS:
        raise ValueError(wanted)
    return found


def _switch(value: object) -> bool:
    try:
        if isinstance(value, (bool, str)):
            return bool(strtobool(value))
    except TypeError:
        pass
    raise ValueError("True or False")


def _reasons(value: object) -> dict[str, str]:
    wanted = 'a dictionary of codes and reasons, or the same as JSON: {"WP203": "the catalogue is ours"}'
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, Mapping) or not all(isinstance(part, str) for pair in found.items() for part in pair):
        raise ValueError(wanted)
    return dict(found)


SETTINGS = (
    Setting("replay", _switch, "Whether any body runs again; False turns it off for the whole app (True)."),
    Setting("check_ignore", _reasons, "Codes that `celery pools check` leaves out, each with a reason (none)."),
    Setting("close_timeout", timeout, "Time limit for closing at shutdown, in seconds (5)."),
    Setting("retry_budget", whole(0), "Replay tokens per process: a replay takes 5, after a timeout 10 (500)."),
    Setting("deadline_margin", time_or_none, "Time between a task's deadline and its time limit, in seconds (0.1)."),
    Setting("metrics_port", port, "Port that serves a worker's statistics and health (none); 0 for any free port."),
    Setting("metrics_host", text, "Address that the metrics port listens on (127.0.0.1)."),
    Setting("leak_after", time, "Time in use after which a connection is logged, in seconds (none: never)."),
    Setting("alert_interval", time_or_none, "Time between alert checks, in seconds; 0 for none (5)."),
    Setting("alert_utilisation", _fraction, "Fraction of a process's connections that may be in use (0.8)."),
    Setting("alert_sustained", time_or_none, "How long utilisation may stay above that fraction, in seconds (60)."),
    Setting("alert_acquire_wait", _bound, "How long a caller may wait for a connection, in seconds (5)."),
    Setting("alert_creation_factor", _multiple, "Allowed increase in connections opened per window, as a factor (5)."),
    Setting("alert_creation_floor", whole(1), "Connections that may be opened per window in any case (20)."),
    Setting("alert_window", time, "Window in which opened connections are counted, in seconds (60)."),
    Setting("alert_publish_after", time_or_none, "How long a child may be stopped or not publish, in seconds (30)."),
    Setting(
        "alert_clear_after", time_or_none, "How long a condition must be over to clear its alert, in seconds (60)."
    ),
)

_BY_NAME = {setting.name: setting for setting in SETTINGS}


def all_settings() -> tuple[Setting, ...]:
    """Return every setting: our own and those of the adapters whose client is installed; imports the adapters."""
    return tuple(_all_by_name().values())


def _all_by_name() -> dict[str, Setting]:
    # Adapters may share settings, as those for httpx and httpx2 do.
    of_adapters = (setting for adapter in adapters() for setting in getattr(adapter, "settings", ()))
    return {setting.name: setting for setting in (*SETTINGS, *of_adapters)}


def read_settings(conf: Any, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the given settings, parsed, by name without the prefix.

    The environment overrides ``app.conf``, as with Celery's own ``CELERY_BROKER_URL``.

    Args:
        conf: ``app.conf``, with or without a namespace.
        environ: The environment; ``os.environ`` if None.

    Raises:
        ConfigurationError: A setting is unknown or malformed; the message names it.
    """
    environ = os.environ if environ is None else environ
    configured = [_known(key.removeprefix(PREFIX), written) for key, written in _configured_keys(conf)]
    settings: dict[str, Any] = {}
    for setting in configured:
        if setting is not None and (raw := conf.get(setting.key)) is not None:
            settings[setting.name] = _parsed(setting, raw, setting.key)
    for variable, raw in environ.items():
        if variable.upper().startswith(PREFIX.upper()):
            setting = _known(variable.lower().removeprefix(PREFIX), variable)
            if setting is not None:
                settings[setting.name] = _parsed(setting, raw, variable)
    return settings


def read_setting(conf: Any, name: str, default: Any) -> Any:
    """Return one setting, parsed, or ``default``; faster than :func:`read_settings`, without checking the others.

    Raises:
        ConfigurationError: The setting is malformed; the message names it.
    """
    key = PREFIX + name
    raw = os.environ.get(key.upper())
    if raw is not None:
        return _parsed(_BY_NAME[name], raw, key.upper())
    raw = conf.get(key)
    return default if raw is None else _parsed(_BY_NAME[name], raw, key)


def _known(name: str, written: str) -> Setting | None:
    # Most apps set no adapter's settings; spare them the import of its client.
    if name in _BY_NAME:
        return _BY_NAME[name]
    by_name = _all_by_name()
    if name in by_name:
        return by_name[name]
    missing = not_installed()
    nearest = meant(name, by_name, _TYPO if missing else ALIKE)
    if nearest is not None:
        # Suggested in the same style as the typo: upper case in the environment, prefixed under a namespace.
        right = written[: len(written) - len(name)] + (nearest.upper() if written.isupper() else nearest)
        raise ConfigurationError(
            f"unknown setting {written}; did you mean {right}? The settings are: {_listed(by_name)}"
        )
    if missing:
        # It may belong to an adapter whose client is installed elsewhere, as on the workers, but not here.
        logger.debug(
            "ignoring the setting %s: no installed adapter has it; not installed: %s", written, ", ".join(missing)
        )
        return None
    raise ConfigurationError(f"unknown setting {written}; the settings are: {_listed(by_name)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(PREFIX + name for name in names)


def _parsed(setting: Setting, raw: object, written: str) -> Any:
    try:
        return setting.parse(raw)
    except ValueError as wanted:
        raise ConfigurationError(f"{written} is {_shown(setting, raw)}; wanted: {wanted}") from None


def _shown(setting: Setting, raw: object) -> str:
    # A URL without a scheme looks like a bare password.
    return "a text that is not shown here" if isinstance(raw, str) and setting.secret else shown(raw)


def _configured_keys(conf: Any) -> Iterator[tuple[str, str]]:
    # The first lookup loads the configuration, and with it the namespace.
    conf.get(PREFIX)
    namespace = str(conf.prefix or "").lower()
    for key in conf:
        lowered = key.lower() if isinstance(key, str) else ""
        # Keys of the configured object carry the namespace; defaults and later changes do not.
        plain = lowered.removeprefix(namespace) if namespace else lowered
        # A configuration module may import the package of the same name.
        if plain == PREFIX[:-1] and isinstance(conf.get(key), Mapping):
            flat = ", ".join(setting.key for setting in all_settings())
            raise ConfigurationError(f"{key} is a dictionary, but the settings are flat; they are: {flat}")
        if not plain.startswith(PREFIX):
            continue
        if key != lowered and not (namespace and lowered.startswith(namespace)):
            # Celery looks up lower-case keys only, and would silently ignore it.
            right = lowered if not namespace else f"{conf.prefix}{key if conf.prefix.isupper() else lowered}"
            raise ConfigurationError(f"{key} in the app's configuration is not read: write {right}")
        yield plain, key
