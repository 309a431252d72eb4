"""Who sends which row to whom, planned once a layer from the router's choice.

Shapes: N tokens of this rank, k experts a token visits, M ≤ N·k copies that are not dropped, E experts of all ranks,
P ranks of the expert group, S rows that leave (one for each token and rank), R copies that arrive here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.distributed.all_to_all import ExpertLink, SplitSizes, exchange_counts, make_splits
from kabrn_dist.distributed.expert_placement import ExpertPlacement


class Segments(NamedTuple):
    """Which rows add up to which sum.

    Attributes:
        members: [M] rows, those of one sum next to each other.
        offsets: [B] where in `members` each of the B sums begins.
    """

    members: Tensor
    offsets: Tensor

    def sum(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """[·,D] rows and their [M] weights in the order of `members` → [B,D], always added in the same order.

        Differentiable in the weights, not in the rows.
        """
        return F.embedding_bag(self.members, rows.detach(), self.offsets, mode="sum", per_sample_weights=weights)


class RemotePlan(NamedTuple):
    """The part of a route that leaves the process.

    Attributes:
        tokens: [S] token of each row that leaves, by destination.
        wanted: [S,m] uint8, one bit for each expert of the destination, set where it wants the row.
        home: for each token, its rows that left.
        rows: splits of the rows.
        copies: splits of the copies.
        swap: [R] arrived copies, sorted by local expert, taken by home and then by expert.
        unswap: [R] the way back.
    """

    tokens: Tensor
    expert_mask: Tensor
    home: Segments
    rows: SplitSizes
    copies: SplitSizes
    to_source_order: Tensor
    to_expert_order: Tensor


class DispatchPlan(NamedTuple):
    """How copies travel: index tensors and plain integers.

    Attributes:
        counts: copies for each local expert; they sum to R.
        order: [M] copies sorted by expert; copy c belongs to token c // k. Those of one expert are by token.
        tokens: [M] their tokens.
        home: for each token, its copies' places in `order`, in the order of its choice.
        kept: [M] copies in the order of `home`; None where that is all of them.
        journey: None when all experts are here.
    """

    tokens_per_expert: list[int]
    order: Tensor
    tokens: Tensor
    home: Segments
    undropped: Tensor | None
    remote: RemotePlan | None


def plan_dispatch(choice: Tensor, wire: ExpertLink) -> DispatchPlan:
    """Sort copies by expert, and agree with the other ranks on who sends how much to whom. Collective.

    Args:
        choice: [N,k] int64, global expert numbers, different ones for each token; `wire.placement.total` marks a
            copy that is dropped.
    """
    total, k = wire.placement.total, choice.shape[1]
    flat = choice.flatten()
    load = torch.bincount(flat, minlength=total + 1)
    order = _sort(flat, total)
    places = _inverse(order)
    if wire.group is None:
        journey, counts = None, load.tolist()
        dropped = counts.pop()
    else:
        journey, counts, dropped = _plan_journey(choice, load, wire)
    offsets, kept = torch.arange(0, len(flat), k, device=flat.device), None
    if dropped:
        order, kept = order[: len(flat) - dropped], (flat < total).nonzero().flatten()
        places, offsets = places[kept], _starts((choice < total).sum(1))
    return DispatchPlan(counts, order, order // k, Segments(places, offsets), kept, journey)


def _plan_journey(choice: Tensor, load: Tensor, wire: ExpertLink) -> tuple[RemotePlan, list[int], int]:
    """The journey, copies for each local expert, and how many are dropped here."""
    placement = wire.placement
    ranks, local = len(placement.counts), len(placement.local)
    wanted = _mark(choice, placement)
    visits = wanted.bool().any(2)
    leaving = visits.sum(0)
    told = zip(load[:-1].split(list(placement.counts)), leaving.split(1), strict=True)
    heard = exchange_counts([torch.cat(pair) for pair in told], wire)
    numbers = torch.cat([load, leaving, heard.flatten()]).tolist()
    sends = numbers[placement.total + 1 :][:ranks]
    arriving = [numbers[placement.total + 1 + ranks + r * (local + 1) :][: local + 1] for r in range(ranks)]
    rows = [part.pop() for part in arriving]
    firsts = [sum(placement.counts[:r]) for r in range(ranks)]
    copies = [sum(numbers[first:][:n]) for first, n in zip(firsts, placement.counts, strict=True)]
    for_rows, for_copies = make_splits([sends, copies], [rows, [sum(part) for part in arriving]], wire, choice.device)
    where, tokens, home = _by_column(visits)
    swap = _swap_blocks(heard[:, :local], sum(for_copies.receives))
    journey = RemotePlan(tokens, wanted[tokens, where], home, for_rows, for_copies, swap, _inverse(swap))
    return journey, [sum(column) for column in zip(*arriving, strict=True)], numbers[placement.total]


def _mark(choice: Tensor, placement: ExpertPlacement) -> Tensor:
    """[N,k] → [N,P,m] uint8 with a bit set for each expert that a token visits, m bytes for the experts of a rank."""
    width = expert_mask_bytes(placement)
    slots = [(r * width + i // 8, 1 << i % 8) for r, n in enumerate(placement.counts) for i in range(n)]
    ranks = len(placement.counts)
    byte, bit = torch.tensor([*slots, (ranks * width, 0)], device=choice.device).unbind(1)
    marks = torch.zeros(len(choice), ranks * width + 1, dtype=torch.uint8, device=choice.device)
    marks.scatter_add_(1, byte[choice], bit.to(torch.uint8)[choice])
    return marks[:, :-1].reshape(len(choice), ranks, width)


def expert_mask_bytes(placement: ExpertPlacement) -> int:
    """Bytes of the record which experts of a rank want a row: one bit an expert."""
    return -(-max(placement.counts) // 8)


def spread_arrivals(wanted: Tensor, local: int) -> tuple[Tensor, Segments]:
    """[R',m] records of arrived rows → [R] rows in the order of local experts, and for each row its copies therein."""
    expert = torch.arange(local, device=wanted.device)
    bits = (wanted[:, expert // 8] >> (expert % 8).to(torch.uint8)) & 1
    _, arrival, copies = _by_column(bits.bool())
    return arrival, copies


def _by_column(present: Tensor) -> tuple[Tensor, Tensor, Segments]:
    """[A,B] bool → columns and rows of its true elements, column by column, and where each row's are among them."""
    by_column = present.T.contiguous()
    columns, rows = by_column.nonzero(as_tuple=True)
    places = by_column.view(-1).cumsum(0).view_as(by_column).T[present] - 1
    return columns, rows, Segments(places, _starts(present.sum(1)))


def _swap_blocks(arriving: Tensor, total: int) -> Tensor:
    """[P,local] copies of each home and expert, `total` in all → order by home of copies that lie by expert."""
    begins = _starts(arriving.T.reshape(-1)).view(arriving.T.shape).T.reshape(-1)
    sizes = arriving.reshape(-1)
    shifts = (begins - _starts(sizes)).repeat_interleave(sizes, output_size=total)
    return torch.arange(total, device=arriving.device) + shifts


def _sort(experts: Tensor, total: int) -> Tensor:
    """Stable argsort of numbers up to `total`."""
    if experts.is_cpu and total < 2**16:
        # Two bytes are sorted by radix: a fifth of the time of torch's comparisons.
        return torch.from_numpy(np.argsort(experts.numpy().astype(np.uint16), kind="stable"))
    return experts.argsort(stable=True)


def _starts(sizes: Tensor) -> Tensor:
    return sizes.cumsum(0) - sizes


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
