"""Retention over slices on real processes: values and gradients on every rank against one process, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from kabrn_dist.distributed.launch_env import free_port
from kabrn_dist.distributed.state_scan import SequenceLink, choose_exchange, compose, short_memory_heads
from kabrn_dist.ops.retention import log_decays, retention_chunk
from kabrn_dist.ops.retention_chunkwise import retention_slice

BATCH, HEADS, KEY, VALUE = 2, 3, 3, 5
SLOW = (4.0, 12.0)
WAYS = ("scan", "ring", "allgather", "auto")


def packings(slices: int, length: int) -> Iterator[tuple[str, list[int]]]:
    """Named lists of the positions where documents start, for sequences of `slices` × `length` tokens."""
    edge, total = length, slices * length
    yield "one throughout", [0]
    yield "starts on an edge", [0, edge]
    yield "starts one before and one after edges", [0, edge - 1, total - length + 1]
    yield "several in a slice", [0, 2, 3, edge + 1, edge + 3, total - 2]
    yield "one-token documents around an edge", [0, edge - 1, edge, edge + 1]
    yield "ends on the last token", [0, total - 1]
    yield "each token one", list(range(total))


def documents_of(starts: list[int], total: int) -> Tensor:
    marks = torch.zeros(total, dtype=torch.int64)
    marks[starts] = 1
    return marks.cumsum(0) - 1


def inputs(total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(total)
    widths = (KEY, KEY, VALUE, VALUE)
    q, k, v, grad = (torch.randn(BATCH, HEADS, total, w, dtype=torch.float64, generator=generator) for w in widths)
    return q, k, v, grad


def expected(starts: list[int], total: int, decay: Tensor) -> list[Tensor]:
    q, k, v, grad = inputs(total)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = retention_chunk(*leaves, decay, documents_of(starts, total).expand(BATCH, -1), None, 4)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]  # type: ignore[list-item]


def worker(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for schedule in (SLOW, (0.2, 9.0)):
        decays = log_decays(schedule, HEADS)
        decay = torch.tensor(decays, dtype=torch.float64)
        for way in WAYS:
            link = SequenceLink(dist.group.WORLD, world, decays, way)
            for length in (1, 5, 120):
                for name, starts in packings(world, length):
                    if max(starts) < world * length and min(starts) >= 0 and len(set(starts)) == len(starts):
                        check(rank, world, length, starts, decay, link, f"{way} {length} {name}")
    with pytest.raises(ValueError, match="group"):
        SequenceLink(dist.group.WORLD, world + 1, decays)
    dist.destroy_process_group()


def check(rank: int, world: int, length: int, starts: list[int], decay: Tensor, link: SequenceLink, what: str) -> None:
    total = world * length
    wanted = expected(starts, total, decay)
    here = slice(rank * length, (rank + 1) * length)
    q, k, v, grad = (x[:, :, here].clone() for x in inputs(total))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ids = documents_of(starts, total)
    opens = torch.tensor(rank * length in starts).expand(BATCH)
    out = retention_slice(*leaves, decay, ids[here].expand(BATCH, -1), opens, link, 4)
    out.backward(grad)
    found = [out.detach(), *(x.grad for x in leaves)]
    for tensor, whole, name in zip(found, wanted, ("out", "q", "k", "v"), strict=True):
        assert tensor is not None
        apart = float((tensor - whole[:, :, here]).abs().max())
        assert apart <= 1e-9, f"rank {rank} of {world}, {what}: {name} differs by {apart:.1e}"


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_slices_equal_one_process_on_every_rank(world: int) -> None:
    mp.spawn(worker, (world, free_port()), nprocs=world)


def test_compose_is_one_map_after_another() -> None:
    first, second, third = torch.randn(3, 2, 5, dtype=torch.float64)
    state = torch.randn(2, 4, dtype=torch.float64)

    def apply(pair: Tensor, x: Tensor) -> Tensor:
        return pair[:, :4] + pair[:, 4:] * x

    torch.testing.assert_close(apply(compose(first, second), state), apply(second, apply(first, state)))
    torch.testing.assert_close(compose(compose(first, second), third), compose(first, compose(second, third)))


def test_near_heads_have_nothing_left_after_a_slice() -> None:
    decays = log_decays("exponent", 16)
    for dtype in (torch.float32, torch.float64):
        near = short_memory_heads(decays, 2048, dtype)
        assert 0 < len(near) < 16
        for head, decay in enumerate(decays):
            left = torch.tensor(math.exp(2048 * decay), dtype=dtype)
            assert (1 + left == 1) == (head in near), "exactly those that rounding loses"


def test_auto_chooses_by_degree_size_and_length() -> None:
    assert choose_exchange(2, 10**6, 1024) == "ring", "two ranks: all are one hop, and ring sends least"
    assert choose_exchange(16, 10**3, 16) == "allgather", "small states: one hop"
    assert choose_exchange(16, 10**7, 16) == "scan", "large states, nothing to hide behind"
    assert choose_exchange(4, 10**6, 10**6) == "ring", "a long slice hides every hop"
