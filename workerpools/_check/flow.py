"""What functions do to database sessions, and which messages they send, in the order of the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace

from workerpools._check.bodies import is_task
from workerpools._check.meanings import Frame, Loaded, Meaning, Session, yielded
from workerpools._check.syntax import Module, is_function, last, nodes_of

__all__ = ["DEPTH", "Event", "before", "events_of", "shown"]

#: How many calls deep functions of the project are followed.
DEPTH = 3

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
_STATEMENTS = {"insert", "update", "delete", "values"}
_TEXTS = ("INSERT ", "UPDATE ", "DELETE ", "MERGE ")


@dataclass(frozen=True)
class Step:
    """Where a statement stands in one block.

    Attributes:
        block: The block; 0 where a call is entered.
        number: The statement's place there.
        ends: Whether what follows the block is passed by: it ends with a return or the like.
    """

    block: int
    number: int
    ends: bool = False


Path = tuple[Step, ...]


@dataclass(frozen=True)
class Event:
    """Something that a function does, by itself or by a function that it calls.

    Attributes:
        kind: ``write``, ``save`` (by another way than a session), ``commit``, ``rollback``, ``unknown`` (a call that
            may end transactions), ``send``, or ``yield``.
        session: The session; None where that is not known, or where there is none.
        module: Where it stands.
        node: What does it.
        path: The blocks round it.
        at: Where the function that was asked for does it: the call, where another function does it.
    """

    kind: str
    session: Session | None
    module: Module
    node: ast.expr
    path: Path
    at: ast.expr

    def place(self, module: Module) -> str:
        """Return where it stands, for a message about a module."""
        return f"on line {self.node.lineno}" if module is self.module else f"in {self.module.place(self.node)}"


def before(one: Event, other: Event) -> bool:
    """Return whether the first event always precedes the second one where both happen, and is not an alternative."""
    for place, (mine, theirs) in enumerate(zip(one.path, other.path, strict=False)):
        if mine != theirs:
            if mine.block != theirs.block or mine.number >= theirs.number:
                return False
            for inner in one.path[place + 1 :]:
                if not inner.block:
                    break
                if inner.ends:
                    return False
            return True
    return False


def shown(node: ast.expr) -> str:
    """Return what an event does, for messages: ``session.add()``, ``order.status = …``."""
    return f"{ast.unparse(node.func)}()" if isinstance(node, ast.Call) else f"{ast.unparse(node)} = …"


def events_of(frame: Frame, depth: int = DEPTH) -> list[Event]:
    """Return what a function does, in the order of the source.

    Args:
        frame: The function, and what its parameters are.
        depth: How many calls deep other functions are followed.
    """
    key = (frame.function, depth, frame.task, frozenset(frame.given.items()))
    found = frame.module.project.events.get(key)
    if found is None:
        found = frame.module.project.events[key] = _Visit(frame, depth).events
    return found


class _Visit:
    """One walk through a function."""

    def __init__(self, frame: Frame, depth: int) -> None:
        self._frame, self._depth = frame, depth
        self.events: list[Event] = []
        self._block(frame.function.body, ())

    def _block(self, block: list[ast.stmt], path: Path) -> None:
        ends = isinstance(block[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)
        for number, statement in enumerate(block):
            if is_function(statement) or isinstance(statement, ast.ClassDef):
                continue
            here = (*path, Step(id(block), number, ends))
            inner = [each for each in _blocks(statement) if each]
            self._look(statement, here, {id(each) for part in inner for each in part})
            for part in inner:
                self._block(part, here)
            if isinstance(statement, ast.With | ast.AsyncWith):
                after = (*here, Step(id(statement.body), len(statement.body)))
                for item in reversed(statement.items):
                    self.events += self._left(item, after)

    def _look(self, node: ast.AST, path: Path, below: set[int]) -> None:
        for child in ast.iter_child_nodes(node):
            if id(child) in below or isinstance(child, ast.Lambda | ast.ExceptHandler) or is_function(child):
                continue
            self._look(child, path, below)
            if isinstance(child, ast.Call):
                self.events += self._call(child, path)
            elif isinstance(child, ast.Yield):
                self.events.append(self._event("yield", None, child, path))
            elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
                self.events += self._changed(child, child.value, child.attr, path)

    def _event(self, kind: str, session: Session | None, node: ast.expr, path: Path) -> Event:
        return Event(kind, session, self._frame.module, node, path, node)

    def _changed(self, node: ast.expr, owner: ast.expr, attribute: str, path: Path) -> Iterator[Event]:
        loaded = self._frame.meaning(owner)
        if isinstance(loaded, Loaded) and loaded.has(self._frame.module.project, attribute):
            yield self._event("write", loaded.session, node, path)

    def _call(self, call: ast.Call, path: Path) -> Iterator[Event]:
        if last(call.func) == "setattr" and len(call.args) == 3:
            name = call.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield from self._changed(call, call.args[0], name.value, path)
            return
        kind, session = self._method(call, call.func) if isinstance(call.func, ast.Attribute) else (None, None)
        if kind is not None:
            yield self._event(kind, session, call, path)
        elif session is None:
            yield from self._function(call, path)

    def _method(self, call: ast.Call, named: ast.Attribute) -> tuple[str | None, Session | None]:
        """Return what a method does, and to which session."""
        name = named.attr
        if name in _SENDS:
            return "send", None
        meaning = self._frame.meaning(named.value)
        writes = name == "execute" and self._writes(call)
        if isinstance(meaning, Loaded):
            return ("write" if meaning.query and name in ("update", "delete") else None), meaning.session
        if isinstance(meaning, Session):
            if name in ("commit", "rollback"):
                return name, meaning
            if name in ("close", "expunge", "expunge_all", "reset"):
                return "unknown", meaning
            return ("write" if writes or name in _WRITES else None), meaning
        if name in ("commit", "rollback"):
            # Of something that may have the session: a unit of work, a repository.
            return "unknown", None
        return ("save" if writes or _saves(named) else None), None

    def _writes(self, call: ast.Call) -> bool:
        """Whether a statement surely writes: what is not known is not claimed to."""
        frame = self._frame
        for given in [each for first in call.args[:1] for each in frame.values(first) or [first]]:
            for node in (given, *nodes_of(given)):
                if isinstance(node, ast.Call):
                    called = frame.module.called(node, frame.function).rpartition(".")[2]
                    if {last(node.func), called} & _STATEMENTS:
                        return True
            text = given.args[0] if isinstance(given, ast.Call) and given.args else given
            first = text.values[0] if isinstance(text, ast.JoinedStr) and text.values else text
            words = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
            if " ".join(words.upper().split()).startswith(_TEXTS):
                return True
        return False

    def _function(self, call: ast.Call, path: Path) -> Iterator[Event]:
        """Yield what a called function does; ``unknown`` if it is not followed and may end a transaction."""
        frame = self._frame
        callee, inner, managed = frame.callee(call), frame.entered(call), frame.managed(call)
        if inner is not None and self._depth:
            yield from self._followed(events_of(inner, self._depth - 1), call, path)
        elif managed is not None and self._depth:
            yield from self._followed(self._halves(managed, frame.meaning(call))[0], call, path)
        elif callee is not None and not is_task(*callee):
            yield self._event("unknown", None, call, path)
        elif callee is None:
            given = [frame.meaning(each) for each in (*call.args, *(each.value for each in call.keywords))]
            for session in dict.fromkeys(each for each in given if isinstance(each, Session)):
                yield self._event("unknown", session, call, path)

    def _followed(self, events: list[Event], call: ast.Call, path: Path) -> Iterator[Event]:
        yield from (replace(each, path=(*path, Step(0, 0), *each.path), at=call) for each in events)

    def _left(self, item: ast.withitem, path: Path) -> Iterator[Event]:
        """Yield what is done when the block of a ``with`` statement has ended without an error."""
        frame, call = self._frame, item.context_expr
        if not isinstance(call, ast.Call) or not self._depth:
            return
        given = frame.meaning(item.optional_vars) or frame.meaning(call)
        managed, manager = frame.managed(call), frame.manager(call)
        if managed is not None:
            yield from self._followed(self._halves(managed, given)[1], call, path)
        elif manager is not None and isinstance(given, Session):
            _, leave, session = manager
            for each in nodes_of(leave.function):
                if isinstance(each, ast.Call) and ast.unparse(each.func) == f"{ast.unparse(session)}.commit":
                    yield Event("commit", given, leave.module, each, path, call)
        elif isinstance(call.func, ast.Attribute) and call.func.attr == "begin":
            begun = frame.meaning(call.func.value) or given
            if isinstance(begun, Session):
                yield self._event("commit", begun, call, path)

    def _halves(self, manager: Frame, given: Meaning | None) -> tuple[list[Event], list[Event]]:
        """Return what a context manager does before its block, and what after one without an error.

        Args:
            manager: The generator.
            given: What the block gets, as the caller knows it.
        """
        events = events_of(manager, self._depth - 1)
        session = manager.meaning(yielded(manager.function))
        handlers = {
            id(each)
            for handler in nodes_of(manager.function)
            if isinstance(handler, ast.ExceptHandler)
            for each in nodes_of(handler)
        }
        seen = [
            replace(each, session=given)
            if isinstance(session, Session) and each.session == session and isinstance(given, Session)
            else each
            for each in events
            if id(each.at) not in handlers
        ]
        place = next((number for number, each in enumerate(seen) if each.kind == "yield"), len(seen))
        return seen[:place], seen[place + 1 :]


def _saves(named: ast.Attribute) -> bool:
    """Whether a method writes by another way than a session that is known."""
    if named.attr in ("update", "delete", "create"):
        # Of a query set: dictionaries and clients have such methods, too.
        return bool({last(part) for part in nodes_of(named) if isinstance(part, ast.Attribute)} & _QUERIES)
    return named.attr in _SAVES or (named.attr in _WRITES and last(named.value) == "s")


def _blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        yield getattr(statement, name, None) or []
    yield from (handler.body for handler in getattr(statement, "handlers", ()))
    yield from (case.body for case in getattr(statement, "cases", ()))
