"""All-to-all of rows between the ranks of an expert group, with exact split sizes, overlapped with the caller's work.

Where the group spans several nodes, rows first go to the rank of their own node that has the destination's local
index, and then between nodes: each pair of nodes exchanges a few long messages instead of many short ones.

Shapes: P ranks of the group on A nodes of J ranks each (P = A·J), rank a·J + j is number j of node a; W bytes of a row;
S rows that this rank sends as the source of tokens, R rows that its experts receive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import NodeGroups
from kabrn_dist.distributed.overlap import run_overlapped


@dataclass
class Traffic:
    """Cost of one layer's exchanges since the last `take`; those of activation recomputation count too.

    Attributes:
        bytes_sent: bytes handed to collectives for other ranks, forward and backward, row counts included.
        dispatch_bytes: of these, the bytes of rows that dispatch sends in forward.
        wait_seconds: time spent waiting, forward and backward; on a GPU by the host alone, which hardly waits.
        routed_tokens: rows that this rank's experts received.
    """

    bytes_sent: int = 0
    dispatch_bytes: int = 0
    wait_seconds: float = 0.0
    routed_tokens: int = 0

    def take(self) -> Traffic:
        """Return a copy and reset all counts to zero."""
        taken = replace(self)
        self.bytes_sent = self.dispatch_bytes = self.routed_tokens = 0
        self.wait_seconds = 0.0
        return taken


@dataclass(frozen=True)
class ExpertLink:
    """How one layer's tokens travel to their experts.

    Attributes:
        placement: experts on each rank of `group`.
        group: the expert group; None where all experts are on this rank.
        nodes: groups inside and between nodes, for an exchange in two steps; None for one step.
        int8: whether int8 codes travel as one byte each; else values travel in the compute dtype.
        backward_int8: whether the gradient of codes travels as int8 with stochastic rounding.
        traffic: counts what is sent.
    """

    placement: ExpertPlacement
    group: dist.ProcessGroup | None
    nodes: NodeGroups | None
    int8: bool
    backward_int8: bool
    traffic: Traffic


@dataclass(frozen=True)
class SplitSizes:
    """Row counts between this rank and every other, for rows that travel from tokens to experts.

    Attributes:
        sends: [P] rows that this rank sends, by destination; they sum to S.
        receives: [P] rows that this rank's experts receive, by source; they sum to R.
        transit: [J][A] rows that arrive from each rank of this node and go on to each node; None for one step.
    """

    sends: tuple[int, ...]
    receives: tuple[int, ...]
    transit: tuple[tuple[int, ...], ...] | None = None


def start_all_to_all(rows: Tensor, splits: SplitSizes, to_source: bool, link: ExpertLink) -> Callable[[], Tensor]:
    """Start an exchange, and return at once. Collective, in the same order on all ranks.

    Args:
        rows: [S,·] sorted by destination; with `to_source` [R,·] sorted by source.
        splits: row counts.
        to_source: from the experts back to the ranks of the tokens.
        link: how rows travel.

    Returns:
        A function that waits and returns [R,·] sorted by source; with `to_source` [S,·] sorted by destination.
    """
    assert link.group is not None
    as_bytes = rows.contiguous().view(torch.uint8)
    start = _start_two_steps if link.nodes else _start_one_step
    pending = start(as_bytes, splits, to_source, link)

    def wait() -> Tensor:
        begin = time.perf_counter()
        received = pending()
        link.traffic.wait_seconds += time.perf_counter() - begin
        return received.view(rows.dtype)

    return wait


def _start_one_step(rows: Tensor, splits: SplitSizes, to_source: bool, link: ExpertLink) -> Callable[[], Tensor]:
    sends, receives = (splits.receives, splits.sends) if to_source else (splits.sends, splits.receives)
    received = rows.new_empty(sum(receives), rows.shape[1])
    link.traffic.bytes_sent += (sum(sends) - sends[link.placement.rank]) * rows.shape[1]
    work = dist.all_to_all_single(received, rows, list(receives), list(sends), group=link.group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return received

    return wait


def _start_two_steps(rows: Tensor, splits: SplitSizes, to_source: bool, link: ExpertLink) -> Callable[[], Tensor]:
    nodes, transit = link.nodes, splits.transit
    assert nodes is not None and transit is not None
    size, count = nodes.ranks_per_node, nodes.num_nodes
    local_index, node = link.placement.rank % size, link.placement.rank // size
    # Rows between this rank and each local index of its node, and each node.
    sent_inside = [sum(splits.sends[j::size]) for j in range(size)]
    received_inside = [sum(row) for row in transit]
    sent_between = [sum(column) for column in zip(*transit, strict=True)]
    received_between = [sum(splits.receives[a * size :][:size]) for a in range(count)]
    if to_source:
        sent = sum(received_between) - received_between[node] + sum(received_inside) - received_inside[local_index]
    else:
        sent = sum(sent_inside) - sent_inside[local_index] + sum(sent_between) - sent_between[node]
    link.traffic.bytes_sent += sent * rows.shape[1]

    def to_experts(rows: Tensor) -> Tensor:
        by_index = _transpose_blocks(rows, splits.sends, count)
        inside = _all_to_all(by_index, sent_inside, received_inside, nodes.intra_node)
        by_node = _transpose_blocks(inside, [n for row in transit for n in row], size)
        return _all_to_all(by_node, sent_between, received_between, nodes.inter_node)

    def to_tokens(rows: Tensor) -> Tensor:
        inside = _all_to_all(rows, received_between, sent_between, nodes.inter_node)
        by_index = _transpose_blocks(inside, [n for column in zip(*transit, strict=True) for n in column], count)
        here = _all_to_all(by_index, received_inside, sent_inside, nodes.intra_node)
        return _transpose_blocks(here, [n for j in range(size) for n in splits.sends[j::size]], size)

    return run_overlapped(to_tokens if to_source else to_experts, rows, executor=nodes.executor)


def _transpose_blocks(rows: Tensor, sizes: Sequence[int], outer: int) -> Tensor:
    """Blocks of rows of these sizes, stored as [outer, inner] → stored as [inner, outer]."""
    blocks = rows.split(list(sizes))
    inner = len(blocks) // outer
    return torch.cat([blocks[o * inner + i] for i in range(inner) for o in range(outer)])


def _all_to_all(rows: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(receives), rows.shape[1])
    dist.all_to_all_single(received, rows, receives, sends, group=group)
    return received


def exchange_counts(counts: Sequence[Tensor], link: ExpertLink) -> Tensor:
    """Send each rank of the group a few numbers. Collective.

    Args:
        counts: for each rank, [n] int64; n is chosen by the rank that receives them.
        link: how rows travel.

    Returns:
        [P,n] the numbers that each rank sent to this one.
    """
    sent = torch.cat(list(counts))
    sizes = [len(numbers) for numbers in counts]
    own = sizes[link.placement.rank]
    received = sent.new_empty(len(sizes) * own)
    dist.all_to_all_single(received, sent, [own] * len(sizes), sizes, group=link.group)
    link.traffic.bytes_sent += (len(sent) - own) * sent.element_size()
    return received.view(len(sizes), own)


def make_splits(
    sends: list[list[int]], receives: list[list[int]], link: ExpertLink, device: torch.device
) -> list[SplitSizes]:
    """Return the split sizes of several exchanges at once. Collective where there are nodes.

    Args:
        sends: for each exchange, [P] rows that this rank sends.
        receives: for each exchange, [P] rows that its experts receive.
        link: how rows travel.
        device: where numbers are exchanged.
    """
    pairs = list(zip(map(tuple, sends), map(tuple, receives), strict=True))
    nodes = link.nodes
    if nodes is None:
        return [SplitSizes(*pair) for pair in pairs]
    # [J, exchanges, A]: to the rank of this node with index j, all rows for that index on any node.
    counts = torch.tensor(sends, device=device).view(len(sends), nodes.num_nodes, nodes.ranks_per_node)
    counts = counts.permute(2, 0, 1).contiguous()
    link.traffic.bytes_sent += counts[1:].numel() * counts.element_size()

    def exchange(counts: Tensor) -> Tensor:
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=nodes.intra_node)
        return received

    # Not called directly: the executor keeps the order of this group's exchanges.
    transit = run_overlapped(exchange, counts, executor=nodes.executor)().tolist()
    return [SplitSizes(*pair, tuple(tuple(row[i]) for row in transit)) for i, pair in enumerate(pairs)]
