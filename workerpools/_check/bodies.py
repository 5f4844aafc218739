"""The bodies of tasks in the source, and the functions of signals."""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from workerpools._check.syntax import Function, Module, Project, is_function, keyword, last, nodes_of, targets

__all__ = ["Body", "bodies", "commits", "is_task", "is_task_class", "method", "receivers", "sessions_of"]

_DECORATORS = {"celery.shared_task", "celery.task", "celery.decorators.task", "celery.app.shared_task"}
_BASES = {
    "celery.Task",
    "celery.app.task.Task",
    "celery.task.Task",
    "workerpools.DatabaseTask",
    "workerpools.HTTPTask",
    "workerpools.PooledTask",
    "workerpools.django.DjangoTask",
}
_SESSIONS = {"workerpools.sqlalchemy.TaskSession", "workerpools.sqlalchemy.AsyncTaskSession"}
#: How people name their app where it is imported from somewhere that is not read.
_APPS = {"app", "celery", "celery_app", "celeryapp"}


@dataclass(frozen=True)
class Body:
    """A task's body, with the functions of its module and the methods of its class that it calls.

    Attributes:
        module: Where it is.
        function: The body.
        decorator: The call that makes it a task, for its options; None without one.
        class_: The class that it is the ``run()`` of, maybe by inheritance, and its module; None for a function.
    """

    module: Module
    function: Function
    decorator: ast.Call | None
    class_: tuple[Module, ast.ClassDef] | None = None

    @property
    def name(self) -> str:
        """The task's name, for messages."""
        return self.class_[1].name if self.class_ is not None else self.function.name

    @functools.cached_property
    def functions(self) -> list[tuple[Module, Function]]:
        """The body, and the functions of its module and the methods of its class that it calls itself, once."""
        found = [(self.module, self.function)]
        for node in nodes_of(self.function):
            if isinstance(node, ast.Call):
                called = self._called(node.func)
                if called is not None and called not in found and not _cached(called[1]) and not is_task(*called):
                    found.append(called)
        return found

    def _called(self, name: ast.expr) -> tuple[Module, Function] | None:
        if isinstance(name, ast.Name) and name.id not in self.module.locals_of(self.function):
            function = self.module.functions.get(name.id)
            return None if function is None else (self.module, function)
        if isinstance(name, ast.Attribute) and last(name.value) == "self":
            return method(self.classes(), name.attr)
        return None

    def calls(self) -> Iterator[tuple[Module, Function, ast.Call]]:
        """Yield every call of the body and the functions that it calls."""
        for module, function in self.functions:
            yield from ((module, function, node) for node in nodes_of(function) if isinstance(node, ast.Call))

    @functools.cached_property
    def base(self) -> tuple[Module, ast.ClassDef] | str | None:
        """The task's base class: one of the project, the name of another, or None where none is named."""
        if self.class_ is not None:
            return self.class_
        named = keyword(self.decorator, "base") if self.decorator is not None else None
        if named is None:
            return None
        dotted = self.module.dotted(named)
        return self.module.project.class_(dotted) or dotted

    def option(self, name: str) -> tuple[Module, ast.expr] | None:
        """Return an option of the task, from its decorator or a base of the project, and the module that sets it."""
        given = keyword(self.decorator, name) if self.decorator is not None else None
        if given is not None:
            return self.module, given
        for module, class_ in self.classes():
            for statement in class_.body:
                value = getattr(statement, "value", None)
                if value is not None and any(last(target) == name for target in targets(statement)):
                    return module, value
        return None

    def classes(self) -> Iterator[tuple[Module, ast.ClassDef]]:
        """Yield the task's class and those that it inherits from, as far as they are the project's."""
        if isinstance(self.base, tuple):
            yield from (each for each in self.module.project.ancestors(*self.base) if isinstance(each, tuple))

    def is_true(self, name: str) -> bool:
        """Return whether an option is written as True."""
        found = self.option(name)
        return found is not None and isinstance(found[1], ast.Constant) and found[1].value is True

    @functools.cached_property
    def sessions(self) -> dict[str, str]:
        """The attributes of ``self`` that are sessions which commit when the body returns, and a name of each."""
        return {} if self.base is None else sessions_of(self.module.project, self.base)


