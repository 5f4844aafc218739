"""Transactions in the source: messages before the commit, errors that commit, retries that run twice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from workerpools._check.bodies import Body
from workerpools._check.findings import Code, Finding
from workerpools._check.syntax import Function, Module, is_function, last, nodes_of

__all__ = ["CODES", "of_body", "of_module"]

AUTORETRY = Code(
    "WP208",
    "warning",
    "autoretry_for repeats work that may be done",
    "These errors are also raised if the COMMIT or the request arrived and its reply was lost, and if a time limit "
    "interrupted a driver: the second run does everything twice.",
    "Take them out of autoretry_for: a PooledTask replays and retries only what is safe. Or make the task "
    "idempotent, and set idempotent=True.",
    "@app.task(autoretry_for=(OperationalError,))\ndef pay(order_id):\n    …",
)
EARLY_MESSAGE = Code(
    "WP210",
    "warning",
    "A message leaves before the commit",
    "A worker may receive it before the row is there; if the transaction is rolled back, the message has still been "
    "sent.",
    "mail.delay_on_commit(…); with Django, transaction.on_commit(…) or a DjangoTask's delay_on_commit(…).",
    "session.add(order)\nmail.delay(order.id)\nsession.commit()",
)
COMMITTED_ERROR = Code(
    "WP211",
    "warning",
    "An error becomes a result, and half of the work is committed",
    "The session commits when the body returns, and it returns: writes before the error are committed.",
    "Raise, or catch only the errors of the work and call self.session.rollback() before the return; or "
    "TaskSession(db, commit=False). A lost connection that the body catches and rolls back is not replayed.",
    'try:\n    self.session.add(order)\n    charge(order)\nexcept ChargeError:\n    return {"status": "error"}',
)
CODES = (AUTORETRY, EARLY_MESSAGE, COMMITTED_ERROR)

_DATABASE_ERRORS = {
    f"{module}.{name}"
    for module in (
        "sqlalchemy.exc",
        "psycopg2",
        "psycopg2.errors",
        "psycopg",
        "django.db",
        "django.db.utils",
        "pymysql",
    )
    for name in ("OperationalError", "InterfaceError", "DBAPIError", "DatabaseError", "SQLAlchemyError")
}
_HTTP_ERRORS = {
    *(f"httpx.{name}" for name in ("HTTPError", "RequestError", "TransportError", "NetworkError", "ReadError")),
    *(f"httpx.{name}" for name in ("TimeoutException", "ReadTimeout", "RemoteProtocolError")),
    *(
        f"requests{module}.{name}"
        for module in ("", ".exceptions")
        for name in ("RequestException", "ConnectionError", "Timeout", "ReadTimeout")
    ),
}
_ANY = {"Exception", "BaseException", "builtins.Exception"}
_WRITES = {
    "add",
    "add_all",
    "bulk_insert_mappings",
    "bulk_save_objects",
    "bulk_update_mappings",
    "delete",
    "flush",
    "merge",
}
_SAVES = {"save", "bulk_create", "bulk_update", "get_or_create", "update_or_create"}
_QUERIES = {"objects", "filter", "exclude", "all"}
_SENDS = {"delay", "apply_async", "send_task"}
_CLIENT_LIBRARIES = ("aiohttp.", "boto3.", "botocore.", "httpx.", "niquests.", "requests.")

# Where a statement stands: for each block round it, the block and its place there.
_Path = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Event:
    kind: str
    session: str
    node: ast.Call
    path: _Path


def of_body(body: Body) -> Iterator[Finding]:
    """Yield what is wrong with a task's body."""
    yield from _retried(body)
    holds = _text_of(body.option("publish")) == "on_commit"
    own = {f"self.{name}" for name in body.sessions}
    for function in body.functions:
        if not holds:
            yield from _early(body.module, function, own)
        if own:
            yield from _swallowed(body, function, own)


def of_module(module: Module) -> Iterator[Finding]:
    """Yield what is wrong with the blocks of transactions anywhere in a module."""
    for function in module.defined:
        if any(module.dotted(_named(each)) == "django.db.transaction.atomic" for each in function.decorator_list):
            yield from _sent_in(module, function.body, f"{function.name}(), which is one transaction")
        for node in nodes_of(function, nested=False):
            if isinstance(node, ast.With | ast.AsyncWith):
                block = next(filter(None, (_transaction(module, function, item) for item in node.items)), None)
                if block is not None:
                    yield from _sent_in(module, node.body, f"the block of {block}")


