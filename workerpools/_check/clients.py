"""Clients in the source: made for each run, without a bound, shared by the wrong ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from workerpools._check.bodies import Body, is_task_class, receivers
from workerpools._check.findings import Code, Finding
from workerpools._check.syntax import Function, Module, is_function, keyword, last, nodes_of

__all__ = ["CODES", "of_body", "of_module"]

CLIENT_PER_RUN = Code(
    "WP201",
    "warning",
    "A client is made for each run",
    "Each run opens new connections, with DNS, TCP and TLS, and builds a new TLS context, the most expensive part.",
    "Declare the client once with pools.add(…); each process opens it once, and the body gets it as self.api.",
    "@app.task\ndef price(sku):\n    with httpx.Client() as client:\n        …",
)
ONE_SHOT = Code(
    "WP202",
    "hint",
    "A request without a client",
    "httpx.get() and requests.get() open a connection for each request, and close it afterwards.",
    "Declare a client once with pools.add(…), and call its methods.",
    '@app.task\ndef price(sku):\n    return requests.get(f"https://api/{sku}", timeout=5).json()',
)
ENGINE_PER_RUN = Code(
    "WP203",
    "warning",
    "An engine is made for each run",
    "Each run connects and logs in again, and the engine's pool keeps its connection until it is garbage-collected.",
    "Declare the engine once: db = pools.add(SQLAlchemyEngine(url)), or AsyncSQLAlchemyEngine(url) for an async one.",
    "@app.task\ndef report():\n    engine = create_engine(URL)",
)
UNLIMITED = Code(
    "WP204",
    "warning",
    "A pool without a limit",
    "Under load it opens connections until the server or the process runs out of them.",
    "Give it a limit: as many as the process has concurrent tasks, or a few more.",
    "httpx.Limits(max_keepalive_connections=20)  # max_connections is None then",
)
ENDLESS = Code(
    "WP205",
    "warning",
    "A wait without an end",
    "A peer that vanishes silently keeps the process busy for ever; a soft time limit may not reach it.",
    "Give a timeout to every connect, read and wait for a connection.",
    "@app.task\ndef ping():\n    requests.get(URL)  # requests has no timeout by default",
)
ASYNCIO_RUN = Code(
    "WP206",
    "warning",
    "asyncio.run() in a task with a client that outlives it",
    "Each asyncio.run() has its own loop, and the client's connections belong to the loop that opened them: the "
    'next run gets "Event loop is closed".',
    "Write the body as async def, with AsyncHttpxClient or AsyncSQLAlchemyEngine; or call pools.run(coroutine).",
    "client = httpx.AsyncClient()\n\n@app.task\ndef price(sku):\n    return asyncio.run(fetch(client, sku))",
)
LAZY_BASE = Code(
    "WP207",
    "warning",
    "A task base that opens its client on first use",
    "All threads share one task object, and forked children inherit it: a client that the parent or another thread "
    "opened is shared.",
    "Declare it as a resource: db = pools.add(…) in a PooledTask.",
    "class DatabaseTask(Task):\n    _db = None\n\n    @property\n    def db(self):\n        if self._db is None:\n"
    "            self._db = Database.connect()\n        return self._db",
)
DISPOSE = Code(
    "WP209",
    "warning",
    "dispose() in a child closes its parent's connections",
    "The child has the parent's sockets, and ends its sessions through them; the parent's next statement fails.",
    "engine.dispose(close=False); or declare the engine with pools.add(…), which needs no such receiver.",
    "@worker_process_init.connect\ndef renew(**kwargs):\n    engine.dispose()",
)
IN_PARENT = Code(
    "WP212",
    "error",
    "A client is opened in the worker's main process",
    "worker_init runs before the fork: every child inherits the same connections and writes into them.",
    "Declare it with pools.add(…), which each process opens on first use.",
    "@worker_init.connect\ndef connect(**kwargs):\n    state.db = psycopg2.connect(DSN)",
)
CODES = (CLIENT_PER_RUN, ONE_SHOT, ENGINE_PER_RUN, UNLIMITED, ENDLESS, ASYNCIO_RUN, LAZY_BASE, DISPOSE, IN_PARENT)

_VERBS = ("get", "post", "put", "patch", "delete", "head", "options", "request")
_ONE_SHOT = {f"{library}.{verb}" for library in ("httpx", "httpx2", "requests") for verb in _VERBS} | {"httpx.stream"}
_REQUESTS_SESSIONS = {"requests.Session", "requests.session", "requests.sessions.Session"}
_ASYNC_CLIENTS = {
    "aiohttp.ClientSession",
    "httpx.AsyncClient",
    "httpx2.AsyncClient",
    "motor.motor_asyncio.AsyncIOMotorClient",
    "redis.asyncio.ConnectionPool.from_url",
    "redis.asyncio.Redis",
    "redis.asyncio.Redis.from_url",
    "redis.asyncio.from_url",
    "sqlalchemy.ext.asyncio.async_sessionmaker",
    "sqlalchemy.ext.asyncio.create_async_engine",
}
_ENGINES = {
    "sqlalchemy.create_engine",
    "sqlalchemy.engine.create_engine",
    "sqlalchemy.ext.asyncio.create_async_engine",
    "sqlmodel.create_engine",
}
_CLIENTS = {
    "httpx.Client",
    "httpx2.Client",
    "pymongo.MongoClient",
    "pymongo.mongo_client.MongoClient",
    "redis.Redis",
    "redis.Redis.from_url",
    "redis.StrictRedis",
    "redis.StrictRedis.from_url",
    "redis.client.Redis",
    "redis.from_url",
    "urllib3.PoolManager",
    "valkey.Valkey",
    "valkey.Valkey.from_url",
    "valkey.from_url",
    *_REQUESTS_SESSIONS,
    *(_ASYNC_CLIENTS - _ENGINES - {"sqlalchemy.ext.asyncio.async_sessionmaker"}),
}
_CONNECTIONS = {"psycopg.connect", "psycopg2.connect", "pymysql.connect", "MySQLdb.connect", "pika.BlockingConnection"}
_BLOCKING_POOLS = {"redis.BlockingConnectionPool", "redis.connection.BlockingConnectionPool"}
_OPENED = re.compile(r"_?_?(db|database|session|engine|client|conn|connection|http|redis|mongo|pool)$|_(client|conn)$")


def of_body(body: Body) -> Iterator[Finding]:
    """Yield what is wrong with a task's body."""
    kept = {id(call) for _, function in body.functions for call in _kept(function)}
    for module, function, call in body.calls():
        called = module.called(call, function)
        where = module.place(call)
        task = f"the task {body.name}"
        if called in _ENGINES and id(call) not in kept:
            yield ENGINE_PER_RUN.at(where, f"{task} calls {called}() in each run")
        elif called in _CLIENTS and id(call) not in kept and not _takes_pool(call):
            yield CLIENT_PER_RUN.at(where, f"{task} makes a new {called} in each run")
        elif called in _ONE_SHOT:
            yield ONE_SHOT.at(where, f"{task} calls {called}(), which connects for this request alone")
        if _waits(module, function, call, called):
            yield ENDLESS.at(where, f"{task} calls {_shown(call)}() without a timeout")
        if called in ("asyncio.run", "asgiref.sync.async_to_sync"):
            shared = next(_async_clients(module, function, call), None)
            if shared is not None:
                yield ASYNCIO_RUN.at(where, f"{task} calls {called}() with {shared}, which is made once per process")


