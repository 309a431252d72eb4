"""Tokens to their experts and back: dropless, exact split sizes, one permutation each way.

Shapes: N tokens of this rank, k experts a token visits, M = N·k copies, D width, E experts of all ranks,
R copies that arrive here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kabrn_dist.parallel.placement import Placement


class Route(NamedTuple):
    """How copies travel. Plain integers and index tensors: made once a layer, used by dispatch and combine.

    Attributes:
        order: [M] copies sorted by expert; copy c belongs to token c // k.
        sends: copies sent to each rank of the group.
        receives: copies received from each rank of the group.
        arrival: [R] received copies sorted by local expert.
        counts: copies for each local expert; they sum to R.
    """

    order: Tensor
    sends: list[int]
    receives: list[int]
    arrival: Tensor | None
    counts: list[int]


def plan_route(choice: Tensor, placement: Placement, group: dist.ProcessGroup | None) -> Route:
    """Agree with the other ranks on who sends how much to whom.

    Args:
        choice: [N,k] int64, global expert numbers.
        placement: experts on each rank of `group`.
        group: the expert group; None when all experts are here.
    """
    flat = choice.flatten()
    order = flat.argsort(stable=True)
    load = torch.bincount(flat, minlength=placement.total)
    if group is None:
        return Route(order, [], [], None, load.tolist())
    local = len(placement.local)
    ranks = len(placement.counts)
    arriving = load.new_empty(ranks * local)
    dist.all_to_all_single(arriving, load, [local] * ranks, list(placement.counts), group=group)
    expert = torch.arange(local, device=choice.device).repeat(ranks).repeat_interleave(arriving)
    load, arriving = torch.cat([load, arriving]).cpu().split([placement.total, ranks * local])
    sends = [int(part.sum()) for part in load.split(list(placement.counts))]
    by_source = arriving.view(ranks, local)
    return Route(order, sends, by_source.sum(1).tolist(), expert.argsort(stable=True), by_source.sum(0).tolist())


def dispatch(values: Tensor, k: int, route: Route, group: dist.ProcessGroup | None) -> Tensor:
    """[N,D] tokens → [R,D] copies that arrived here, sorted by local expert. Differentiable."""
    copies = _Spread.apply(values, route.order, k)
    if group is None:
        return copies
    arrived = _Exchange.apply(copies, route.sends, route.receives, group)
    return _Permute.apply(arrived, route.arrival)


def combine(results: Tensor, weights: Tensor, route: Route, group: dist.ProcessGroup | None) -> Tensor:
    """[R,D] experts' results and [N,k] weights → [N,D] weighted sums at the tokens' home. Differentiable."""
    if group is not None:
        results = _Permute.apply(results, _inverse(route.arrival))
        results = _Exchange.apply(results, route.receives, route.sends, group)
    at_home = _Permute.apply(results, _inverse(route.order))
    return torch.einsum("nk,nkd->nd", weights.to(results.dtype), at_home.view(*weights.shape, results.shape[-1]))


def _inverse(order: Tensor | None) -> Tensor:
    assert order is not None
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


class _Spread(torch.autograd.Function):
    """Copy each token k times, in the order of their experts. Backward sums a token's copies in a fixed order."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return values[order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad[_inverse(order)].view(-1, ctx.k, grad.shape[-1]).sum(1), None, None


class _Permute(torch.autograd.Function):
    """Rows in another order. Backward is a gather too, where autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return values[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grad[_inverse(order)], None


class _Exchange(torch.autograd.Function):
    """All-to-all of rows with exact split sizes; backward sends the gradients home the same way."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits = sends, receives, group
        return _all_to_all(values, sends, receives, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sends, receives, group = ctx.splits
        return _all_to_all(grad, receives, sends, group), None, None, None


def _all_to_all(values: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = values.new_empty(sum(receives), *values.shape[1:])
    dist.all_to_all_single(arrived, values.contiguous(), receives, sends, group=group)
    return arrived
