"""Rows between the ranks of an expert group: all-to-all with exact split sizes, beside the caller's work.

Where the group spans several machines, rows go inside the machine first, to the rank that has the destination's place
there, and then between machines: each pair of machines is crossed by a few long messages instead of many short ones.

Shapes: P ranks of the group, A machines of L ranks each (P = A·L); rank b·L + j is the j-th of machine b.
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


@dataclass
class Traffic:
    """What one layer's exchanges have cost since the last `take`. Every exchange counts, those of recomputation too.

    Attributes:
        bytes_sent: handed to collectives for other ranks, forward and backward, counts of rows included.
        bytes_dispatch: of these, the rows that dispatch sends forward.
        seconds: spent waiting for exchanges, forward and backward (on a GPU by the host alone, which hardly waits).
        rows: copies that arrived at this rank's experts.
    """

    bytes_sent: int = 0
    dispatch_bytes: int = 0
    wait_seconds: float = 0.0
    routed_tokens: int = 0

    def take(self) -> Traffic:
        """What there is, and begin again at zero."""
        taken = replace(self)
        self.bytes_sent = self.dispatch_bytes = self.routed_tokens = 0
        self.wait_seconds = 0.0
        return taken


@dataclass(frozen=True)
class ExpertLink:
    """How one layer's copies travel.

    Attributes:
        placement: experts on each rank of `group`.
        group: the expert group; None when all experts are here.
        nodes: groups inside and between machines, for an exchange in two steps; None for one step.
        int8: codes that are whole numbers −128…127 travel as one byte each; otherwise all travel as they are.
        backward_int8: the gradient of codes travels as int8 with stochastic rounding; otherwise as it is.
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
    """Rows between this rank and each other one, seen from the tokens' home.

    Attributes:
        sends: [P] rows that leave this rank as a home, by destination.
        receives: [P] rows that reach this rank's experts, by home.
        through: [L][A] rows that come from each neighbour on this machine, and go on to this rank's counterpart on
            each machine; None for an exchange in one step.
    """

    sends: tuple[int, ...]
    receives: tuple[int, ...]
    transit: tuple[tuple[int, ...], ...] | None = None


def start_all_to_all(rows: Tensor, splits: SplitSizes, homeward: bool, wire: ExpertLink) -> Callable[[], Tensor]:
    """Start an exchange. Collective, in the same order on all ranks.

    Args:
        rows: [S,W] by destination; homeward [R,W] by home.
        homeward: from the experts to the tokens' homes instead of there.

    Returns:
        A function that waits and gives [R,W] by home; homeward [S,W] by destination.
    """
    assert wire.group is not None
    as_bytes = rows.contiguous().view(torch.uint8)
    wait = _launch_steps(as_bytes, splits, homeward, wire) if wire.nodes else _launch(as_bytes, splits, homeward, wire)

    def arrive() -> Tensor:
        begin = time.perf_counter()
        arrived = wait()
        wire.traffic.wait_seconds += time.perf_counter() - begin
        return arrived.view(rows.dtype)

    return arrive


