"""Ternary matrices whose latents are shared out over ranks: what travels is two bits a weight, exactly.

Each rank of a matrix's group (all ranks, or those that hold the same experts) keeps an equal piece of the flattened
fp32 latents, the last ones padded. Once an optimizer step the pieces are rounded where they lie and their codes
gathered; all ranks then compute with the same packed codes. Gradients come home to the owner of each piece.

Shapes: E matrices, O output width, I input width, G ranks of the group, S latents of a rank's piece, padding included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kabrn_dist.backend.overlapped_reduce import GradReduceScatter
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.packing import WireFormat, pack
from kabrn_dist.ops.weight_quant import (
    TernaryMatrices,
    TernaryModule,
    TernarySource,
    mean_magnitude,
    round_latents,
    sum_magnitudes,
)


@dataclass(frozen=True)
class ScaleRun:
    """Neighbouring latents of a piece that share a scale: elements [first, last) of the piece, scale number `scale`."""

    first: int
    last: int
    scale: int


class TernaryShard(TernarySource):
    """One parameter's matrices, of which this rank holds a piece of the latents.

    Attributes:
        shape: [E,O,I] of the whole. logical: the same, [O,I] for a matrix that is no expert's.
        group: the ranks that share it; None for one rank.
        size: S. start: of this piece in the flattened whole. count: its latents without padding.
        routed: whether they are routed experts, of which other ranks hold others.
        packed: uint8, codes of all pieces, two bits each. gamma: [E,1,1], or [E,O,1] with groups of scales.
    """

    def __init__(
        self,
        whole: Tensor,
        group: dist.ProcessGroup | None,
        scale_group: int | None,
        dtype: torch.dtype,
        block: int,
        routed: bool,
        under_way: list[GradReduceScatter],
    ) -> None:
        shape = tuple(whole.shape)
        self.shape, self.logical = shape if len(shape) == 3 else (1, *shape), shape
        self.group, self.routed, self.dtype = group, routed, dtype
        self.ranks, self.rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        total = prod(self.shape)
        self.size = -(-total // (self.ranks * block)) * block
        self.start = min(self.rank * self.size, total)
        self.count = min(total - self.start, self.size)
        rows = self.shape[1] if scale_group is None else min(scale_group, self.shape[1])
        # Scales of a matrix begin at these of its outputs.
        self.begins = list(range(0, self.shape[1], rows))
        self.runs = list(self._find_runs())
        self.packed = whole.new_zeros(self.ranks * self.size // 4, dtype=torch.uint8)
        self.gamma = whole.new_ones(self.shape[0], 1, 1, dtype=torch.float32)
        self.homing = GradReduceScatter(self.shape, (self.ranks, self.size), group, dtype, under_way)

    def _find_runs(self) -> Iterator[ScaleRun]:
        experts, outputs, inputs = self.shape
        stops = [*self.begins[1:], outputs]
        for expert in range(experts):
            for number, (begin, stop) in enumerate(zip(self.begins, stops, strict=True)):
                first = max((expert * outputs + begin) * inputs - self.start, 0)
                last = min((expert * outputs + stop) * inputs - self.start, self.count)
                if first < last:
                    yield ScaleRun(first, last, expert * len(self.begins) + number)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's piece [S] fp32 of the whole latents, padded with zeros."""
        piece = whole.detach().reshape(-1)[self.start : self.start + self.count].float()
        return torch.cat([piece, piece.new_zeros(self.size - self.count)])

    def sums(self, piece: Tensor) -> Tensor:
        """Σ|w| of each scale's latents in this piece, fp64."""
        found = torch.zeros(self.shape[0] * len(self.begins), dtype=torch.float64, device=piece.device)
        for run in self.runs:
            found[run.scale] = sum_magnitudes(piece[None, run.first : run.last])[0]
        return found

    def codes(self, piece: Tensor, total: Tensor) -> Tensor:
        """int8 codes [S] of the piece, zeros for padding; `total`: Σ|w| of each scale over all pieces."""
        outputs, inputs = self.shape[1:]
        rows = torch.tensor([b - a for a, b in zip(self.begins, [*self.begins[1:], outputs], strict=True)])
        counts = (rows * inputs).repeat(self.shape[0]).to(total.device)
        gamma = mean_magnitude(total, counts, torch.float32)
        found = torch.zeros(self.size, dtype=torch.int8, device=piece.device)
        for run in self.runs:
            found[run.first : run.last] = round_latents(piece[None, run.first : run.last], gamma[run.scale])[0]
        by_scale = gamma.view(self.shape[0], -1, 1)
        self.gamma = by_scale if len(rows) == 1 else by_scale.repeat_interleave(rows.to(gamma.device), 1)
        return found

    def scaled_runs(self, piece: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Neighbouring latents [n] of the piece with their scale, a scalar, without padding."""
        scales = self.gamma[:, self.begins if self.gamma.shape[1] > 1 else [0]].reshape(-1)
        for run in self.runs:
            yield piece[run.first : run.last], scales[run.scale]

    def matrices(self) -> TernaryMatrices:
        """As they are now, without a way for gradients."""
        return TernaryMatrices(self.gamma.new_zeros(1, dtype=self.dtype).expand(self.shape), self.packed, self.gamma)

    def read(self, parameter: nn.Parameter) -> TernaryMatrices:
        # Pictures and validation read at any time, also before the first step: no gradient, no ticket.
        if not torch.is_grad_enabled():
            return self.matrices()
        return TernaryMatrices(self.homing.whole(), self.packed, self.gamma)


class TernaryShards:
    """All ternary matrices of a model, shared out.

    Args:
        model: with whole latents, which it loses here.
        world_group, expert_data_group: ranks that share dense matrices, and routed experts; None for one rank.
        dtype: of the products' inputs.
        packing: how codes travel.
        bucket: codes gathered together.

    Attributes:
        by_name: of the model's parameters.
        stale: latents have changed since codes were last gathered.
        gatherings: that there have been.
    """

    def __init__(
        self,
        model: MixKABRN,
        world_group: dist.ProcessGroup | None,
        expert_data_group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        packing: WireFormat,
        bucket: int,
    ) -> None:
        self.packing, self.bucket = packing, bucket
        self.by_name: dict[str, TernaryShard] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.stale = True
        self.gatherings = 0
        routed = {id(p) for p in model.select_parameters(lambda p: p.routed)}
        under_way: list[GradReduceScatter] = []
        for prefix, module in model.named_modules():
            for name in module.stds if isinstance(module, TernaryModule) else ():
                whole = module.get_parameter(name)
                group = expert_data_group if id(whole) in routed else world_group
                shard = TernaryShard(
                    whole,
                    group,
                    model.quant.scale_group_size,
                    dtype,
                    packing.block_codes,
                    id(whole) in routed,
                    under_way,
                )
                piece = nn.Parameter(shard.cut(whole))
                setattr(module, name, piece)
                module.sources[name] = shard
                self.by_name[f"{prefix}.{name}"], self.parameters[f"{prefix}.{name}"] = shard, piece

    def expect(self, last: bool) -> None:
        """Before each forward pass: do its gradients complete a step? Then they are summed at their owners."""
        for name, shard in self.by_name.items():
            shard.homing.draw_ticket(self.parameters[name], last)

    def find(self, parameter: nn.Parameter) -> TernaryShard | None:
        """What a parameter is a piece of."""
        return next((self.by_name[name] for name, piece in self.parameters.items() if piece is parameter), None)

    @torch.no_grad()
    def gather(self) -> None:
        """Round all pieces and gather their codes. Collective."""
        groups: dict[bool, list[tuple[TernaryShard, Tensor]]] = {}
        for name, shard in self.by_name.items():
            groups.setdefault(shard.routed, []).append((shard, self.parameters[name].data))
        for members in groups.values():
            totals = self._sum_up(members)
            for some in _buckets(list(zip(members, totals, strict=True)), self.bucket):
                self._gather_codes([(shard, shard.codes(piece, total)) for (shard, piece), total in some])
        self.gatherings += 1
        self.stale = False

    def _sum_up(self, members: list[tuple[TernaryShard, Tensor]]) -> list[Tensor]:
        """Σ|w| over all pieces of each shard's scales: one all-reduce."""
        sums = [shard.sums(piece) for shard, piece in members]
        fused, first = torch.cat(sums), members[0][0]
        if first.group is not None:
            dist.all_reduce(fused, group=first.group)
        return list(fused.split([len(part) for part in sums]))

    def _gather_codes(self, members: list[tuple[TernaryShard, Tensor]]) -> None:
        first = members[0][0]
        if first.group is None:
            for shard, codes in members:
                shard.packed = pack(codes)
            return
        sent = torch.cat([self.packing.encode(codes) for _, codes in members])
        arrived = sent.new_empty(first.ranks, len(sent))
        dist.all_gather_into_tensor(arrived.view(-1), sent, group=first.group)
        widths = [self.packing.num_bytes(shard.size) for shard, _ in members]
        for (shard, _), bytes_of_all in zip(members, arrived.split(widths, 1), strict=True):
            shard.packed = self.packing.to_two_bits(bytes_of_all.reshape(-1))

    def resident_bytes(self) -> int:
        """Memory of codes and scales."""
        return sum(s.packed.nbytes + s.gamma.nbytes for s in self.by_name.values())


def _buckets(
    members: list[tuple[tuple[TernaryShard, Tensor], Tensor]], most: int
) -> Iterator[list[tuple[tuple[TernaryShard, Tensor], Tensor]]]:
    """Neighbours whose pieces have at most so many codes in all; a larger one goes alone."""
    some: list[tuple[tuple[TernaryShard, Tensor], Tensor]] = []
    size = 0
    for member in members:
        codes = member[0][0].size
        if some and size + codes > most:
            yield some
            some, size = [], 0
        some.append(member)
        size += codes
    if some:
        yield some
