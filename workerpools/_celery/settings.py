"""The flat settings: read from ``app.conf`` and from the environment, checked, never guessed.

Flat, because Celery hides secrets by the name of the key (``workerpools_database_url`` is hidden, a key inside a
dictionary is not).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from workerpools._stats.metrics import BOUNDS
from workerpools._text import meant, redact_url
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


def _seconds(value: object) -> float:
    return _number(value, "a number of seconds above 0", lambda number: number > 0)


def _not_negative(value: object) -> float:
    return _number(value, "a number of seconds, at least 0", lambda number: number >= 0)


def _at_least(least: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        wanted = f"a whole number of at least {least}"
        number = _number(value, wanted, lambda number: number >= least and number == int(number))
        return int(number)

    return parse


def _port(value: object) -> int:
    wanted = "a port from 0 to 65535"
    return int(_number(value, wanted, lambda number: 0 <= number <= 65535 and number == int(number)))


def _number(value: object, wanted: str, accept: Callable[[float], bool]) -> float:
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
        if number is None or number == float("inf") or not accept(number):
            raise ValueError(value)
    except ValueError:
        raise ValueError(wanted) from None
    return number


def _part(value: object) -> float:
    return _number(value, "a part above 0, and 1 at most", lambda number: 0 < number <= 1)


def _multiple(value: object) -> float:
    return _number(value, "a number above 1", lambda number: number > 1)


def _bound(value: object) -> float:
    # Waits are counted by these bounds: there is nothing to say about others.
    known = ", ".join(f"{bound:g}" for bound in BOUNDS)
    return _number(value, f"one of these numbers of seconds: {known}", lambda number: number in BOUNDS)


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
    Setting("close_timeout", _seconds, "How long closing at shutdown may take, in seconds (5)."),
    Setting("retry_budget", _at_least(0), "Tokens for replays in each process: 5 for one, 10 after a time-out (500)."),
    Setting("deadline_margin", _not_negative, "How long before a task's time limit its deadline is, in seconds (0.1)."),
    Setting("metrics_port", _port, "Where a worker serves its statistics to Prometheus (none); 0: any free port."),
    Setting("metrics_host", _text, "The address that it listens on for that (127.0.0.1)."),
    Setting("leak_after", _seconds, "How long a connection is in use before that is logged, in seconds (none: never)."),
    Setting("alert_interval", _not_negative, "How often alerts are looked for, in seconds; 0 for never (5)."),
    Setting("alert_utilisation", _part, "Which part of a process's connections may be in use (0.8)."),
    Setting("alert_sustained", _not_negative, "For how long more than that is in use, in seconds (60)."),
    Setting("alert_acquire_wait", _bound, "How long a caller may wait for a connection, in seconds (5)."),
    Setting("alert_creation_factor", _multiple, "How many times as many connections may be opened as before (5)."),
    Setting("alert_creation_floor", _at_least(1), "How many may be opened in a window in any case (20)."),
    Setting("alert_window", _seconds, "In which time opened connections are counted, in seconds (60)."),
    Setting("alert_publish_after", _not_negative, "How long a child may be unseen or stopped, in seconds (30)."),
    Setting("alert_clear_after", _not_negative, "For how long all is well before an alert ends, in seconds (60)."),
    Setting("http_base_url", _url, "The base URL of ``HTTPTask.http`` (none: tasks give full URLs)."),
    Setting("http_timeout", _seconds, "Read and write timeout, in seconds (10)."),
    Setting("http_connect_timeout", _seconds, "Connect timeout, in seconds (3)."),
    Setting("http_acquire_timeout", _seconds, "How long to wait for a free connection, in seconds (2)."),
    Setting("http_max_connections", _at_least(1), "Connections a process may open (10, or the concurrency)."),
    Setting("database_url", _database_url, "The SQLAlchemy URL of ``DatabaseTask.engine``; required by it."),
    Setting("database_connect_timeout", _seconds, "Connect timeout, in seconds (5)."),
    Setting("database_acquire_timeout", _seconds, "How long to wait for a free connection, in seconds (10)."),
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
    for key, shown in _configured_keys(conf):
        _known(key.removeprefix(PREFIX), shown)
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


def _known(name: str, shown: str) -> Setting:
    setting = _BY_NAME.get(name)
    if setting is None:
        known = ", ".join(PREFIX + name for name in _BY_NAME)
        nearest = meant(name, _BY_NAME)
        if nearest is None:
            raise ConfigurationError(f"unknown setting {shown}; the settings are: {known}")
        # Written as the mistake is: in the environment and under a namespace.
        right = shown[: len(shown) - len(name)] + (nearest.upper() if shown.isupper() else nearest)
        raise ConfigurationError(f"unknown setting {shown}; did you mean {right}? The settings are: {known}")
    return setting


def _parsed(setting: Setting, raw: object, shown: str) -> Any:
    try:
        return setting.parse(raw)
    except ValueError as wanted:
        raise ConfigurationError(f"{shown} is {_shown(setting, raw)}; wanted: {wanted}") from None


def _shown(setting: Setting, raw: object) -> str:
    if isinstance(raw, str):
        # A URL without a scheme cannot be told from a bare password.
        return "a text that is not shown here" if setting.parse in (_url, _database_url) else repr(redact_url(raw))
    return repr(raw) if isinstance(raw, (int, float)) else f"of the type {type(raw).__name__}"


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