def of_module(module: Module) -> Iterator[Finding]:
    """Yield what is wrong anywhere in a module."""
    for node in module.nodes:
        if isinstance(node, ast.Call):
            called = module.called(node)
            if (unlimited := _unlimited(node, called)) is not None:
                yield UNLIMITED.at(module.place(node), unlimited)
            if (endless := _endless(node, called)) is not None:
                yield ENDLESS.at(module.place(node), endless)
            if called == "os.register_at_fork":
                child = keyword(node, "after_in_child")
                if child is not None and last(child) == "dispose":
                    yield DISPOSE.at(module.place(node), f"each forked child calls {ast.unparse(child)}()")
    for class_ in module.classes.values():
        if is_task_class(module, class_):
            yield from _lazy(module, class_)
    for receiver in receivers(module, "worker_process_init"):
        for call in (node for function in _with_called(module, receiver) for node in nodes_of(function)):
            if isinstance(call, ast.Call) and last(call.func) == "dispose" and _closes(call):
                yield DISPOSE.at(module.place(call), f"each child calls {_shown(call)}() without close=False")
    for receiver in receivers(module, "worker_init", "celeryd_init"):
        for call in (node for function in _with_called(module, receiver) for node in nodes_of(function)):
            called = module.called(call, receiver)
            if called in _CLIENTS | _ENGINES | _CONNECTIONS:
                yield IN_PARENT.at(
                    module.place(call), f"{receiver.name}() makes its {called} before the children are forked"
                )


def _with_called(module: Module, function: Function) -> list[Function]:
    return [called for _, called in Body(module, function, None).functions]


def _shown(call: ast.Call) -> str:
    return ast.unparse(call.func)


