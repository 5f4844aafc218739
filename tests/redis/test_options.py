"""What is wrong with a declaration is said where it is declared."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.support.paths import environment
from workerpools import ConfigurationError, WorkerPools
from workerpools.redis import AsyncRedisClient, RedisClient

URL = "redis://localhost:6379/0"
SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("localhost:6379", {}, "wanted a URL such as redis://localhost:6379/0"),
        ("redis:/localhost", {}, "wanted a URL such as"),
        ("reddis://localhost", {}, "did you mean redis://?"),
        (6379, {}, "wanted a string"),
        ("redis+cluster://localhost", {}, "Redis Cluster is not supported. Use a function"),
        ("redis://localhost/zero", {}, "the path is to be the number of a database"),
        ("redis://localhost?db=zero", {}, "Invalid value for 'db'"),
        ("redis+sentinel://localhost:26379", {}, "wanted the service's name"),
        ("redis+sentinel://:26379/shop", {}, "wanted one or more Sentinels"),
        ("redis+sentinel://localhost:port/shop", {}, "wanted one or more Sentinels"),
        ("redis://localhost?socket_timeout=3", {}, "socket_timeout is not taken: use timeout"),
        ("redis://localhost?max_connections=3", {}, "use the option max_connections of RedisClient"),
        ("redis://localhost/1", {"db": 2}, "db: given in the URL and as an option"),
        (URL, {"socket_timeout": 3}, "socket_timeout is not taken: use timeout"),
        (URL, {"retry_on_timeout": True}, "a lost command would be sent twice"),
        (URL, {"connection_pool": None}, "the connection pool is workerpools' own"),
        (URL, {"health_check_interval": 3}, "use check_after"),
        (URL, {"ssl": True}, "begin the URL with rediss://"),
        (URL, {"ssl_ca_certs": "ca.pem"}, "for a URL that begins with rediss://"),
        (URL, {"decode_response": True}, "did you mean decode_responses?"),
        (URL, {"timeout": 0}, "RedisClient(timeout=0: wanted a number of seconds, above 0"),
        (URL, {"timeout": "5"}, "RedisClient(timeout='5': wanted a number"),
        (URL, {"connect_timeout": None}, "RedisClient(connect_timeout=None: wanted a number"),
        (URL, {"acquire_timeout": -1}, "RedisClient(acquire_timeout=-1: wanted a number"),
        (URL, {"max_connections": 0}, "RedisClient(max_connections=0: wanted a whole number of at least 1"),
        (URL, {"max_lifetime": -1}, "RedisClient(max_lifetime=-1: wanted a number"),
        (URL, {"max_lifetime_jitter": 2}, "RedisClient(max_lifetime_jitter=2: wanted a number from 0 to 1"),
        (URL, {"check_after": "1"}, "RedisClient(check_after='1': wanted a number"),
        (URL, {"protocol": 4}, "RedisClient(protocol=…): wanted 2 or 3"),
        ("redis://localhost", {"db": -1}, "RedisClient(db=-1: wanted a whole number"),
        (URL, {"password": 1}, "RedisClient(password=…): wanted a string"),
        (URL, {"credentials": "no function"}, "RedisClient(credentials=…): wanted a function"),
        (f"redis://:{SECRET}@localhost", {"credentials": str}, "either a user and a password or credentials="),
        (URL, {"sentinel_credentials": SECRET}, "is for a URL such as redis+sentinel://"),
        (URL, {"on_open": 1}, "RedisClient(on_open=…): wanted a function"),
        (URL, {"leak_after": 0}, "RedisClient(leak_after=0: wanted a number"),
    ],
)
def test_a_mistake_is_refused(url: Any, options: dict[str, Any], said: str) -> None:
    """With the value, and with what to do instead."""
    for declared in (RedisClient, AsyncRedisClient):
        with pytest.raises(ConfigurationError) as caught:
            declared(url, **options)
        assert str(caught.value).startswith(declared.__name__)
        assert said.replace("RedisClient", declared.__name__) in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown", "server"),
    [
        (f"redis://:{SECRET}@redis.internal:6380/3?client_name={SECRET}", "redis://:***@redis.internal:6380/3", 6380),
        (f"rediss://app:{SECRET}@redis.internal", "rediss://app:***@redis.internal", 6379),
        (f"valkey://app:{SECRET}/x@redis.internal/0", "valkey://app:***@redis.internal/0", None),
        (f"redis+sentinel://:{SECRET}@a:1,b:2/shop/0", "redis+sentinel://:***@a:1,b:2/shop/0", None),
        (f"unix://:{SECRET}@/run/redis.sock?db=1", "unix://:***@/run/redis.sock", None),
    ],
)
def test_no_secret_is_shown(url: str, shown: str, server: int | None) -> None:
    """Nor taken for a server."""
    if SECRET + "/x" in url:
        # Not escaped: the driver takes it for a part of the path.
        with pytest.raises(ConfigurationError) as caught:
            RedisClient(url)
        assert SECRET not in str(caught.value)
        return
    with WorkerPools() as pools:
        resource = pools.add(RedisClient(url), name="cache")
        client = resource.get()
        other = pools.add(AsyncRedisClient(url), name="other")
        hidden = (other.adapter.describe(), repr(other), repr(other.get()), repr(other.get().connection_pool))
        assert not [text for text in hidden if SECRET in text]
        texts = (resource.adapter.describe(), repr(resource), repr(client), repr(client.connection_pool))
        assert texts[0] == f"RedisClient {shown}"
        assert not [text for text in texts if SECRET in text]
        assert resource.adapter.server == (None if server is None else ("redis.internal", server))


def test_the_settings() -> None:
    """``workerpools_redis_url`` and the times."""
    adapter = RedisClient.from_settings({"redis_url": URL, "redis_timeout": 2.0, "redis_max_connections": 3})
    with WorkerPools() as pools:
        pool: Any = pools.add(adapter, name="cache").get().connection_pool
        assert (pool.timeout, pool.connect_timeout, pool.max_connections) == (2.0, 3.0, 3)
    with pytest.raises(ConfigurationError, match="workerpools_redis_url is not set"):
        RedisClient.from_settings({})


@pytest.mark.parametrize(("missing", "url"), [("valkey", "redis://localhost"), ("redis", "valkey://localhost")])
def test_one_driver_is_enough(missing: str, url: str) -> None:
    """And the module itself imports neither; the missing one is named."""
    other = "valkey://localhost" if missing == "valkey" else "redis://localhost"
    code = (
        "import sys\n"
        "from workerpools.redis import RedisClient\n"
        "assert not {'redis', 'valkey'} & set(sys.modules)\n"
        f"sys.modules[{missing!r}] = None\n"
        f"RedisClient({url!r})\n"
        f"try: RedisClient({other!r})\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert f"needs {missing}, which the extra '{missing}' brings: pip install {missing}" in done.stdout
