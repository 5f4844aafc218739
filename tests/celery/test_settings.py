"""Settings come from the app and the environment, and mistakes are named."""

from __future__ import annotations

from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from workerpools import ConfigurationError, DatabaseTask, HTTPTask
from workerpools._celery.settings import all_settings, read_settings
from workerpools._pools.found import not_installed
from workerpools._values import shown
from workerpools.adapter import Setting

#: Otherwise a name may belong to the client that is missing: httpx2 needs Python 3.11.
COMPLETE = pytest.mark.skipif(bool(not_installed()), reason="not every client is installed")


def conf(**settings: Any) -> Any:
    app = Celery("settings", set_as_current=False)
    app.conf.update(settings)
    return app.conf


def test_settings_are_read_and_parsed() -> None:
    """Numbers may be written as text."""
    settings = read_settings(conf(workerpools_http_timeout="2.5", workerpools_database_pool_size=3), {})
    assert settings == {"http_timeout": 2.5, "database_pool_size": 3}


def test_the_environment_wins() -> None:
    """As it does for Celery's own URLs."""
    settings = read_settings(conf(workerpools_http_timeout=1), {"WORKERPOOLS_HTTP_TIMEOUT": "4", "PATH": "/"})
    assert settings == {"http_timeout": 4.0}


@pytest.mark.parametrize("namespace", ["CELERY", "shop"])
def test_settings_work_under_a_namespace(namespace: str) -> None:
    """As in a Django settings module."""
    upper = namespace.isupper()
    key = f"{namespace}_workerpools_database_url"
    module = SimpleNamespace(**{key.upper() if upper else key: "sqlite:///shop.db", "SECRET_KEY": "x"})
    app = Celery("settings", set_as_current=False)
    app.config_from_object(module, namespace=namespace)
    assert read_settings(app.conf, {}) == {"database_url": "sqlite:///shop.db"}


def test_an_unknown_setting_under_a_namespace_is_refused() -> None:
    """The message names it as it was written."""
    app = Celery("settings", set_as_current=False)
    app.config_from_object(SimpleNamespace(CELERY_WORKERPOOLS_HTTP_TIMOUT=1), namespace="CELERY")
    with pytest.raises(ConfigurationError, match="CELERY_WORKERPOOLS_HTTP_TIMOUT"):
        read_settings(app.conf, {})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("workerpools_htttp_base_url", "http://x", "unknown setting workerpools_htttp_base_url"),
        ("workerpools_http_timeout", "soon", "workerpools_http_timeout is 'soon'; wanted: a number of seconds"),
        ("workerpools_http_timeout", 0, "workerpools_http_timeout is 0"),
        ("workerpools_metrics_port", 65536, "wanted: a port from 0 to 65535"),
        ("workerpools_metrics_port", -1, "workerpools_metrics_port is -1"),
        ("workerpools_metrics_port", 9808.5, "a port"),
        ("workerpools_metrics_port", "http", "workerpools_metrics_port is 'http'"),
        ("workerpools_metrics_host", "", "workerpools_metrics_host is ''"),
        ("workerpools_http_timeout", -1, "above 0"),
        ("workerpools_http_timeout", float("nan"), "above 0"),
        ("workerpools_http_timeout", float("inf"), "above 0"),
        ("workerpools_http_timeout", True, "above 0"),
        ("workerpools_http_timeout", 10**400, r"of 1329 bits; wanted: .* and at most 604800 \(a week\)"),
        ("workerpools_http_timeout", "1" + "0" * 400, "at most 604800"),
        ("workerpools_http_timeout", 604_801, "workerpools_http_timeout is 604801"),
        ("workerpools_http_timeout", Decimal(5), "of the type Decimal"),
        ("workerpools_close_timeout", 1e12, "at most 604800"),
        ("workerpools_close_timeout", "nan", "above 0"),
        ("workerpools_leak_after", 1e308, r"at most 31536000 \(a year\)"),
        ("workerpools_deadline_margin", 1e9, "at least 0 and at most 31536000"),
        ("workerpools_retry_budget", 10**400, "at most 1000000"),
        ("workerpools_retry_budget", 1e308, "at most 1000000"),
        ("workerpools_alert_utilisation", 10**400, "at most 1"),
        ("workerpools_alert_creation_factor", 10**400, "at most 1000000"),
        ("workerpools_alert_acquire_wait", 10**400, "one of these numbers"),
        ("workerpools_metrics_port", 10**400, "a port"),
        ("workerpools_metrics_port", "inf", "a port"),
        ("workerpools_close_timeout", [], "above 0"),
        ("workerpools_database_pool_size", "1.5", "a whole number of at least 1"),
        ("workerpools_database_pool_size", 0, "at least 1"),
        ("workerpools_database_max_overflow", -1, "at least 0"),
        ("workerpools_http_base_url", "", "a text that is not empty"),
        ("workerpools_http_base_url", "api.example.com", "a URL with a scheme"),
        ("workerpools_http_base_url", "localhost", "like https://api.example.com$"),
        ("workerpools_database_url", "localhost/shop", r"like postgresql\+psycopg2://app@localhost/shop$"),
        ("workerpools_database_url", 5, "workerpools_database_url is 5"),
    ],
)
def test_mistakes_are_refused_by_name(key: str, value: Any, message: str) -> None:
    """The message names the setting, its value and what is wanted."""
    with pytest.raises(ConfigurationError, match=message):
        read_settings(conf(**{key: value}), {})


