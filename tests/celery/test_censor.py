"""What Celery itself shows of the settings holds no secret."""

from __future__ import annotations

import pytest
from celery import Celery

from workerpools import WorkerPools


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://me:s3cret@api.example.com/v1", "https://me:***@api.example.com/v1"),
        ("https://s3cret@api.example.com", "https://***@api.example.com"),
        ("https://api.example.com/hooks/s3cret?t=s3cret", "https://api.example.com/***/***"),
        ("s3cret", "********"),
        ("https://api.example.com", "https://api.example.com"),
    ],
)
@pytest.mark.parametrize("namespace", [None, "SHOP"])
def test_settings_in_a_report(value: str, shown: str, namespace: str | None) -> None:
    """In ``celery report`` and in the reply to ``inspect conf``, which Flower shows; tasks get the whole value."""
    app = Celery("censor", set_as_current=False, broker="memory://")
    WorkerPools(app)
    if namespace is None:
        app.conf.workerpools_http_base_url = value
    else:
        app.config_from_object({f"{namespace}_WORKERPOOLS_HTTP_BASE_URL": value}, namespace=namespace)
    # Twice: the censor is installed once.
    WorkerPools(app)
    table = app.conf.table(with_defaults=False, censored=True)
    assert [each for name, each in table.items() if "http_base_url" in name.lower()] == [shown]
    for text in (app.bugreport(), repr(table)):
        assert "s3cret" not in text
        assert shown in text
    assert app.conf.workerpools_http_base_url == value


def test_settings_written_as_a_dictionary() -> None:
    """A worker refuses them; until it does, nothing of them is shown."""
    app = Celery("censor", set_as_current=False, broker="memory://")
    WorkerPools(app)
    app.conf.workerpools = {"http_base_url": "https://me:s3cret@h"}
    assert "s3cret" not in app.bugreport()
