"""The flat settings: read from ``app.conf`` and from the environment, checked, never guessed.

Flat, because Celery hides secrets by the name of the key (``workerpools_database_url`` is hidden, a key inside a
dictionary is not).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from workerpools._stats.metrics import BOUNDS
from workerpools._text import meant
from workerpools._values import COUNT, WEEK, YEAR, number, shown, wanted_seconds, wanted_whole
from workerpools.errors import ConfigurationError

__all__ = ["SETTINGS", "Setting", "read_setting", "read_settings"]

PREFIX = "workerpools_"


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not empty")
    return value.strip()


def _url(value: object, example: str = "https://api.example.com") -> str:
    text = _text(value)
    if "://" not in text:
        raise ValueError(f"a URL with a scheme, like {example}")
    return text


def _database_url(value: object) -> str:
    return _url(value, "postgresql+psycopg2://app@localhost/shop")


_URLS = (_url, _database_url)


def _seconds(most: float, above: bool) -> Callable[[object], float]:
    wanted = wanted_seconds(most, above)
    return lambda value: _number(value, wanted, 0, most, above=above)


#: What is waited for, at most a week; other times, at most a year.
_timeout = _seconds(WEEK, above=True)
_time = _seconds(YEAR, above=True)
_time_or_none = _seconds(YEAR, above=False)


def _at_least(least: int, most: int = COUNT, wanted: str = "") -> Callable[[object], int]:
    wanted = wanted or wanted_whole(least, most)

    def parse(value: object) -> int:
        found = _number(value, wanted, least, most)
        if not found.is_integer():
            raise ValueError(wanted)
        return int(found)

    return parse


_port = _at_least(0, 65535, "a port from 0 to 65535")


def _number(value: object, wanted: str, least: float, most: float, *, above: bool = False) -> float:
    """Return ``value`` as a float; variables of the environment are text."""
    try:
        found = number(float(value) if isinstance(value, str) else value, least, most, above=above)
    except ValueError:
        found = None
    if found is None:
        raise ValueError(wanted)
    return found


def _part(value: object) -> float:
    return _number(value, "a part above 0, and 1 at most", 0, 1, above=True)


def _multiple(value: object) -> float:
    return _number(value, f"a number above 1, and at most {COUNT}", 1, COUNT, above=True)


def _bound(value: object) -> float:
    # Waits are counted by these bounds: there is nothing to say about others.
    known = ", ".join(f"{bound:g}" for bound in BOUNDS)
    wanted = f"one of these numbers of seconds: {known}"
    found = _number(value, wanted, 0, max(BOUNDS))
    if found not in BOUNDS:
        raise ValueError(wanted)
    return found


class Setting(NamedTuple):
    """One setting.

    Attributes:
        name: The name after the prefix ``workerpools_``.
        parse: Turns the raw value into the setting's own; raises ValueError with what was wanted instead.
        meaning: One line for the documentation.
    """

    name: str
    parse: Callable[[object], Any]
    meaning: str

    @property
    def key(self) -> str:
        """The key in ``app.conf``."""
        return PREFIX + self.name

    @property
    def variable(self) -> str:
        """The environment variable."""
        return self.key.upper()


SETTINGS = (
    Setting("close_timeout", _timeout, "How long closing at shutdown may take, in seconds (5)."),
    Setting("retry_budget", _at_least(0), "Tokens for replays in each process: 5 for one, 10 after a time-out (500)."),
    Setting("deadline_margin", _time_or_none, "How long before a task's time limit its deadline is, in seconds (0.1)."),
    Setting("metrics_port", _port, "Where a worker serves its statistics to Prometheus (none); 0: any free port."),
    Setting("metrics_host", _text, "The address that it listens on for that (127.0.0.1)."),
    Setting("leak_after", _time, "How long a connection is in use before that is logged, in seconds (none: never)."),
    Setting("alert_interval", _time_or_none, "How often alerts are looked for, in seconds; 0 for never (5)."),
    Setting("alert_utilisation", _part, "Which part of a process's connections may be in use (0.8)."),
    Setting("alert_sustained", _time_or_none, "For how long more than that is in use, in seconds (60)."),
    Setting("alert_acquire_wait", _bound, "How long a caller may wait for a connection, in seconds (5)."),
    Setting("alert_creation_factor", _multiple, "How many times as many connections may be opened as before (5)."),
    Setting("alert_creation_floor", _at_least(1), "How many may be opened in a window in any case (20)."),
    Setting("alert_window", _time, "In which time opened connections are counted, in seconds (60)."),
    Setting("alert_publish_after", _time_or_none, "How long a child may be unseen or stopped, in seconds (30)."),
    Setting("alert_clear_after", _time_or_none, "For how long all is well before an alert ends, in seconds (60)."),
    Setting("http_base_url", _url, "The base URL of ``HTTPTask.http`` (none: tasks give full URLs)."),
    Setting("http_timeout", _timeout, "Read and write timeout, in seconds (10)."),
    Setting("http_connect_timeout", _timeout, "Connect timeout, in seconds (3)."),
    Setting("http_acquire_timeout", _timeout, "How long to wait for a free connection, in seconds (2)."),
    Setting("http_max_connections", _at_least(1), "Connections a process may open (10, or the concurrency)."),
    Setting("database_url", _database_url, "The SQLAlchemy URL of ``DatabaseTask.engine``; required by it."),
    Setting("database_connect_timeout", _timeout, "Connect timeout, in seconds (5)."),
    Setting("database_acquire_timeout", _timeout, "How long to wait for a free connection, in seconds (10)."),
    Setting("database_pool_size", _at_least(1), "Connections a process keeps (1, or the concurrency)."),
    Setting("database_max_overflow", _at_least(0), "Connections a process may open beyond ``pool_size`` (1)."),
)

_BY_NAME = {setting.name: setting for setting in SETTINGS}


def read_settings(conf: Any, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the settings that are set, by name without the prefix, parsed.

    The environment wins over ``app.conf``, as it does for Celery's own ``CELERY_BROKER_URL``.

    Args:
        conf: ``app.conf``, with or without a namespace.
        environ: The environment; ``os.environ`` if None.

    Raises:
        ConfigurationError: A setting is unknown or malformed; the message names it.
    """
    environ = os.environ if environ is None else environ
    for key, written in _configured_keys(conf):
        _known(key.removeprefix(PREFIX), written)
    settings: dict[str, Any] = {}
    for setting in SETTINGS:
        if (raw := conf.get(setting.key)) is not None:
            settings[setting.name] = _parsed(setting, raw, setting.key)
    for variable, raw in environ.items():
        if variable.upper().startswith(PREFIX.upper()):
            setting = _known(variable.lower().removeprefix(PREFIX), variable)
            settings[setting.name] = _parsed(setting, raw, variable)
    return settings


