"""What a worker's main process has open before it forks, asked of a process that imports the app as it does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from workerpools._check import silences
from workerpools._check.asked import Asked
from workerpools._check.findings import Code, Finding
from workerpools._check.own import shown

__all__ = ["CODES", "check"]

#: How long the import may take, in seconds.
TIMEOUT = 60.0

_DECLARE = "Declare it with pools.add(…): each process opens its own on first use, after the fork."

OPEN = Code(
    "WP101",
    "error",
    "A connection is open before the fork",
    "Every child inherits the socket and writes into the same stream: replies reach the wrong process, TLS breaks, "
    "and the first process to close ends the session for all.",
    _DECLARE,
    "connection = psycopg2.connect(DSN)  # at module level",
)
OPEN_SOMEWHERE = Code(
    "WP102",
    "error",
    "A socket is open before the fork, and no name of the app's modules leads to it",
    "Every child inherits it. A library that connects at import holds it, or an object that only a function refers to.",
    "Find the call that connects at import, and make it on first use in the task's process.",
    "sdk.init(connect=True)  # at module level",
)
ENGINE = Code(
    "WP103",
    "warning",
    "An engine at module level",
    "It connects on first use. If anything uses it in the main process, such as a call at import or a signal's "
    "receiver, all children share its connections.",
    "Declare it: db = pools.add(SQLAlchemyEngine(url)). Or engine.dispose(close=False) in a receiver of "
    "worker_process_init.",
    "engine = create_engine(URL)  # at module level",
)
CLIENT = Code(
    "WP104",
    "warning",
    "An HTTP client at module level",
    "It connects on first use. If anything uses it in the main process, all children share its connections, and read "
    "each other's responses with status 200.",
    "Declare it: api = pools.add(HttpxClient(base_url=…)), or RequestsSession(…) for a requests.Session.",
    "client = httpx.Client()  # at module level",
)
CACHE = Code(
    "WP105",
    "hint",
    "A Redis client at module level",
    "redis-py notices a fork, so nothing is shared. But it repeats commands that may have been executed, and nothing "
    "counts or bounds its connections.",
    "Declare it: cache = pools.add(RedisClient(url)).",
    "cache = redis.Redis()  # at module level",
)
SESSION = Code(
    "WP106",
    "error",
    "A database session at module level",
    "All tasks of the process share its objects and its transaction; after one error it refuses all further work, "
    "and after a fork its connection is shared.",
    "session = TaskSession(db) in a PooledTask: one session per run.",
    "session = Session(engine)  # at module level",
)
LOOP = Code(
    "WP107",
    "error",
    "An event loop or an asynchronous client at module level",
    "Children share the loop's epoll descriptor and its wake-up socket; an asynchronous client belongs to the loop "
    "that first used it.",
    "Declare it: api = pools.add(AsyncHttpxClient(base_url=…)), for async def bodies on the process's own loop.",
    "loop = asyncio.new_event_loop()  # at module level",
)
THREAD = Code(
    "WP108",
    "warning",
    "A thread is started at import",
    "Threads do not survive a fork: children do not have it, and a lock that it held at the fork stays locked for "
    "ever.",
    "Start it in the process that needs it, on first use.",
    "Thread(target=refresh, daemon=True).start()  # at module level",
)
OURS = Code(
    "WP109",
    "warning",
    "A resource is opened in the main process",
    "Children discard what they inherit, so nothing is shared; but the main process keeps a connection that it does "
    "not need.",
    "Do not use resources at import; move early preparation into on_open=.",
    "rates = ShopTask.api.get().get('/rates').json()  # at module level",
)
IMPORT = Code(
    "WP110",
    "error",
    "The app cannot be imported",
    "A worker cannot start, and nothing else can be found in modules that are not loaded.",
    "Run python -c 'import …' for the whole traceback.",
    "import a_module_that_is_missing",
)
SLOW = Code(
    "WP111",
    "error",
    f"The import takes longer than {TIMEOUT:.0f} s",
    "A call at import waits for something, such as a server that does not answer; a worker hangs in the same way.",
    "Make the call on first use, with a timeout.",
    "settings = requests.get(URL).json()  # at module level",
)
NAMELESS = Code(
    "WP112",
    "hint",
    "No importable module has the app",
    "The import is checked in a separate process, which finds the app by its module's name.",
    "Assign the app to a name of a module that can be imported.",
    "def create():\n    return Celery('shop')",
)
CODES = (OPEN, OPEN_SOMEWHERE, ENGINE, CLIENT, CACHE, SESSION, LOOP, THREAD, OURS, IMPORT, SLOW, NAMELESS)
_BY_CODE = {each.code: each for each in CODES}


def check(asked: Asked) -> list[Finding]:
    """Return what the import of the app leaves open."""
    name = _name(asked.app)
    if name is None:
        return [NAMELESS.at(repr(asked.app.main or "the app"), "no module in sys.modules has this app")]
    reports = _imported(name)
    if reports is None:
        return [SLOW.at(name, f"the import of {name} was ended after {TIMEOUT:.0f} s")]
    found = [_BY_CODE[each["code"]].at(each["where"], each["what"]) for each in reports]
    for path in dict.fromkeys(each["path"] for each in reports if each["path"]):
        with suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            left_out, wrong = silences.in_source(shown(path), file.read(), asked.codes)
            found += wrong
            asked.silenced.update({f"{shown(path)}:{line}": codes for line, codes in left_out.items()})
    return found


def _name(app: Any) -> str | None:
    """Return the app's name as the option ``-A`` takes it; None if no module has it."""
    app = getattr(app, "_get_current_object", lambda: app)()
    found = [
        (attribute not in ("app", "celery"), len(name), f"{name}:{attribute}")
        for name, module in list(sys.modules.items())
        if name != "__main__"
        for attribute, value in list(getattr(module, "__dict__", {}).items())
        if value is app
    ]
    return min(found)[2] if found else None


def _imported(name: str) -> list[dict[str, Any]] | None:
    """Import the app in a process of its own; return what it reports, or None if that takes too long."""
    read, write = os.pipe()
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", "workerpools._check.imported", name, str(write)],
        env={**os.environ, "PYTHONPATH": path},
        pass_fds=(write,),
        stdin=subprocess.DEVNULL,
        # The app may print, and a library may warn.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(write)
    timer = threading.Timer(TIMEOUT, _kill, [process])
    timer.start()
    try:
        with open(read, encoding="utf-8") as pipe:
            reported = pipe.read()
    finally:
        timer.cancel()
        _kill(process)
        status = process.wait()
    if reported:
        return list(json.loads(reported))
    if status == -signal.SIGKILL:
        return None
    return [{"code": "WP110", "where": name, "path": "", "what": f"the process that imports it ended with {status}"}]


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