@pytest.mark.parametrize("variable", ["WORKERPOOLS_DATABASE_POOL_SIZ", pytest.param("WORKERPOOLS_", marks=COMPLETE)])
def test_unknown_variables_are_refused(variable: str) -> None:
    """A misspelt environment variable does not pass unnoticed."""
    with pytest.raises(ConfigurationError, match=variable):
        read_settings(conf(), {variable: "1"})


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("workerpools_metric_port", "workerpools_metrics_port"),
        pytest.param("workerpools_pool_size", "workerpools_database_pool_size", marks=COMPLETE),
        ("WORKERPOOLS_METRIC_PORT", "WORKERPOOLS_METRICS_PORT"),
        ("CELERY_WORKERPOOLS_METRIC_PORT", "CELERY_WORKERPOOLS_METRICS_PORT"),
        ("shop_workerpools_metric_port", "shop_workerpools_metrics_port"),
    ],
)
def test_the_nearest_setting_comes_first(written: str, meant: str) -> None:
    """Among 25 of them nobody looks for it; it is spelt as the mistake was."""
    app = Celery("settings", set_as_current=False)
    environ = {}
    if written.startswith("WORKERPOOLS"):
        environ[written] = "1"
    else:
        namespace = written[: written.lower().index("workerpools")].rstrip("_") or None
        app.config_from_object(SimpleNamespace(**{written: 1}), namespace=namespace)
    with pytest.raises(ConfigurationError, match=rf"^unknown setting {written}; did you mean {meant}\? The settings"):
        read_settings(app.conf, environ)


@COMPLETE
def test_no_setting_is_near() -> None:
    """Nothing is guessed then."""
    with pytest.raises(ConfigurationError, match=r"^unknown setting workerpools_xyz; the settings are: workerpools_"):
        read_settings(conf(workerpools_xyz=1), {})


@pytest.mark.parametrize("key", ["WORKERPOOLS_DATABASE_URL", "Workerpools_Database_Url"])
def test_keys_in_upper_case_are_refused(key: str) -> None:
    """Celery would ignore them in silence: upper case is for the environment, and for a namespace."""
    app = Celery("settings", set_as_current=False)
    setattr(app.conf, key, "sqlite://")
    with pytest.raises(ConfigurationError, match=rf"{key}.*write workerpools_database_url"):
        read_settings(app.conf, {})


def test_keys_without_their_namespace_are_refused() -> None:
    """A Django settings module that forgot the prefix."""
    app = Celery("settings", set_as_current=False)
    app.config_from_object(SimpleNamespace(WORKERPOOLS_DATABASE_URL="sqlite://"), namespace="CELERY")
    with pytest.raises(ConfigurationError, match=r"WORKERPOOLS_DATABASE_URL.*write CELERY_WORKERPOOLS_DATABASE_URL"):
        read_settings(app.conf, {})


@pytest.mark.parametrize("namespace", [None, "CELERY"])
def test_a_dictionary_of_settings_is_refused(namespace: str | None) -> None:
    """Settings are flat."""
    app = Celery("settings", set_as_current=False)
    key = "CELERY_WORKERPOOLS" if namespace else "workerpools"
    app.config_from_object(SimpleNamespace(**{key: {"database_url": "secret"}}), namespace=namespace)
    with pytest.raises(ConfigurationError, match=rf"{key} is a dictionary.*workerpools_database_url") as caught:
        read_settings(app.conf, {})
    assert "secret" not in str(caught.value)


def test_a_configuration_module_may_import_workerpools() -> None:
    """Celery takes every name of it for a setting."""
    import workerpools

    app = Celery("settings", set_as_current=False)
    app.config_from_object(SimpleNamespace(workerpools=workerpools, workerpools_http_timeout=3))
    assert read_settings(app.conf, {}) == {"http_timeout": 3.0}


def test_a_mistaken_url_is_not_shown() -> None:
    """It may be a bare password."""
    with pytest.raises(ConfigurationError) as caught:
        read_settings(conf(workerpools_database_url="hunter2"), {})
    assert "hunter2" not in str(caught.value)


def test_every_setting_is_documented() -> None:
    """Each has a meaning and two names."""
    for setting in all_settings():
        assert setting.meaning.endswith(".")
        assert setting.variable == setting.key.upper() == f"WORKERPOOLS_{setting.name.upper()}"


@pytest.mark.parametrize("base", [HTTPTask, DatabaseTask])
def test_a_task_with_wrong_settings_is_not_registered(base: type) -> None:
    """So that a worker with a mistake in its settings does not start."""
    app = Celery("settings", set_as_current=False)
    app.conf.workerpools_http_timeout = "soon"

    @app.task(base=base)
    def task() -> None: ...

    with pytest.raises(ConfigurationError, match="workerpools_http_timeout"):
        app.finalize()


def test_a_database_task_without_a_url_says_so() -> None:
    """When it uses the engine, not before."""
    app = Celery("settings", set_as_current=False)

    @app.task(base=DatabaseTask, bind=True)
    def task(self: DatabaseTask) -> None:
        assert self.engine

    with pytest.raises(ConfigurationError, match="WORKERPOOLS_DATABASE_URL"):
        task()


@pytest.mark.parametrize("setting", all_settings(), ids=lambda setting: setting.name)
@pytest.mark.parametrize(
    "value",
    [10**400, -(10**400), 10**5000, 1e308, float("nan"), float("inf"), -1, True, Decimal(1)],
    ids=shown,
)
def test_no_setting_takes_any_number(setting: Setting, value: Any) -> None:
    """Each has bounds, and says which."""
    if value is True and setting.name == "replay":
        assert read_settings(conf(**{setting.key: value}), {}) == {"replay": True}
        return
    with pytest.raises(ConfigurationError, match=rf"^{setting.key} is .+; wanted: ."):
        read_settings(conf(**{setting.key: value}), {})