def _text_of(option: tuple[Module, ast.expr] | None) -> object:
    return option[1].value if option is not None and isinstance(option[1], ast.Constant) else None


def _named(node: ast.expr) -> ast.expr:
    return node.func if isinstance(node, ast.Call) else node


def _transaction(module: Module, function: Function, item: ast.withitem) -> str | None:
    called = item.context_expr
    if not isinstance(called, ast.Call):
        return None
    if module.called(called, function) == "django.db.transaction.atomic":
        return "transaction.atomic()"
    if isinstance(called.func, ast.Attribute) and called.func.attr == "begin":
        owner = called.func.value
        if _is_session(module, function, owner) or last(owner).lower().endswith(("engine", "sessionlocal")):
            return f"{ast.unparse(called.func)}()"
    return None


def _sent_in(module: Module, block: list[ast.stmt], where: str) -> Iterator[Finding]:
    wrote = False
    for statement in block:
        for node in (statement, *nodes_of(statement, nested=False)):
            wrote = wrote or _may_write(node)
            # What reads alone may as well send: the message says nothing that is not there yet.
            if wrote and _sends(node):
                yield EARLY_MESSAGE.at(
                    module.place(node), f"{_shown(node)}() in {where}: the message leaves before the commit"
                )


def _may_write(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    name, owner = node.func.attr, last(node.func.value).lower()
    if name in _WRITES and (owner == "s" or owner.endswith("session")):
        return True
    if name in ("update", "delete", "create"):
        # Of a query set: dictionaries and clients have such methods, too.
        return bool({last(part) for part in nodes_of(node.func) if isinstance(part, ast.Attribute)} & _QUERIES)
    return name in _SAVES or (name == "execute" and not _reads(node))


def _shown(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def _sends(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SENDS


def _is_session(module: Module, function: Function, node: ast.expr) -> bool:
    """Whether a name is that of a database session: there is no other proof in the source."""
    name = last(node).lower()
    if name not in ("session", "db_session", "dbsession", "sess") and not name.endswith("_session"):
        return False
    if "http" in name or "boto" in name:
        return False
    made = {
        module.called(each.value, function)
        for each in nodes_of(function)
        if isinstance(each, ast.Assign) and any(last(target) == last(node) for target in each.targets)
    }
    made |= {
        module.called(each.context_expr, function)
        for each in nodes_of(function)
        if isinstance(each, ast.withitem) and each.optional_vars is not None and last(each.optional_vars) == last(node)
    }
    made.add(module.project.constructor(module.dotted(node, function)))
    return not any(each.startswith(_CLIENT_LIBRARIES) for each in made)


def _events(module: Module, function: Function) -> list[_Event]:
    """Return what a function does with sessions and messages, with the place of each in its blocks."""
    found: list[_Event] = []

    def visit(block: list[ast.stmt], path: _Path) -> None:
        for number, statement in enumerate(block):
            here = (*path, (id(block), number))
            inner: list[list[ast.stmt]] = []
            for name in ("body", "orelse", "finalbody"):
                inner += [getattr(statement, name, None) or []]
            inner += [handler.body for handler in getattr(statement, "handlers", ())]
            inner += [case.body for case in getattr(statement, "cases", ())]
            if is_function(statement) or isinstance(statement, ast.ClassDef):
                continue
            below = {id(each) for part in inner for each in part}
            look(statement, here, below)
            for part in inner:
                visit(part, here)

    def look(node: ast.AST, path: _Path, below: set[int]) -> None:
        for child in ast.iter_child_nodes(node):
            if id(child) in below or isinstance(child, ast.Lambda | ast.ExceptHandler) or is_function(child):
                continue
            look(child, path, below)
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute):
                kind = _kind(module, function, child, child.func)
                if kind is not None:
                    found.append(_Event(kind, ast.unparse(child.func.value), child, path))

    visit(function.body, ())
    return found


def _kind(module: Module, function: Function, call: ast.Call, named: ast.Attribute) -> str | None:
    if named.attr in _SENDS:
        return "send"
    if named.attr not in ("commit", "rollback", "execute") and named.attr not in _WRITES:
        return None
    if not _is_session(module, function, named.value):
        return None
    if named.attr in ("commit", "rollback"):
        return named.attr
    return None if named.attr == "execute" and _reads(call) else "write"


def _reads(call: ast.Call) -> bool:
    """Whether a statement surely begins with SELECT, or is not known: then it is not claimed to write."""
    texts = [
        node.value.lstrip().upper()
        for node in nodes_of(call)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    if any(text.startswith(("INSERT", "UPDATE", "DELETE", "MERGE")) for text in texts):
        return False
    made = {last(node.func) for node in nodes_of(call) if isinstance(node, ast.Call)}
    return not made & {"insert", "update", "delete", "values"}


def _before(one: _Path, other: _Path) -> bool:
    """Whether the first place is passed before the second one, and not instead of it."""
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            return mine[0] == theirs[0] and mine[1] < theirs[1]
    return False


def _early(module: Module, function: Function, own: set[str]) -> Iterator[Finding]:
    events = _events(module, function)
    for sent in (each for each in events if each.kind == "send"):
        if _shown(sent.node).startswith(("self.retry", "self.replace")):
            continue
        for write in (each for each in events if each.kind == "write" and _before(each.path, sent.path)):
            same = [each for each in events if each.session == write.session]
            ended = any(
                each.kind in ("commit", "rollback") and write.node.lineno <= each.node.lineno <= sent.node.lineno
                for each in same
            )
            commit = next((each for each in same if each.kind == "commit" and _before(sent.path, each.path)), None)
            if ended or (commit is None and write.session not in own):
                continue
            when = f"{write.session}.commit() on line {commit.node.lineno}" if commit else "the body's end commits"
            yield EARLY_MESSAGE.at(
                module.place(sent.node),
                f"{_shown(sent.node)}() between {_shown(write.node)}() on line {write.node.lineno} and "
                + (when if commit else f"the commit of {write.session} at the body's end"),
            )
            break


def _swallowed(body: Body, function: Function, own: set[str]) -> Iterator[Finding]:
    module = body.module
    events = _events(module, function)
    for node in nodes_of(function, nested=False):
        if not isinstance(node, ast.Try) or any(_savepoint(each) for each in node.body):
            continue
        inside = {id(each) for statement in node.body for each in (statement, *nodes_of(statement))}
        writes = [each for each in events if each.kind == "write" and each.session in own]
        writes = [each for each in writes if id(each.node) in inside or each.node.lineno < node.lineno]
        if not writes:
            continue
        for handler in node.handlers:
            ends = handler.body[-1]
            rolled_back = any(
                isinstance(each, ast.Raise) or (isinstance(each, ast.Call) and last(each.func) in ("rollback", "retry"))
                for statement in handler.body
                for each in (statement, *nodes_of(statement))
            )
            committed = any(
                each.kind == "commit" and each.session in own and writes[-1].node.lineno < each.node.lineno
                for each in events
                if each.node.lineno < handler.lineno
            )
            if isinstance(ends, ast.Return) and not rolled_back and not committed:
                what = f"the task {body.name} returns after an error, and {_shown(writes[-1].node)}() is committed"
                yield COMMITTED_ERROR.at(module.place(ends), what)


def _savepoint(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.With) and any(
        isinstance(item.context_expr, ast.Call) and last(item.context_expr.func) == "begin_nested"
        for item in statement.items
    )


def _retried(body: Body) -> Iterator[Finding]:
    option = body.option("autoretry_for")
    if option is None or body.is_true("idempotent"):
        return
    module, errors = option
    for error in errors.elts if isinstance(errors, ast.Tuple | ast.List) else ():
        dotted = module.dotted(error)
        if dotted in _DATABASE_ERRORS:
            what = "which a lost COMMIT raises"
        elif dotted in _HTTP_ERRORS and _posts(body):
            what = "which a POST raises that the server has answered"
        elif dotted in _ANY and (_posts(body) or _commits(body)):
            what = "and it writes"
        else:
            continue
        yield AUTORETRY.at(module.place(error), f"the task {body.name} runs again after {last(error)}, {what}")


def _posts(body: Body) -> bool:
    for function, call in body.calls():
        called = body.module.called(call, function)
        verb = last(call.func)
        if verb in ("post", "patch") and "Idempotency-Key" not in ast.unparse(call):
            if called.startswith(("requests.", "httpx.")):
                return True
            owner = call.func.value if isinstance(call.func, ast.Attribute) else None
            made = body.module.project.constructor(body.module.dotted(owner, function)) if owner is not None else ""
            if made.startswith(("requests.", "httpx.")):
                return True
    return False


def _commits(body: Body) -> bool:
    events = (each for function in body.functions for each in _events(body.module, function))
    own = {f"self.{name}" for name in body.sessions}
    return any(each.kind == "commit" or (each.kind == "write" and each.session in own) for each in events)
