"""What ranks tell each other about a checkpoint, as plain bytes: no pickled objects.

Every function is collective over `group`. Without torch.distributed there is one rank and nothing is
sent; `None` with it means the default group. The group's timeout must exceed the slowest rank's phase.
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
    """This process's rank in the group; 0 in a single process."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def group_size(group: Group) -> int:
    """How many ranks the group has; 1 in a single process."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def run_on_all(group: Group, work: Callable[..., Result], *arguments: Any) -> Result:
    """`work(*arguments)` on every rank, returned only if no rank failed.

    Raises the same UserError on every rank if any rank raised: one that raised alone would leave the
    others waiting in their next collective for ever.
    """
    reason, cause = "", None
    result: list[Result] = []
    try:
        result.append(work(*arguments))
    except Exception as error:
        reason, cause = _describe(error), error
    failures = [text for text in _gather_reasons(reason, group) if text]
    if failures:
        raise UserError(failures[0]) from cause
    return result[0]


def run_on_main(group: Group, work: Callable[..., Result], *arguments: Any) -> Result | None:
    """`work(*arguments)` on rank 0 only, None on the others; UserError on every rank if it failed."""
    return run_on_all(group, work, *arguments) if group_rank(group) == 0 else run_on_all(group, _nothing)


def gather_json(value: Any, group: Group) -> list[Any]:
    """The JSON values of all ranks, in rank order, on rank 0; an empty list on the others."""
    if not dist.is_initialized():
        return [value]
    data = json.dumps(value).encode()
    mine = torch.tensor([len(data)], device=_device(group))
    sizes = [torch.empty_like(mine) for _ in range(group_size(group))]
    dist.all_gather(sizes, mine, group=group)
    lengths = [int(size) for size in sizes]
    padded = _padded(data, max(lengths), group)
    is_first = group_rank(group) == 0
    received = [torch.empty_like(padded) for _ in lengths] if is_first else None
    dist.gather(padded, received, dst=_first(group), group=group)
    return [json.loads(_text(row[:length])) for row, length in zip(received or [], lengths, strict=is_first)]


def broadcast_json(value: Any, group: Group) -> Any:
    """Rank 0's JSON value, on every rank; the others' argument is ignored."""
    if not dist.is_initialized():
        return value
    data = json.dumps(value).encode() if group_rank(group) == 0 else b""
    size = torch.tensor([len(data)], device=_device(group))
    dist.broadcast(size, src=_first(group), group=group)
    padded = _padded(data, int(size), group)
    dist.broadcast(padded, src=_first(group), group=group)
    return json.loads(_text(padded))


def _gather_reasons(reason: str, group: Group) -> list[str]:
    if not dist.is_initialized():
        return [reason]
    if reason and group_size(group) > 1:
        reason = f"rank {group_rank(group)}: {reason}"
    mine = _padded(reason.encode()[:REASON_BYTES], REASON_BYTES, group)
    everyone = [torch.empty_like(mine) for _ in range(group_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return [_text(row).rstrip("\0") for row in everyone]


def _describe(error: Exception) -> str:
    # A UserError was written for people; anything else is met without its traceback and needs its type.
    is_for_people = isinstance(error, UserError) and str(error)
    text = str(error) if is_for_people else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def _nothing() -> None:
    """The part of ranks that only wait for another's result."""


def _padded(data: bytes, size: int, group: Group) -> Tensor:
    buffer = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
    return buffer.to(_device(group))


def _text(data: Tensor) -> str:
    return data.cpu().numpy().tobytes().decode(errors="ignore")


def _first(group: Group) -> int:
    return 0 if group is None else dist.get_global_rank(group, 0)


def _device(group: Group) -> torch.device:
    # NCCL moves only GPU memory; gloo and mixed groups take the CPU's.
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
