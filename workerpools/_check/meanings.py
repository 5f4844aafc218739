"""What an expression is where it stands: a task's session, what a session has loaded, the task itself."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from workerpools._check.bodies import Body, commits, is_task, method, sessions_of
from workerpools._check.syntax import Function, Module, Project, last, nodes_of, targets

__all__ = ["Frame", "Loaded", "Meaning", "Session", "Task", "frame_of", "yielded"]

_SESSION_CLASSES = {
    "sqlalchemy.ext.asyncio.AsyncSession",
    "sqlalchemy.orm.Session",
    "sqlalchemy.orm.session.Session",
    "sqlmodel.Session",
}
_FACTORIES = {
    "sqlalchemy.ext.asyncio.async_sessionmaker",
    "sqlalchemy.orm.scoped_session",
    "sqlalchemy.orm.session.sessionmaker",
    "sqlalchemy.orm.sessionmaker",
}
_CLIENT_LIBRARIES = ("aiohttp.", "boto3.", "botocore.", "httpx.", "niquests.", "requests.")
_LOADS = {"execute", "get", "get_one", "merge", "query", "scalar", "scalars"}
#: What ends a query or takes the objects out of a result.
_TAKES = {
    *("all", "fetchall", "fetchone", "first", "get", "one", "one_or_none", "scalar", "scalar_one"),
    *("scalar_one_or_none", "scalars", "unique"),
}
_MANAGERS = {"contextlib.asynccontextmanager", "contextlib.contextmanager"}
_DETACHES = {"expunge", "expunge_all", "make_transient"}


@dataclass(frozen=True)
class Session:
    """A database session.

    Attributes:
        key: The same for the same session.
        own: Whether it is a run's, which commits when the body returns.
    """

    key: str
    own: bool = False


@dataclass(frozen=True)
class Loaded:
    """What a session has loaded, or a query of it.

    Attributes:
        session: The session.
        query: Whether it is a query still.
        model: The name of the class; empty if it is not known.
    """

    session: Session
    query: bool
    model: str

    def has(self, project: Project, attribute: str) -> bool:
        """Return whether an attribute may be a column's: the class says so, or is not the project's."""
        if self.query or attribute.startswith("_"):
            return False
        class_ = project.class_(self.model)
        return class_ is None or attribute in {
            last(target)
            for each in project.ancestors(*class_)
            if isinstance(each, tuple)
            for node in each[1].body
            for target in targets(node)
        }


@dataclass(frozen=True)
class Task:
    """A task, which its body knows as ``self``.

    Attributes:
        sessions: The attributes that are sessions which commit when the body returns, and the key of each.
        classes: Its class and those that it inherits from, as far as they are the project's.
    """

    sessions: tuple[tuple[str, str], ...]
    classes: tuple[tuple[Module, ast.ClassDef], ...]


Meaning = Session | Loaded | Task


@dataclass(frozen=True)
class Frame:
    """A function, and what is known of where it is called.

    Attributes:
        module: The function's module.
        function: The function.
        task: The task that runs; None outside of bodies.
        given: What its parameters are.
    """

    module: Module
    function: Function
    task: Task | None = None
    given: Mapping[str, Meaning] = field(default_factory=dict)

    def meaning(self, node: ast.AST | None) -> Meaning | None:
        """Return what an expression is; None if it is nothing of the kind, or not known."""
        return self._meaning(node, frozenset())

    def _meaning(self, node: ast.AST | None, seen: frozenset[str]) -> Meaning | None:
        if isinstance(node, ast.Await | ast.NamedExpr):
            return self._meaning(node.value, seen)
        if isinstance(node, ast.Name):
            return self._named(node, seen) if node.id not in seen else None
        if isinstance(node, ast.Attribute):
            return self._attribute(node, seen)
        if isinstance(node, ast.Subscript):
            loaded = self._meaning(node.value, seen)
            return Loaded(loaded.session, False, loaded.model) if isinstance(loaded, Loaded) else None
        return self._call(node, seen) if isinstance(node, ast.Call) else None

    def _named(self, node: ast.Name, seen: frozenset[str]) -> Meaning | None:
        name = node.id
        if name not in self.module.locals_of(self.function):
            dotted = self.module.dotted(node, self.function)
            known = _is_session_name(name) and not self.module.project.constructor(dotted).startswith(_CLIENT_LIBRARIES)
            return Session(dotted) if known else None
        values, iterated = self.values(node), _iterated(self.function).get(name, [])
        parameter = next((each for each in _parameters(self.function) if each[0].arg == name), None)
        if parameter is not None and not values and not iterated:
            if name in self.given:
                return self.given[name]
            argument, default = parameter
            if isinstance(default, ast.Call) and last(default.func) == "inject":
                return self._handle(default.func)
            if argument.annotation is not None and self.module.dotted(argument.annotation).startswith(
                _CLIENT_LIBRARIES
            ):
                return None
        found = [self._meaning(each, seen | {name}) for each in values]
        for each in iterated:
            loaded = self._meaning(each, seen | {name})
            found.append(Loaded(loaded.session, False, loaded.model) if isinstance(loaded, Loaded) else None)
        if found and None not in found and len({*found}) == 1 and parameter is None:
            return found[0]
        some = bool(found) and all(isinstance(each, Session) and not each.own for each in found)
        clients = any(self.module.called(each, self.function).startswith(_CLIENT_LIBRARIES) for each in values)
        some = some or (_is_session_name(name) and not clients)
        return Session(f"{id(self.function)} {name}") if some else None

    def values(self, node: ast.expr) -> list[ast.expr]:
        """Return what the function assigns to a name; None is not counted."""
        return _assigned(self.function).get(node.id, []) if isinstance(node, ast.Name) else []

    def _attribute(self, node: ast.Attribute, seen: frozenset[str]) -> Meaning | None:
        owner = self._meaning(node.value, seen)
        own = dict(owner.sessions) if isinstance(owner, Task) else {}
        if node.attr in own:
            return Session(own[node.attr], own=True)
        if isinstance(owner, Session | Loaded) or not _is_session_name(node.attr):
            return None
        made = {
            self.module.called(each.value, self.function)
            for each in nodes_of(self.function)
            if isinstance(each, ast.Assign) and any(last(target) == node.attr for target in each.targets)
        }
        made.add(self.module.project.constructor(self.module.dotted(node, self.function)))
        known = not any(each.startswith(_CLIENT_LIBRARIES) for each in made)
        return Session(self.module.dotted(node, self.function) or ast.unparse(node)) if known else None

    def _call(self, call: ast.Call, seen: frozenset[str]) -> Meaning | None:
        called = self.module.called(call, self.function)
        if called.startswith("workerpools.") and called.endswith(".current_session"):
            own = [key for _, key in self.task.sessions] if self.task is not None else []
            return Session(own[0] if len(own) == 1 else "current_session()", own=True) if own else None
        named = call.func
        factory = isinstance(named, ast.Attribute) and named.attr == "begin"
        if self._makes_sessions(named.value if factory and isinstance(named, ast.Attribute) else named):
            return Session(f"{id(call)}")
        entered = self._given_by(call, seen)
        if entered is not None:
            return entered
        if not isinstance(named, ast.Attribute):
            return None
        if named.attr == "get" and not call.args and not call.keywords:
            return self._handle(named)
        owner = self._meaning(named.value, seen)
        if isinstance(owner, Session) and named.attr in _LOADS and not self._detaches:
            model = self._model(call)
            return Loaded(owner, named.attr == "query", model)
        if isinstance(owner, Loaded) and (owner.query or named.attr in _TAKES):
            return Loaded(owner.session, owner.query and named.attr not in _TAKES, owner.model)
        return None

    def _makes_sessions(self, node: ast.expr) -> bool:
        dotted = self.module.dotted(node, self.function)
        return dotted in _SESSION_CLASSES or self.module.project.constructor(dotted) in _FACTORIES

    @property
    def _detaches(self) -> bool:
        return any(isinstance(each, ast.Call) and last(each.func) in _DETACHES for each in nodes_of(self.function))

    def _model(self, call: ast.Call) -> str:
        if not call.args:
            return ""
        first = call.args[0]
        selects = (
            each for each in (first, *nodes_of(first)) if isinstance(each, ast.Call) and last(each.func) == "select"
        )
        chosen = next((each.args[0] for each in selects if each.args), first)
        return self.module.dotted(chosen, self.function)

    def _handle(self, named: ast.expr) -> Session | None:
        """Return the session of ``ShopTask.session.get`` or ``….inject``, or of a ``TaskSession`` of a module."""
        if not isinstance(named, ast.Attribute):
            return None
        project, dotted = self.module.project, self.module.dotted(named.value, self.function)
        class_, _, attribute = dotted.rpartition(".")
        found = project.class_(class_)
        key = sessions_of(project, found or class_).get(attribute)
        if key is None and (made := project.value(dotted)) is not None:
            key = dotted if isinstance(made[1], ast.Call) and commits(made[0], made[1]) else None
        return Session(key, own=True) if key is not None else None

    def callee(self, call: ast.Call) -> tuple[Module, Function] | None:
        """Return the function of the project that is called; None for anything else."""
        return self._callee(call, frozenset())

    def _callee(self, call: ast.Call, seen: frozenset[str]) -> tuple[Module, Function] | None:
        found = self.module.project.function(self.module.dotted(call.func, self.function))
        if found is None and isinstance(call.func, ast.Attribute):
            owner = self._meaning(call.func.value, seen)
            found = method(owner.classes, call.func.attr) if isinstance(owner, Task) else None
        return found

    def entered(self, call: ast.Call) -> Frame | None:
        """Return the function that is called, with what it is given; None if it is not known what the call does."""
        callee = self.callee(call)
        return None if callee is None or is_task(*callee) or not _is_plain(callee[1]) else self._frame(callee, call)

    def managed(self, call: ast.Call) -> Frame | None:
        """Return the generator of a context manager, with what it is given; None if the call makes none."""
        callee = self.callee(call)
        return None if callee is None or not _is_manager(*callee) else self._frame(callee, call)

    def manager(self, call: ast.Call) -> tuple[Frame, Frame, ast.expr] | None:
        """Return both methods of a context manager's class, and the session that a block gets; None if it gets none."""
        project = self.module.project
        class_ = project.class_(self.module.called(call, self.function))
        if class_ is None or id(class_[1]) in project.entering:
            return None
        classes = [each for each in project.ancestors(*class_) if isinstance(each, tuple)]
        methods = [
            next(filter(None, (method(classes, f"__{prefix}{name}__") for prefix in ("", "a"))), None)
            for name in ("enter", "exit")
        ]
        if methods[0] is None or methods[1] is None:
            return None
        enter, leave = Frame(*methods[0], self.task), Frame(*methods[1], self.task)
        project.entering.add(id(class_[1]))
        try:
            for node in nodes_of(enter.function, nested=False):
                value = node.value if isinstance(node, ast.Return) else None
                if value is not None and (isinstance(enter.meaning(value), Session) or enter._assigns_session(value)):
                    return enter, leave, value
        finally:
            project.entering.remove(id(class_[1]))
        return None

    def _assigns_session(self, attribute: ast.expr) -> bool:
        name = ast.unparse(attribute)
        values = [
            each.value
            for each in nodes_of(self.function)
            if isinstance(each, ast.Assign) and name in map(ast.unparse, each.targets)
        ]
        return bool(values) and all(isinstance(self.meaning(each), Session) for each in values)

    def _given_by(self, call: ast.Call, seen: frozenset[str]) -> Meaning | None:
        """Return what the block of a ``with`` statement gets, if a context manager of the project makes it."""
        owner = getattr(call.func, "value", None)
        if isinstance(owner, ast.Call | ast.Await | ast.Subscript):
            # What a call gives has no context managers that are known; and to ask costs twice as much at each dot.
            return None
        project, callee = self.module.project, self._callee(call, seen)
        if callee is None:
            return Session(f"{id(call)}") if self.manager(call) is not None else None
        if not _is_manager(*callee) or id(callee[1]) in project.entering:
            return None
        project.entering.add(id(callee[1]))
        try:
            inner = self._frame(callee, call, seen)
            found = inner.meaning(yielded(inner.function))
        finally:
            project.entering.remove(id(callee[1]))
        theirs = isinstance(found, Session) and (found.own or found in inner.given.values())
        return Session(f"{id(call)}") if isinstance(found, Session) and not theirs else found

    def _frame(self, callee: tuple[Module, Function], call: ast.Call, seen: frozenset[str] = frozenset()) -> Frame:
        parameters = [each.arg for each, _ in _parameters(callee[1])]
        given: dict[str, Meaning | None] = {}
        if isinstance(call.func, ast.Attribute) and parameters[:1] == ["self"]:
            given[parameters.pop(0)] = self._meaning(call.func.value, seen)
        for name, argument in zip(parameters, call.args, strict=False):
            if isinstance(argument, ast.Starred):
                break
            given[name] = self._meaning(argument, seen)
        given.update({each.arg: self._meaning(each.value, seen) for each in call.keywords if each.arg in parameters})
        return Frame(*callee, self.task, {name: each for name, each in given.items() if each is not None})