def _is_none(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _number(node: ast.expr | None) -> object:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _spread(call: ast.Call) -> bool:
    """Whether the arguments that are written are not all."""
    return any(each.arg is None for each in call.keywords)


def _takes_pool(call: ast.Call) -> bool:
    """Whether a client of a pool that is made elsewhere: only the object is made anew."""
    return any(keyword(call, name) is not None for name in ("connection_pool", "transport", "mounts")) or _spread(call)


def _kept(function: Function) -> Iterator[ast.Call]:
    """Yield the calls whose value outlives the function: a global's, an attribute's, an item's, or what it returns."""
    foreign = {name for node in nodes_of(function) if isinstance(node, ast.Global) for name in node.names}
    for node in nodes_of(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            for target in node.targets:
                if isinstance(target, ast.Attribute | ast.Subscript) or last(target) in foreign:
                    yield node.value


def _waits(module: Module, function: Function, call: ast.Call, called: str) -> bool:
    if keyword(call, "timeout") is not None or _spread(call):
        return False
    if called.startswith("requests.") and called in _ONE_SHOT:
        return True
    if called == "urllib.request.urlopen":
        return len(call.args) < 3
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in _VERBS:
        return False
    return _made_by(module, function, call.func.value) in _REQUESTS_SESSIONS


def _made_by(module: Module, function: Function, name: ast.expr) -> str:
    """Return what a name of the function or of a module was made by; empty if that is not known, or not one thing."""
    if not isinstance(name, ast.Name) or name.id not in module.locals_of(function):
        return module.project.constructor(module.dotted(name, function))
    made: set[str] = set()
    for node in nodes_of(function):
        if isinstance(node, ast.Assign) and any(last(target) == name.id for target in node.targets):
            made.add(module.called(node.value, function))
        elif isinstance(node, ast.withitem) and node.optional_vars is not None and last(node.optional_vars) == name.id:
            made.add(module.called(node.context_expr, function))
        elif isinstance(node, ast.arg) and node.arg == name.id:
            return ""
    return made.pop() if len(made) == 1 else ""


def _unlimited(call: ast.Call, called: str) -> str | None:
    if called in ("httpx.Limits", "httpx2.Limits") and not _spread(call):
        given = keyword(call, "max_connections")
        if given is None or _is_none(given):
            return f"{called}() without max_connections has no limit"
    if called in _ENGINES:
        if _number(keyword(call, "max_overflow")) == -1:
            return "max_overflow=-1 means no limit"
        if _number(keyword(call, "pool_size")) == 0:
            return "pool_size=0 means no limit"
    if called == "aiohttp.TCPConnector" and _number(keyword(call, "limit")) == 0:
        return "limit=0 means no limit"
    return None


def _endless(call: ast.Call, called: str) -> str | None:
    library = called.partition(".")[0]
    if library in ("httpx", "httpx2", "requests") or called in _BLOCKING_POOLS:
        if _is_none(keyword(call, "timeout")):
            return f"{called}(timeout=None) waits for ever"
        if called.endswith(".Timeout"):
            if call.args and _is_none(call.args[0]) and not call.keywords:
                return f"{called}(None) waits for ever"
            if _is_none(keyword(call, "pool")):
                return f"{called}(pool=None) waits for a connection for ever"
    if called == "aiohttp.ClientTimeout" and _is_none(keyword(call, "total")) and len(call.keywords) == 1:
        return "aiohttp.ClientTimeout(total=None) waits for ever"
    return None


def _async_clients(module: Module, function: Function, call: ast.Call) -> Iterator[str]:
    """Yield the asynchronous clients of modules that the coroutine of a call uses."""
    for argument in call.args[:1]:
        yield from _shared(module, argument, function)
        named = argument.func if isinstance(argument, ast.Call) else argument
        coroutine = module.project.function(module.dotted(named, function))
        inner = next((each for each in nodes_of(function) if is_function(each) and each.name == last(named)), None)
        if inner is not None:
            yield from _shared(module, inner, inner)
        elif coroutine is not None:
            yield from _shared(coroutine[0], coroutine[1], coroutine[1])


def _shared(module: Module, node: ast.AST, function: Function) -> Iterator[str]:
    for each in nodes_of(node):
        if isinstance(each, ast.Name):
            dotted = module.dotted(each, function)
            if module.project.constructor(dotted) in _ASYNC_CLIENTS:
                yield dotted


def _lazy(module: Module, class_: ast.ClassDef) -> Iterator[Finding]:
    empty = {
        target.id
        for node in class_.body
        if isinstance(node, ast.Assign) and _is_none(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for function in (node for node in class_.body if is_function(node)):
        for node in nodes_of(function):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
                continue
            for target in node.targets:
                if isinstance(target, ast.Attribute) and last(target.value) == "self" and target.attr in empty:
                    known = module.called(node.value, function) in _CLIENTS | _ENGINES | _CONNECTIONS
                    if known or _OPENED.search(target.attr):
                        what = f"{class_.name}.{target.attr} is None until {function.name}() opens it"
                        yield LAZY_BASE.at(module.place(node), what)


def _closes(call: ast.Call) -> bool:
    close = keyword(call, "close") or (call.args[0] if call.args else None)
    return not (isinstance(close, ast.Constant) and close.value is False) and not _spread(call)
