"""What people read never holds a secret."""

from __future__ import annotations

import pytest

from workerpools._core.redact import redact_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://api.example.com/v1", "https://api.example.com/v1"),
        ("https://user:secret@api.example.com/v1", "https://user:***@api.example.com/v1"),
        ("postgresql+psycopg2://app:secret@db:5432/shop", "postgresql+psycopg2://app:***@db:5432/shop"),
        ("postgresql://app:se:cr@t@db/shop", "postgresql://app:***@db/shop"),
        ("postgresql://app:secret?x@db/shop?sslpassword=secret", "postgresql://app:***@db/shop"),
        ("postgresql://db/shop?password=secret", "postgresql://db/shop"),
        ("https://api.example.com/?token=secret#secret", "https://api.example.com/"),
        ("redis://:secret@localhost/0", "redis://:***@localhost/0"),
        ("app:secret@db", "app:***@db"),
        ("", ""),
    ],
)
def test_redact_url(url: str, shown: str) -> None:
    """Passwords, queries and fragments are hidden; the rest is shown."""
    assert redact_url(url) == shown
    assert "secret" not in redact_url(url)
