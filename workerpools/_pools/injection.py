"""Injection: a parameter of a task body whose default is a handle's value, for bodies without ``self``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple, NoReturn

from workerpools.errors import ConfigurationError

__all__ = ["Injected", "Parameter", "fill", "hide", "injected"]


class Injected:
    """The default of an injected parameter. A task's body never sees it: each run passes the value in its place.

    Args:
        handle: The resource or session whose value the body gets.
    """

    __slots__ = ("handle",)

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __getattr__(self, name: str) -> Any:
        # What tools look for in any object is just not there.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        self._refuse()

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse()

    def __enter__(self) -> NoReturn:
        self._refuse()

    def __exit__(self, *_: object) -> None: ...

    def __getitem__(self, _: object) -> NoReturn:
        self._refuse()

    def __iter__(self) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        where, _ = self.handle._place()
        raise ConfigurationError(
            f"{where}.inject() is still in the place of its value: only the body of a PooledTask is given the value. "
            f"Elsewhere, pass it as an argument, or call {where}.get(). A decorator between the task and its body "
            "needs functools.wraps, so that the body's parameters are found"
        )

    def __repr__(self) -> str:
        return f"{self.handle._place()[0]}.inject()"


class Parameter(NamedTuple):
    """An injected parameter.

    Attributes:
        name: Its name.
        position: Its position among a call's positional arguments; infinite if it is keyword-only.
        handle: The resource or session.
    """

    name: str
    position: float
    handle: Any


def injected(body: Any, whose: str) -> Sequence[Parameter]:
    """Return the injected parameters of a body.

    Args:
        body: A function or bound method, also one that decorators have wrapped with ``functools.wraps``.
        whose: The task, for messages.

    Raises:
        ConfigurationError: One is positional-only.
    """
    function = inspect.unwrap(getattr(body, "__func__", body))
    if not isinstance(function, FunctionType):
        return ()
    # From the code object, which is all of it: inspect.signature() evaluates annotations on Python 3.14.
    code, found = function.__code__, []
    positional = code.co_varnames[: code.co_argcount]
    defaults: tuple[Any, ...] = function.__defaults__ or ()
    named: dict[str, Any] = function.__kwdefaults__ or {}
    for index, default in enumerate(defaults, len(positional) - len(defaults)):
        if isinstance(default, Injected):
            if index < code.co_posonlyargcount:
                raise ConfigurationError(
                    f"{whose}: the parameter {positional[index]!r} is positional-only, and {default!r} is passed by "
                    "name; move it behind the '/'"
                )
            found.append(Parameter(positional[index], index - inspect.ismethod(body), default.handle))
    for name, default in named.items():
        if isinstance(default, Injected):
            found.append(Parameter(name, math.inf, default.handle))
    return found


def fill(body: Callable[..., Any], parameters: Sequence[Parameter], task: Any) -> Callable[..., Any]:
    """Return ``body`` with the values of its injected parameters, for calls that do not pass them.

    Args:
        body: The body.
        parameters: Its injected parameters.
        task: The task, whose app configures handles without a declaration.
    """
    cls = type(task)
    # As the attribute of a task: ``self.api``.
    wanted = [(name, position, handle.__get__) for name, position, handle in parameters]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = len(args)
        for name, position, value in wanted:
            if given <= position and name not in kwargs:
                kwargs[name] = value(task, cls)
        return body(*args, **kwargs)

    return run


def hide(parameters: Sequence[Parameter], task: Any) -> None:
    """Keep injected parameters out of the task's messages: Celery checks their arguments before it sends them.

    Args:
        parameters: The injected parameters.
        task: The task.
    """
    check = getattr(task, "__header__", None)

    def header(*args: Any, **kwargs: Any) -> None:
        for name, position, handle in parameters:
            # An eager call sends nothing: it is a direct call.
            if (name in kwargs or len(args) > position) and not task.app.conf.task_always_eager:
                where, _ = handle._place()
                raise TypeError(
                    f"{task.name}() takes its parameter {name!r} from {where} in the worker, and no message carries "
                    f"it. Pass it in a direct call, or use {where}.override(…); pass what follows it by name"
                )
        if check is not None:
            check(*args, **kwargs)

    task.__header__ = header
