"""Settings reach the ready-made task bases from the configuration and from the environment, or stop the worker."""

from __future__ import annotations

import json

import pytest

from tests.support.stand import PATIENCE, Stand

pytestmark = pytest.mark.worker

STYLES = "tests.worker.styles:app"


@pytest.mark.parametrize(
    ("style", "namespaced"), [("base", True), ("task_cls", False), ("app.Task", False)], ids=lambda value: str(value)
)
def test_the_ready_made_bases_work_by_every_way_to_name_them(stand: Stand, style: str, namespaced: bool) -> None:
    """`base=`, `task_cls=`, `app.Task =` and shared_task give the body a client, an engine and a session that are made
    from settings: keys under a namespace, or environment variables."""
    env = {**stand.environment(), "SHOP_STYLE": style}
    if namespaced:
        env["SHOP_NAMESPACED"] = "1"
    blank = {name: "" for name in env if name.startswith("WORKERPOOLS_")} if namespaced else {}
    worker = stand.worker(app=STYLES, pool="solo", concurrency=1, env={**env, **blank})
    for name in blank:
        # Set to an empty text they would be settings all the same.
        del worker._env[name]
    with worker:
        for name in ("own", "shared"):
            answer = stand.call(name, f"token-{name}")
            answer["name"] = answer["name"].partition(" xid=")[0].partition(" pid=")[0]
            assert answer == {"right": True, "name": "workerpools engine", "size": 1, "base": True}
        assert worker.stop() == 0
    stand.wait_for_no_connection()
    assert stand.disorderly_ends() == 0


@pytest.mark.parametrize(
    ("conf", "env", "named"),
    [
        ({"workerpools_htttp_base_url": "http://localhost"}, {}, "workerpools_htttp_base_url"),
        ({"workerpools_http_timeout": "soon"}, {}, "workerpools_http_timeout is 'soon'"),
        ({}, {"WORKERPOOLS_DATABASE_POOL_SIZE": "0"}, "WORKERPOOLS_DATABASE_POOL_SIZE is '0'"),
        ({}, {"WORKERPOOLS_DATABASE_URI": "postgresql://localhost"}, "WORKERPOOLS_DATABASE_URI"),
    ],
    ids=["unknown key", "malformed key", "malformed variable", "unknown variable"],
)
def test_a_wrong_setting_keeps_the_worker_from_starting(
    stand: Stand, conf: dict[str, str], env: dict[str, str], named: str
) -> None:
    """The worker ends before it is ready, with a ConfigurationError that names the setting and what is wrong."""
    worker = stand.worker(pool="solo", concurrency=1, env={"SHOP_CONF": json.dumps(conf), **env})
    try:
        worker.start()
        assert worker.wait(PATIENCE) != 0
        log = worker.log()
    finally:
        worker.close()
    assert "ConfigurationError" in log
    assert named in log
    assert " ready." not in log
