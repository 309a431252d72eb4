"""Find out which tests start processes, so that nobody has to mark them by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import pytest

# Names by which test code starts processes. Helpers that use them are followed, so these few are enough.
STARTERS = {"subprocess", "Popen", "spawn", "fork", "RankGroup", "start_processes"}


def starts_processes(item: pytest.Function) -> bool:
    """Return whether a test, its fixtures, or a helper in tests/ that they call start a process."""
    waiting: list[Callable[..., Any]] = [item.function]
    waiting += [fixture.func for fixtures in item._fixtureinfo.name2fixturedefs.values() for fixture in fixtures]
    seen: set[CodeType] = set()
    while waiting:
        function = inspect.unwrap(waiting.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        names = set(list_names(code))
        if names & STARTERS:
            return True
        waiting += list_helpers(function, names)
    return False


def list_names(code: CodeType) -> Iterator[str]:
    """Yield the global names and attributes that a function uses, also in the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from list_names(constant)


def list_helpers(function: Callable[..., Any], names: set[str]) -> Iterator[Callable[..., Any]]:
    """Yield the functions and methods in tests/ that `names` mean in the module of `function`."""
    module = function.__globals__
    found = [module[name] for name in names if name in module]
    # `fork_server.start_ranks` is the name of a module and an attribute of it.
    found += [
        getattr(value, name) for value in found if inspect.ismodule(value) for name in names if hasattr(value, name)
    ]
    for value in found:
        if not str(getattr(value, "__module__", "")).startswith("tests"):
            continue
        if inspect.isclass(value):
            yield from (method for method in vars(value).values() if inspect.isfunction(method))
        elif inspect.isfunction(value):
            yield value
