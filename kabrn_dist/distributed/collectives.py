"""Small collectives on plain bytes, without pickled objects: failures on all ranks, JSON values.

Every function is collective over `group`; None is the default group. Without torch.distributed there is one rank and
nothing is sent. The group's timeout must exceed the time that the slowest rank works between two calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kabrn_dist.utils.errors import UserError

Group = dist.ProcessGroup | None
Result = TypeVar("Result")

REASON_BYTES = 1024


def group_rank(group: Group) -> int:
    """Return this process's rank in the group; 0 in a single process."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def group_size(group: Group) -> int:
    """Return the number of ranks in the group; 1 in a single process."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def run_on_all(group: Group, work: Callable[..., Result], *arguments: Any) -> Result:
    """Call `work(*arguments)` on every rank and return its result if no rank failed.

    Collective. A rank that raised alone would leave the others waiting in their next collective for ever.

    Raises:
        UserError: on every rank, with the same message, if any rank raised an exception.
    """
    error: Exception | None = None
    results: list[Result] = []
    try:
        results.append(work(*arguments))
    except Exception as caught:
        error = caught
    raise_on_all(group, error)
    return results[0]


def run_on_main(group: Group, work: Callable[..., Result], *arguments: Any) -> Result | None:
    """Call `work(*arguments)` on rank 0 only; the other ranks wait and return None.

    Collective.

    Raises:
        UserError: on every rank, with the same message, if rank 0 raised an exception.
    """
    if group_rank(group) == 0:
        return run_on_all(group, work, *arguments)
    raise_on_all(group, None)
    return None


def raise_on_all(group: Group, error: Exception | None) -> None:
    """Raise on every rank if any rank has an error; return if none has.

    Collective.

    Raises:
        UserError: on every rank, with the message of the first rank that has an error.
    """
    failures = [reason for reason in _gather_reasons(_describe(error) if error else "", group) if reason]
    if failures:
        raise UserError(failures[0]) from error


def gather_json(value: Any, group: Group) -> list[Any]:
    """Return the JSON values of all ranks, in rank order, on rank 0; an empty list on the others.

    Collective.
    """
    if not dist.is_initialized():
        return [value]
    data = json.dumps(value).encode()
    size = torch.tensor([len(data)], device=_device(group))
    sizes = [torch.empty_like(size) for _ in range(group_size(group))]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(each) for each in sizes]
    padded = _padded(data, max(lengths), group)
    is_main = group_rank(group) == 0
    rows = [torch.empty_like(padded) for _ in lengths] if is_main else None
    dist.gather(padded, rows, dst=_main_rank(group), group=group)
    return [json.loads(_text(row[:length])) for row, length in zip(rows or [], lengths, strict=is_main)]


def broadcast_json(value: Any, group: Group) -> Any:
    """Return rank 0's JSON value on every rank; the argument of the others is ignored.

    Collective.
    """
    if not dist.is_initialized():
        return value
    data = json.dumps(value).encode() if group_rank(group) == 0 else b""
    size = torch.tensor([len(data)], device=_device(group))
    dist.broadcast(size, src=_main_rank(group), group=group)
    padded = _padded(data, int(size), group)
    dist.broadcast(padded, src=_main_rank(group), group=group)
    return json.loads(_text(padded))


def _gather_reasons(reason: str, group: Group) -> list[str]:
    if not dist.is_initialized():
        return [reason]
    if reason and group_size(group) > 1:
        reason = f"rank {group_rank(group)}: {reason}"
    padded = _padded(reason.encode()[:REASON_BYTES], REASON_BYTES, group)
    rows = [torch.empty_like(padded) for _ in range(group_size(group))]
    dist.all_gather(rows, padded, group=group)
    return [_text(row).rstrip("\0") for row in rows]


def _describe(error: Exception) -> str:
    # The message of a UserError is complete; anything else appears without its traceback and needs its type.
    is_complete = isinstance(error, UserError) and str(error)
    text = str(error) if is_complete else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def _padded(data: bytes, size: int, group: Group) -> Tensor:
    buffer = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
    return buffer.to(_device(group))


def _text(data: Tensor) -> str:
    return data.cpu().numpy().tobytes().decode(errors="ignore")


def _main_rank(group: Group) -> int:
    return 0 if group is None else dist.get_global_rank(group, 0)


def _device(group: Group) -> torch.device:
    # NCCL moves only GPU memory; gloo and mixed groups take the CPU's.
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
