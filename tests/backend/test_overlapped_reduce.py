"""Gradients that travel to their owners while backward goes on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kabrn_dist.backend.overlapped_reduce import MAX_PENDING, GradReduceScatter
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.process_group import init_distributed
from tests.support.runs import run_worker

WIDTHS = [5, 3, 7, 2, 4, 6, 1, 3, 5]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_gets_its_piece_of_the_summed_gradient_and_waits_last(world: int) -> None:
    run_worker(world, "tests.backend.test_overlapped_reduce")


def main() -> None:
    place = read_launch_env()
    with init_distributed(place):
        world, rank = place.world_size, place.rank
        shapes = [(1, *pair) for pair in pairwise(WIDTHS)]
        sizes = [-(-a * b // (world * 4)) * 4 for _, a, b in shapes]
        group = dist.group.WORLD if world > 1 else None
        pending: list[GradReduceScatter] = []
        reducers = [
            GradReduceScatter(s, (world, n), group, torch.float32, pending) for s, n in zip(shapes, sizes, strict=True)
        ]
        pieces = [nn.Parameter(torch.zeros(size)) for size in sizes]
        for step in range(2):
            expected = [torch.zeros(shape) for shape in shapes]
            for micro in range(3):
                for one, piece in zip(reducers, pieces, strict=True):
                    one.make_anchor(piece, last=micro == 2)
                order = note_order()
                _through([one.placeholder() for one in reducers], step, micro, rank).backward()
                if micro < 2:
                    assert order == ["start"] * len(shapes) and all(piece.grad is None for piece in pieces)
                for other in range(world):
                    leaves = [torch.zeros(shape, requires_grad=True) for shape in shapes]
                    _through(leaves, step, micro, other).backward()
                    for total, leaf in zip(expected, leaves, strict=True):
                        total.add_(leaf.grad)
            assert order == ["start"] * len(shapes) + ["wait"] * len(shapes)
            assert not pending
            for piece, total, size in zip(pieces, expected, sizes, strict=True):
                padded = nn.functional.pad(total.view(-1), (0, world * size - total.numel()))
                torch.testing.assert_close(piece.grad, padded.view(world, size)[rank], atol=1e-5, rtol=1e-5)
                piece.grad = None


def note_order() -> list[str]:
    """What happens to the gradients from now on, as it happens; checks how many travel."""
    order: list[str] = []
    GradReduceScatter.start = noted(START, "start", order)
    GradReduceScatter.wait = noted(WAIT, "wait", order)
    return order


START, WAIT = GradReduceScatter.start, GradReduceScatter.wait


def noted(plain: Callable[..., Any], name: str, order: list[str]) -> Callable[..., Any]:
    def call(one: GradReduceScatter, *arguments: Tensor) -> Any:
        order.append(name)
        found = plain(one, *arguments)
        assert len(one.pending) <= MAX_PENDING
        return found

    return call


def _through(matrices: list[Tensor], step: int, micro: int, rank: int) -> Tensor:
    """A loss that goes through all matrices, one after another."""
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    x = torch.randn(2, WIDTHS[0], generator=generator)
    for matrix in matrices:
        # Matrices are zero; what stands beside them keeps a gradient alive.
        x = x @ (matrix[0] + torch.randn(matrix.shape[1:], generator=generator))
    return x.sum()


if __name__ == "__main__":
    main()
