"""Transactions in the source: messages before the commit, errors that commit, retries that run twice."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

from workerpools._check.bodies import Body
from workerpools._check.findings import Code, Finding
from workerpools._check.flow import DEPTH, before, events_of, shown
from workerpools._check.meanings import Frame, Session, frame_of
from workerpools._check.syntax import Function, Module, last, nodes_of

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


def of_body(body: Body) -> Iterator[Finding]:
    """Yield what is wrong with a task's body."""
    yield from _retried(body)
    holds = _text_of(body.option("publish")) == "on_commit"
    for module, function in body.functions if not holds else ():
        yield from _early(frame_of(body, module, function))
    yield from _swallowed(body, frame_of(body, body.module, body.function), DEPTH)


def of_module(module: Module) -> Iterator[Finding]:
    """Yield what is wrong with the blocks of transactions anywhere in a module."""
    for function in module.defined:
        frame = Frame(module, function)
        if any(module.dotted(_named(each)) == "django.db.transaction.atomic" for each in function.decorator_list):
            yield from _sent_in(frame, function, f"{function.name}(), which is one transaction")
        for node in nodes_of(function, nested=False):
            if isinstance(node, ast.With | ast.AsyncWith):
                block = next(filter(None, (_transaction(frame, item) for item in node.items)), None)
                if block is not None:
                    yield from _sent_in(frame, node, f"the block of {block}")


def _text_of(option: tuple[Module, ast.expr] | None) -> object:
    return option[1].value if option is not None and isinstance(option[1], ast.Constant) else None


def _named(node: ast.expr) -> ast.expr:
    return node.func if isinstance(node, ast.Call) else node


def _transaction(frame: Frame, item: ast.withitem) -> str | None:
    called = item.context_expr
    if not isinstance(called, ast.Call):
        return None
    if frame.module.called(called, frame.function) == "django.db.transaction.atomic":
        return "transaction.atomic()"
    if isinstance(called.func, ast.Attribute) and called.func.attr == "begin":
        owner = called.func.value
        known = isinstance(frame.meaning(owner), Session) or isinstance(frame.meaning(called), Session)
        if known or last(owner).lower().endswith(("engine", "sessionlocal")):
            return f"{ast.unparse(called.func)}()"
    return None


def _sent_in(frame: Frame, block: ast.With | ast.AsyncWith | Function, where: str) -> Iterator[Finding]:
    inside = _inside(block.body)
    events = [each for each in events_of(frame) if id(each.at) in inside]
    for sent in (each for each in events if each.kind == "send"):
        # What reads alone may as well send: the message says nothing that is not there yet.
        if any(each.kind in ("write", "save") and before(each, sent) for each in events):
            yield EARLY_MESSAGE.at(
                sent.module.place(sent.node), f"{shown(sent.node)} in {where}: the message leaves before the commit"
            )


def _early(frame: Frame) -> Iterator[Finding]:
    events = events_of(frame)
    for number, sent in enumerate(events):
        if sent.kind != "send" or shown(sent.node).startswith(("self.retry", "self.replace")):
            continue
        for place, write in enumerate(events[:number]):
            session = write.session
            if write.kind != "write" or session is None or not before(write, sent):
                continue
            ended = any(
                each.kind in ("commit", "rollback", "unknown") and each.session in (session, None)
                for each in events[place:number]
            )
            commit = next(
                (
                    each
                    for each in events[number:]
                    if each.kind == "commit" and each.session == session and before(sent, each)
                ),
                None,
            )
            if ended or (commit is None and not session.own):
                continue
            told = f"{shown(sent.node)} between {shown(write.node)} {write.place(sent.module)} and "
            if commit is not None:
                told += f"{shown(commit.node)} {commit.place(sent.module)}"
            else:
                told += f"the commit of {'.'.join(session.key.split('.')[-2:])} at the body's end"
            yield EARLY_MESSAGE.at(sent.module.place(sent.node), told)
            break


def _swallowed(body: Body, frame: Frame, depth: int) -> Iterator[Finding]:
    events = events_of(frame, depth)
    for node in nodes_of(frame.function, nested=False):
        inner = _ends_with(node, frame.function)
        followed = frame.entered(inner) if inner is not None and depth else None
        if followed is not None:
            yield from _swallowed(body, followed, depth - 1)
        if not isinstance(node, ast.Try) or any(_savepoint(each) for each in node.body):
            continue
        inside = _inside(node.body)
        writes = [each for each in events if each.kind == "write" and each.session is not None and each.session.own]
        writes = [each for each in writes if id(each.at) in inside or each.at.lineno < node.lineno]
        if not writes:
            continue
        for handler in node.handlers:
            nodes = _inside(handler.body)
            answered = any(
                isinstance(each, ast.Raise) or (isinstance(each, ast.Call) and last(each.func) in ("rollback", "retry"))
                for each in nodes.values()
            )
            # Who writes there knows that it is committed.
            answered |= any(id(each.at) in nodes and each.kind not in ("save", "send") for each in events)
            committed = any(
                each.kind == "commit" and each.session == writes[-1].session and writes[-1].at.lineno < each.at.lineno
                for each in events
                if each.at.lineno < handler.lineno
            )
            if isinstance(handler.body[-1], ast.Return) and not answered and not committed:
                what = f"the task {body.name} returns after an error, and {shown(writes[-1].node)} is committed"
                yield COMMITTED_ERROR.at(frame.module.place(handler.body[-1]), what)


def _inside(block: list[ast.stmt]) -> dict[int, ast.AST]:
    return {id(each): each for statement in block for each in (statement, *nodes_of(statement))}


def _ends_with(statement: ast.AST, function: Function) -> ast.Call | None:
    """Return the call of a function whose return is not looked at, or is the caller's own."""
    value = statement.value if isinstance(statement, ast.Expr | ast.Return) else None
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call | ast.Await):
        value = statement.value if all(_returned(each, function) for each in statement.targets) else None
    value = value.value if isinstance(value, ast.Await) else value
    return value if isinstance(value, ast.Call) else None


_nodes_of = functools.lru_cache(maxsize=64)(nodes_of)


def _returned(name: ast.expr, function: Function) -> bool:
    """Whether a function returns what it gives a name to, and does nothing else with it."""
    nodes = _nodes_of(function)
    returned = {id(each.value) for each in nodes if isinstance(each, ast.Return)}
    return isinstance(name, ast.Name) and all(
        id(each) in returned
        for each in nodes
        if isinstance(each, ast.Name) and each.id == name.id and isinstance(each.ctx, ast.Load)
    )


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
    for module, function, call in body.calls():
        called = module.called(call, function)
        verb = last(call.func)
        if verb in ("post", "patch") and "Idempotency-Key" not in ast.unparse(call):
            if called.startswith(("requests.", "httpx.")):
                return True
            owner = call.func.value if isinstance(call.func, ast.Attribute) else None
            made = module.project.constructor(module.dotted(owner, function)) if owner is not None else ""
            if made.startswith(("requests.", "httpx.")):
                return True
    return False


def _commits(body: Body) -> bool:
    events = (each for function in body.functions for each in events_of(frame_of(body, *function)))
    return any(
        each.kind == "commit" or (each.kind == "write" and each.session is not None and each.session.own)
        for each in events
    )