def sessions_of(project: Project, class_: tuple[Module, ast.ClassDef] | str) -> dict[str, str]:
    """Return the attributes of a class that are sessions which commit when a body returns, and where each is defined.

    Args:
        project: The project.
        class_: The class, or the name of one that is not the project's.
    """
    found: dict[str, str] = {}
    for each in project.ancestors(*class_) if isinstance(class_, tuple) else [class_]:
        if each == "workerpools.DatabaseTask":
            found.setdefault("session", f"{each}.session")
        elif isinstance(each, tuple):
            for name, call in _class_calls(each[1]):
                if commits(each[0], call):
                    found.setdefault(name, f"{each[0].name}.{each[1].name}.{name}")
    return found


def _class_calls(class_: ast.ClassDef) -> Iterator[tuple[str, ast.Call]]:
    for statement in class_.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Call):
            yield from ((last(target), statement.value) for target in targets(statement))


def commits(module: Module, call: ast.Call) -> bool:
    """Return whether a call makes a session that commits when the body returns."""
    commit = keyword(call, "commit")
    return module.called(call) in _SESSIONS and not (isinstance(commit, ast.Constant) and commit.value is False)


def _cached(function: Function) -> bool:
    named = [each.func if isinstance(each, ast.Call) else each for each in function.decorator_list]
    return any("cache" in last(each).lower() or last(each) == "connect" for each in named)


def is_task(module: Module, function: Function) -> bool:
    """Return whether a function is a task of its own: a call of its name is rare, and its findings are its own."""
    return _decorator(module, function) is not None


def bodies(module: Module, known: Collection[int] = ()) -> Iterator[Body]:
    """Yield the bodies of a module's tasks.

    Args:
        module: The module.
        known: The first lines of functions that are bodies, decorators counted, where the app itself was asked.
    """
    for function in module.defined:
        decorator = _decorator(module, function)
        first = min([function.lineno, *(each.lineno for each in function.decorator_list)])
        if decorator is not None or first in known:
            yield Body(module, function, decorator if isinstance(decorator, ast.Call) else None)
    for class_ in module.classes.values():
        if not is_task_class(module, class_):
            continue
        ancestors = module.project.ancestors(module, class_)
        run = method((each for each in ancestors if isinstance(each, tuple)), "run")
        if run is not None:
            yield Body(*run, None, (module, class_))


def method(classes: Iterable[tuple[Module, ast.ClassDef]], name: str) -> tuple[Module, Function] | None:
    """Return the method that an object has, and its module; None if no class defines it.

    Args:
        classes: The object's class, and those that it inherits from.
        name: The method's name.
    """
    for module, class_ in classes:
        for each in class_.body:
            if is_function(each) and each.name == name:
                return module, each
    return None


def _decorator(module: Module, function: Function) -> ast.expr | None:
    for each in function.decorator_list:
        named = each.func if isinstance(each, ast.Call) else each
        dotted = module.dotted(named)
        if dotted in _DECORATORS:
            return each
        if last(named) == "task" and isinstance(named, ast.Attribute) and _is_app(module, named.value):
            return each
    return None


def _is_app(module: Module, name: ast.expr) -> bool:
    dotted = module.dotted(name)
    made = module.project.constructor(dotted)
    if made.rpartition(".")[2] == "Celery" or "celery" in made.lower():
        return True
    # A function of the project's may have made it: its name has to do.
    return last(name).lower() in _APPS or "celery" in dotted.lower()


@functools.lru_cache(maxsize=1024)
def is_task_class(module: Module, class_: ast.ClassDef) -> bool:
    """Return whether a class is a task, or a base of tasks."""
    for each in module.project.ancestors(module, class_):
        if isinstance(each, str) and (each in _BASES or each.endswith((".app.Task", "celery.Task", "celery_app.Task"))):
            return True
    return False


def receivers(module: Module, *signals: str) -> Iterator[Function]:
    """Yield the functions of a module that receive one of Celery's signals."""
    if not any(name.startswith("celery") for name in module.imported):
        return
    for function in module.defined:
        for each in function.decorator_list:
            named = each.func if isinstance(each, ast.Call) else each
            if module.dotted(named) in {f"celery.signals.{signal}.connect" for signal in signals}:
                yield function
    for node in module.nodes:
        if module.called(node) in {f"celery.signals.{signal}.connect" for signal in signals}:
            assert isinstance(node, ast.Call)
            received = module.functions.get(last(node.args[0])) if node.args else None
            if received is not None:
                yield received
