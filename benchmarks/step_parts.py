"""Where the time of a training step goes: torch's profiler, with every operation counted for the part that called it.

Forward passes of parts are named by hooks on their modules. Autograd numbers each operation of a forward pass, and an
operation of backward carries the number of the one it belongs to: so backward is counted for the same part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

PREFIX = "part: "
OTHER = "other"
# Operations that only change the type or the place of values.
COPIES = frozenset({"aten::copy_", "aten::_to_copy", "aten::to"})


def measure_parts(
    parts: Mapping[str, list[nn.Module]], forward_backward: Callable[[], None], update: Callable[[], None]
) -> dict[str, float]:
    """Return seconds of one step by part: "mixer forward", "mixer backward", …, "optimizer" and "copies".

    "copies" is taken out of the parts it belongs to.

    Args:
        parts: modules by the name of their part; those inside another of them count for themselves.
        forward_backward: one pass.
        update: the optimizer's step.
    """
    with _named(parts), profile(activities=[ProfilerActivity.CPU]) as profiler:
        forward_backward()
        with record_function(f"{PREFIX}optimizer"):
            update()
    return sum_up(profiler.events() or [])


@contextmanager
def _named(parts: Mapping[str, list[nn.Module]]) -> Iterator[None]:
    handles: list[Any] = []
    for name, modules in parts.items():
        for module in modules:
            spans: list[Any] = []

            def enter(*_: Any, name: str = name, spans: list[Any] = spans) -> None:
                spans.append(record_function(f"{PREFIX}{name}"))
                spans[-1].__enter__()

            def leave(*_: Any, spans: list[Any] = spans) -> None:
                spans.pop().__exit__(None, None, None)

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sum_up(events: list[FunctionEvent]) -> dict[str, float]:
    """Return seconds by part of the events of one step; each event counts without those inside it."""
    seconds: defaultdict[str, float] = defaultdict(float)
    by_number: dict[int, str] = {}
    forwards = [event for event in events if not _is_backward(event)]
    for event in forwards:
        if event.sequence_nr >= 0:
            by_number.setdefault(event.sequence_nr, _part_of(event))
    for event in events:
        own = event.self_cpu_time_total * 1e-6
        if event.name.startswith(PREFIX):
            key = event.name.removeprefix(PREFIX)
            key = key if key == "optimizer" else f"{key} forward"
        elif event.name in COPIES:
            key = "copies"
        elif _is_backward(event):
            key = f"{by_number.get(_number(event), OTHER)} backward"
        else:
            part = _part_of(event)
            key = part if part == "optimizer" else f"{part} forward"
        seconds[key] += own
    return dict(seconds)


def _part_of(event: FunctionEvent) -> str:
    """The innermost part around an event."""
    outer: FunctionEvent | None = event
    while outer is not None:
        if outer.name.startswith(PREFIX):
            return outer.name.removeprefix(PREFIX)
        outer = outer.cpu_parent
    return OTHER


def _is_backward(event: FunctionEvent) -> bool:
    outer: FunctionEvent | None = event
    while outer is not None:
        if outer.name.startswith("autograd::engine::evaluate_function"):
            return True
        outer = outer.cpu_parent
    return False


def _number(event: FunctionEvent) -> int:
    """Autograd's number of the operation whose backward holds an event."""
    outer: FunctionEvent | None = event
    while outer is not None:
        if outer.name.startswith("autograd::engine::evaluate_function"):
            return int(outer.sequence_nr)
        outer = outer.cpu_parent
    return -1