def read_setting(conf: Any, name: str, default: Any) -> Any:
    """Return one setting, parsed, or ``default``; quicker than :func:`read_settings`, and no check of the others.

    Raises:
        ConfigurationError: It is malformed; the message names it.
    """
    # Put together here: a task with a time limit reads one.
    key = PREFIX + name
    raw = os.environ.get(key.upper())
    if raw is not None:
        return _parsed(_BY_NAME[name], raw, key.upper())
    raw = conf.get(key)
    return default if raw is None else _parsed(_BY_NAME[name], raw, key)


def _known(name: str, written: str) -> Setting:
    setting = _BY_NAME.get(name)
    if setting is None:
        known = ", ".join(PREFIX + name for name in _BY_NAME)
        nearest = meant(name, _BY_NAME)
        if nearest is None:
            raise ConfigurationError(f"unknown setting {written}; the settings are: {known}")
        # Written as the mistake is: in the environment and under a namespace.
        right = written[: len(written) - len(name)] + (nearest.upper() if written.isupper() else nearest)
        raise ConfigurationError(f"unknown setting {written}; did you mean {right}? The settings are: {known}")
    return setting


def _parsed(setting: Setting, raw: object, written: str) -> Any:
    try:
        return setting.parse(raw)
    except ValueError as wanted:
        raise ConfigurationError(f"{written} is {_shown(setting, raw)}; wanted: {wanted}") from None


def _shown(setting: Setting, raw: object) -> str:
    # A URL without a scheme cannot be told from a bare password.
    return "a text that is not shown here" if isinstance(raw, str) and setting.parse in _URLS else shown(raw)


def _configured_keys(conf: Any) -> Iterator[tuple[str, str]]:
    # The namespace is known once the configuration is loaded, which the first look at a key does.
    conf.get(PREFIX)
    namespace = str(conf.prefix or "").lower()
    for key in conf:
        lowered = key.lower() if isinstance(key, str) else ""
        # Under a namespace the configured object's keys carry it; defaults and later changes do not.
        plain = lowered.removeprefix(namespace) if namespace else lowered
        # A configuration module may import the package of that name.
        if plain == PREFIX[:-1] and isinstance(conf.get(key), Mapping):
            flat = ", ".join(f"{PREFIX}{name}" for name in _BY_NAME)
            raise ConfigurationError(f"{key} is a dictionary, and the settings are flat; they are: {flat}")
        if not plain.startswith(PREFIX):
            continue
        if key != lowered and not (namespace and lowered.startswith(namespace)):
            # Celery looks up the lower case alone, and would ignore it in silence.
            right = lowered if not namespace else f"{conf.prefix}{key if conf.prefix.isupper() else lowered}"
            raise ConfigurationError(f"{key} in the app's configuration is not read: write {right}")
        yield plain, key