def _launch(rows: Tensor, splits: SplitSizes, homeward: bool, wire: ExpertLink) -> Callable[[], Tensor]:
    sends, receives = (splits.receives, splits.sends) if homeward else (splits.sends, splits.receives)
    arrived = rows.new_empty(sum(receives), rows.shape[1])
    wire.traffic.bytes_sent += (sum(sends) - sends[wire.placement.rank]) * rows.shape[1]
    work = dist.all_to_all_single(arrived, rows, list(receives), list(sends), group=wire.group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return arrived

    return wait


def _launch_steps(rows: Tensor, splits: SplitSizes, homeward: bool, wire: ExpertLink) -> Callable[[], Tensor]:
    nodes = wire.nodes
    assert nodes is not None and splits.transit is not None
    place, machine = wire.placement.rank % nodes.ranks_per_node, wire.placement.rank // nodes.ranks_per_node
    to_places = [sum(splits.sends[j :: nodes.ranks_per_node]) for j in range(nodes.ranks_per_node)]
    from_places = [sum(row) for row in splits.transit]
    to_machines = [sum(column) for column in zip(*splits.transit, strict=True)]
    from_machines = [
        sum(splits.receives[a * nodes.ranks_per_node :][: nodes.ranks_per_node]) for a in range(nodes.num_nodes)
    ]
    if homeward:
        sent = sum(from_machines) - from_machines[machine] + sum(from_places) - from_places[place]
    else:
        sent = sum(to_places) - to_places[place] + sum(to_machines) - to_machines[machine]
    wire.traffic.bytes_sent += sent * rows.shape[1]
    through = [n for row in splits.transit for n in row]
    back = [n for column in zip(*splits.transit, strict=True) for n in column]

    def out() -> Tensor:
        by_place = _swap(rows, splits.sends, nodes.num_nodes)
        here = _exchange(by_place, to_places, from_places, nodes.intra_node)
        return _exchange(_swap(here, through, nodes.ranks_per_node), to_machines, from_machines, nodes.inter_node)

    def home() -> Tensor:
        here = _exchange(rows, from_machines, to_machines, nodes.inter_node)
        by_place = _exchange(_swap(here, back, nodes.num_nodes), from_places, to_places, nodes.intra_node)
        sizes = [n for j in range(nodes.ranks_per_node) for n in splits.sends[j :: nodes.ranks_per_node]]
        return _swap(by_place, sizes, nodes.ranks_per_node)

    return _beside(home if homeward else out, rows, nodes)


def _swap(rows: Tensor, sizes: Sequence[int], outer: int) -> Tensor:
    """Blocks of rows that lie as [outer, inner], of these sizes, laid as [inner, outer]."""
    blocks = rows.split(list(sizes))
    inner = len(blocks) // outer
    return torch.cat([blocks[o * inner + i] for i in range(inner) for o in range(outer)])


def _exchange(rows: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(receives), rows.shape[1])
    dist.all_to_all_single(arrived, rows, receives, sends, group=group)
    return arrived


def _beside(run: Callable[[], Tensor], rows: Tensor, nodes: NodeGroups) -> Callable[[], Tensor]:
    if rows.device.type != "cuda":
        return nodes.executor.submit(run).result
    side, main = torch.cuda.Stream(rows.device), torch.cuda.current_stream(rows.device)
    side.wait_stream(main)
    rows.record_stream(side)
    with torch.cuda.stream(side):
        arrived = run()

    def wait() -> Tensor:
        now = torch.cuda.current_stream(rows.device)
        now.wait_stream(side)
        arrived.record_stream(now)
        return arrived

    return wait


def exchange_counts(loads: Sequence[Tensor], wire: ExpertLink) -> Tensor:
    """Tell each rank of the group a few numbers. Collective.

    Args:
        loads: for each rank, [n] int64 for it; n is the rank's own number of them.

    Returns:
        [P,n] what each rank has told this one.
    """
    told = torch.cat(list(loads))
    sizes = [len(load) for load in loads]
    own = sizes[wire.placement.rank]
    heard = told.new_empty(len(sizes) * own)
    dist.all_to_all_single(heard, told, [own] * len(sizes), sizes, group=wire.group)
    wire.traffic.bytes_sent += (len(told) - own) * told.element_size()
    return heard.view(len(sizes), own)


def make_splits(
    sends: list[list[int]], receives: list[list[int]], wire: ExpertLink, device: torch.device
) -> list[SplitSizes]:
    """Splits of several exchanges at once, [P] rows each way for each. Collective where there are nodes."""
    pairs = list(zip(map(tuple, sends), map(tuple, receives), strict=True))
    nodes = wire.nodes
    if nodes is None:
        return [SplitSizes(*pair) for pair in pairs]
    # [L, exchanges, A]: to the neighbour with place j, all rows for that place on any machine.
    told = (
        torch.tensor(sends, device=device)
        .view(len(sends), nodes.num_nodes, nodes.ranks_per_node)
        .permute(2, 0, 1)
        .contiguous()
    )
    wire.traffic.bytes_sent += told[1:].numel() * told.element_size()

    def tell() -> Tensor:
        heard = torch.empty_like(told)
        dist.all_to_all_single(heard, told, group=nodes.intra_node)
        return heard

    # In turn with the other exchanges of that group.
    numbers = _beside(tell, told, nodes)().tolist()
    return [SplitSizes(*pair, tuple(tuple(row[i]) for row in numbers)) for i, pair in enumerate(pairs)]
