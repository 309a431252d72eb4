"""Which row goes to which rank and in which order: index tensors and split sizes, planned once a layer.

Shapes: N tokens of this rank, k experts a token visits, E experts of all ranks, P ranks of the expert group, L experts
of this rank, m bytes of an expert mask, M ≤ N·k routed tokens (pairs of a token and an expert that are not dropped),
S rows sent (one for each token and rank), R routed tokens that this rank's experts receive.
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
    """Groups of rows, each of which adds up to one sum.

    Attributes:
        members: [M] row numbers, those of one sum next to each other.
        offsets: [B] position in `members` at which each of the B sums begins.
    """

    members: Tensor
    offsets: Tensor

    def sum(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Add up rows, always in the same order. Differentiable in the weights, not in the rows.

        Args:
            rows: [·,D].
            weights: [M] in the order of `members`; None for ones.

        Returns:
            [B,D] in the dtype of the rows.
        """
        if weights is not None and not torch.is_grad_enabled() and rows.device.type == "cpu":
            return self._sum_exactly(rows, weights)
        return F.embedding_bag(self.members, rows.detach(), self.offsets, mode="sum", per_sample_weights=weights)

    def _sum_exactly(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Round every product, and add them in the order of the rows: the bits of the runtime in C."""
        segments = torch.bucketize(torch.arange(len(self.members)), self.offsets, right=True)
        order = (segments * len(rows) + self.members).argsort()
        products = rows[self.members[order]] * weights[order, None]
        return F.embedding_bag(torch.arange(len(products)), products, self.offsets, mode="sum")


class RemotePlan(NamedTuple):
    """The part of a plan that concerns other ranks.

    Attributes:
        sent_tokens: [S] token of each row sent, sorted by destination.
        expert_mask: [S,m] uint8, one bit for each expert of the destination, set where the token visits it.
        by_token: the rows sent of each token.
        sent_splits: split sizes of the rows sent.
        routed_splits: split sizes of the routed tokens.
        to_source_order: [R] order by source and then expert of rows that are sorted by local expert.
        to_expert_order: [R] its inverse.
    """

    sent_tokens: Tensor
    expert_mask: Tensor
    by_token: Segments
    sent_splits: SplitSizes
    routed_splits: SplitSizes
    to_source_order: Tensor
    to_expert_order: Tensor


class DispatchPlan(NamedTuple):
    """How the tokens of a layer travel.

    Attributes:
        tokens_per_expert: routed tokens of each local expert; they sum to R.
        order: [M] routed tokens sorted by expert and then token; number c belongs to token c // k.
        tokens: [M] their tokens.
        by_token: for each token, the positions in `order` of its routed tokens, as the router ordered its choice.
        undropped: [M] routed tokens in the order of `by_token`; None where none is dropped.
        remote: None where all experts are on this rank.
    """

    tokens_per_expert: list[int]
    order: Tensor
    tokens: Tensor
    by_token: Segments
    undropped: Tensor | None
    remote: RemotePlan | None


def plan_dispatch(expert_ids: Tensor, link: ExpertLink) -> DispatchPlan:
    """Sort routed tokens by expert, and exchange with the other ranks how many rows each will receive.

    Collective.

    Args:
        expert_ids: [N,k] int64 global expert numbers, different ones for each token; `link.placement.total` marks a
            routed token that is dropped.
        link: how rows travel.
    """
    total, k = link.placement.total, expert_ids.shape[1]
    flat = expert_ids.flatten()
    load = torch.bincount(flat, minlength=total + 1)
    order = _argsort_experts(flat, total)
    positions = _inverse_permutation(order)
    if link.group is None:
        remote, tokens_per_expert = None, load.tolist()
        dropped = tokens_per_expert.pop()
    else:
        remote, tokens_per_expert, dropped = _plan_remote(expert_ids, load, link)
    offsets, undropped = torch.arange(0, len(flat), k, device=flat.device), None
    if dropped:
        order, undropped = order[: len(flat) - dropped], (flat < total).nonzero().flatten()
        positions, offsets = positions[undropped], _exclusive_cumsum((expert_ids < total).sum(1))
    return DispatchPlan(tokens_per_expert, order, order // k, Segments(positions, offsets), undropped, remote)


def _plan_remote(expert_ids: Tensor, load: Tensor, link: ExpertLink) -> tuple[RemotePlan, list[int], int]:
    """The remote plan, routed tokens of each local expert, and how many of this rank are dropped."""
    placement = link.placement
    ranks, local = len(placement.counts), len(placement.local)
    expert_mask = _make_expert_mask(expert_ids, placement)
    visits = expert_mask.bool().any(2)
    rows_to_rank = visits.sum(0)
    to_each = zip(load[:-1].split(list(placement.counts)), rows_to_rank.split(1), strict=True)
    received = exchange_counts([torch.cat(pair) for pair in to_each], link)
    # One copy to the host for all numbers that are needed there.
    numbers = torch.cat([load, rows_to_rank, received.flatten()]).tolist()
    rows_sent = numbers[placement.total + 1 :][:ranks]
    from_rank = [numbers[placement.total + 1 + ranks + r * (local + 1) :][: local + 1] for r in range(ranks)]
    rows_received = [counts.pop() for counts in from_rank]
    firsts = [sum(placement.counts[:r]) for r in range(ranks)]
    routed_sent = [sum(numbers[first:][:n]) for first, n in zip(firsts, placement.counts, strict=True)]
    routed_received = [sum(counts) for counts in from_rank]
    sent_splits, routed_splits = make_splits(
        [rows_sent, routed_sent], [rows_received, routed_received], link, expert_ids.device
    )
    destinations, tokens, by_token = _nonzero_by_column(visits)
    to_source = _source_order(received[:, :local], sum(routed_splits.receives))
    mask = expert_mask[tokens, destinations]
    inverse = _inverse_permutation(to_source)
    remote = RemotePlan(tokens, mask, by_token, sent_splits, routed_splits, to_source, inverse)
    return remote, [sum(column) for column in zip(*from_rank, strict=True)], numbers[placement.total]


def _make_expert_mask(expert_ids: Tensor, placement: ExpertPlacement) -> Tensor:
    """[N,k] → [N,P,m] uint8 with a bit set for each expert that a token visits, m bytes for the experts of a rank."""
    width = expert_mask_bytes(placement)
    slots = [(r * width + i // 8, 1 << i % 8) for r, n in enumerate(placement.counts) for i in range(n)]
    ranks = len(placement.counts)
    byte, bit = torch.tensor([*slots, (ranks * width, 0)], device=expert_ids.device).unbind(1)
    mask = torch.zeros(len(expert_ids), ranks * width + 1, dtype=torch.uint8, device=expert_ids.device)
    mask.scatter_add_(1, byte[expert_ids], bit.to(torch.uint8)[expert_ids])
    return mask[:, :-1].reshape(len(expert_ids), ranks, width)


def expert_mask_bytes(placement: ExpertPlacement) -> int:
    """Return the bytes of a row's expert mask: one bit for each expert of the rank that has the most."""
    return -(-max(placement.counts) // 8)


def expand_by_expert(expert_mask: Tensor, local: int) -> tuple[Tensor, Segments]:
    """Find out which received row each local expert gets.

    Args:
        expert_mask: [S',m] uint8 of the S' rows received.
        local: number of local experts.

    Returns:
        [R] received row of each routed token, sorted by local expert; and the routed tokens of each received row.
    """
    expert = torch.arange(local, device=expert_mask.device)
    bits = (expert_mask[:, expert // 8] >> (expert % 8).to(torch.uint8)) & 1
    _, row_ids, by_row = _nonzero_by_column(bits.bool())
    return row_ids, by_row


def _nonzero_by_column(present: Tensor) -> tuple[Tensor, Tensor, Segments]:
    """[A,B] bool → columns and rows of its true elements, column by column, and where each row's are among them."""
    by_column = present.T.contiguous()
    columns, rows = by_column.nonzero(as_tuple=True)
    positions = by_column.view(-1).cumsum(0).view_as(by_column).T[present] - 1
    return columns, rows, Segments(positions, _exclusive_cumsum(present.sum(1)))


def _source_order(received: Tensor, total: int) -> Tensor:
    """[P,L] routed tokens of each source and expert, `total` in all → order by source of rows sorted by expert."""
    begins = _exclusive_cumsum(received.T.reshape(-1)).view(received.T.shape).T.reshape(-1)
    sizes = received.reshape(-1)
    shifts = (begins - _exclusive_cumsum(sizes)).repeat_interleave(sizes, output_size=total)
    return torch.arange(total, device=received.device) + shifts


def _argsort_experts(expert_ids: Tensor, total: int) -> Tensor:
    """Stable argsort of numbers up to `total`."""
    if expert_ids.is_cpu and total < 2**16:
        # Two bytes are sorted by radix: a fifth of the time of torch's comparisons.
        return torch.from_numpy(np.argsort(expert_ids.numpy().astype(np.uint16), kind="stable"))
    return expert_ids.argsort(stable=True)


def _exclusive_cumsum(sizes: Tensor) -> Tensor:
    return sizes.cumsum(0) - sizes


def _inverse_permutation(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