def frame_of(body: Body, module: Module, function: Function) -> Frame:
    """Return a body's frame, or that of another function that it calls.

    Args:
        body: The body.
        module: The function's module.
        function: The function.
    """
    task = Task(tuple(body.sessions.items()), tuple(body.classes()))
    first = next((each.arg for each, _ in _parameters(function)), "")
    bound = first == "self" or (function is body.function and body.is_true("bind"))
    return Frame(module, function, task, {first: task} if bound else {})


def _is_session_name(name: str) -> bool:
    """Whether a name is that of a database session: often there is no other proof in the source."""
    name = name.lower()
    if name not in ("session", "db_session", "dbsession", "sess") and not name.endswith("_session"):
        return False
    return "http" not in name and "boto" not in name


def _is_plain(function: Function) -> bool:
    """Whether a call runs the function, and nothing else."""
    return all(last(each) == "staticmethod" for each in function.decorator_list) and not _yields(function)


def _is_manager(module: Module, function: Function) -> bool:
    """Whether a call makes a context manager whose block is run in place of the function's one ``yield``."""
    decorators = [module.dotted(each) for each in function.decorator_list if last(each) != "staticmethod"]
    return len(decorators) == 1 and decorators[0] in _MANAGERS and len(_yields(function)) == 1


@functools.lru_cache(maxsize=4096)
def _yields(function: Function) -> list[ast.Yield | ast.YieldFrom]:
    return [each for each in nodes_of(function, nested=False) if isinstance(each, ast.Yield | ast.YieldFrom)]


def yielded(manager: Function) -> ast.expr | None:
    """Return what the block of a context manager gets."""
    return _yields(manager)[0].value


def _parameters(function: Function) -> Iterator[tuple[ast.arg, ast.expr | None]]:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    yield from zip(positional, [*missing, *arguments.defaults], strict=True)
    yield from zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)


@functools.lru_cache(maxsize=1024)
def _assigned(function: Function) -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    for node in nodes_of(function):
        value = node.context_expr if isinstance(node, ast.withitem) else getattr(node, "value", None)
        for target in targets(node):
            if isinstance(target, ast.Name) and value and not (isinstance(value, ast.Constant) and value.value is None):
                found.setdefault(target.id, []).append(value)
    return found


@functools.lru_cache(maxsize=1024)
def _iterated(function: Function) -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    for node in nodes_of(function):
        if isinstance(node, ast.For | ast.AsyncFor) and isinstance(node.target, ast.Name):
            found.setdefault(node.target.id, []).append(node.iter)
    return found
