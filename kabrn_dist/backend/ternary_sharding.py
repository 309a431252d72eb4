"""Ternary matrices whose latents are sharded over ranks: the all-gather moves two bits per weight, exactly.

Each rank of a matrix's group (all ranks, or those that hold the same experts) keeps an equal shard of the flattened
fp32 latents, the last ones padded. Once per optimizer step the shards are quantized where they lie and their codes
gathered; all ranks then compute with the same packed codes. Gradients are reduce-scattered to the owner of each shard.

Shapes: E matrices, O output width, I input width, G ranks of the group, S latents of a rank's shard, padding included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import ClassVar

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
    """Consecutive latents of a shard that share a scale.

    Attributes:
        first: index of the first latent in the shard.
        last: index after the last latent.
        scale: number of the scale.
    """

    first: int
    last: int
    scale: int


class TernaryShard(TernarySource):
    """One parameter's matrices, of which this rank holds a shard of the latents.

    Args:
        whole: the latents before sharding.
        group: the ranks that share them; None for one rank.
        scale_group: outputs that share a scale; None for one scale per matrix.
        dtype: dtype of the products' inputs.
        block: the size of a shard is a multiple of this.
        routed: whether they are routed experts, of which other ranks hold others.
        pending: gradient exchanges that have been started, of all matrices.

    Attributes:
        shape: [E,O,I], shape of the whole stack.
        logical: shape of the parameter before sharding, [O,I] for a single matrix.
        size: S.
        start: index of the shard's first latent in the flattened whole.
        count: latents of the shard without padding.
        packed: uint8, codes of all shards, two bits each.
        gamma: scales [E,1,1], or [E,O,1] with several scales per matrix.
        reducer: exchange of the gradient.
    """

    sharded: ClassVar[bool] = True

    def __init__(
        self,
        whole: Tensor,
        group: dist.ProcessGroup | None,
        scale_group: int | None,
        dtype: torch.dtype,
        block: int,
        routed: bool,
        pending: list[GradReduceScatter],
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
        # The outputs of a matrix at which its scales begin.
        self.begins = list(range(0, self.shape[1], rows))
        self.runs = list(self._find_runs())
        self.packed = whole.new_zeros(self.ranks * self.size // 4, dtype=torch.uint8)
        self.gamma = whole.new_ones(self.shape[0], 1, 1, dtype=torch.float32)
        self.reducer = GradReduceScatter(self.shape, (self.ranks, self.size), group, dtype, pending)

    def _find_runs(self) -> Iterator[ScaleRun]:
        experts, outputs, inputs = self.shape
        stops = [*self.begins[1:], outputs]
        for expert in range(experts):
            for number, (begin, stop) in enumerate(zip(self.begins, stops, strict=True)):
                first = max((expert * outputs + begin) * inputs - self.start, 0)
                last = min((expert * outputs + stop) * inputs - self.start, self.count)
                if first < last:
                    yield ScaleRun(first, last, expert * len(self.begins) + number)

    def take_from(self, whole: Tensor) -> Tensor:
        """Return this rank's shard [S] fp32 of the whole latents, padded with zeros."""
        latents = whole.detach().reshape(-1)[self.start : self.start + self.count].float()
        return torch.cat([latents, latents.new_zeros(self.size - self.count)])

    def sums(self, latents: Tensor) -> Tensor:
        """Return Σ|w| of each scale's latents [S] in this shard, fp64."""
        sums = torch.zeros(self.shape[0] * len(self.begins), dtype=torch.float64, device=latents.device)
        for run in self.runs:
            sums[run.scale] = sum_magnitudes(latents[None, run.first : run.last])[0]
        return sums

    def codes(self, latents: Tensor, total: Tensor) -> Tensor:
        """Quantize this shard, and set the scales of the whole.

        Args:
            latents: [S] fp32.
            total: Σ|w| of each scale over all shards, fp64.

        Returns:
            int8 codes [S], zeros for padding.
        """
        outputs, inputs = self.shape[1:]
        rows = torch.tensor([b - a for a, b in zip(self.begins, [*self.begins[1:], outputs], strict=True)])
        counts = (rows * inputs).repeat(self.shape[0]).to(total.device)
        gamma = mean_magnitude(total, counts, torch.float32)
        codes = torch.zeros(self.size, dtype=torch.int8, device=latents.device)
        for run in self.runs:
            codes[run.first : run.last] = round_latents(latents[None, run.first : run.last], gamma[run.scale])[0]
        by_scale = gamma.view(self.shape[0], -1, 1)
        self.gamma = by_scale if len(rows) == 1 else by_scale.repeat_interleave(rows.to(gamma.device), 1)
        return codes

    def scaled_runs(self, latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield consecutive latents [n] of the shard [S] with their scale, a scalar, without padding."""
        scales = self.gamma[:, self.begins if self.gamma.shape[1] > 1 else [0]].reshape(-1)
        for run in self.runs:
            yield latents[run.first : run.last], scales[run.scale]

    def matrices(self) -> TernaryMatrices:
        """Return the matrices as they are now, without gradients."""
        return TernaryMatrices(self.gamma.new_zeros(1, dtype=self.dtype).expand(self.shape), self.packed, self.gamma)

    def read(self, parameter: nn.Parameter) -> TernaryMatrices:
        """Return the matrices for a forward pass; gradients reach `parameter` through the reduce-scatter."""
        # Figures and validation read at any time, also before the first step: no gradient, no anchor.
        if not torch.is_grad_enabled():
            return self.matrices()
        return TernaryMatrices(self.reducer.placeholder(), self.packed, self.gamma)


class TernaryShards:
    """All ternary matrices of a model, sharded.

    Args:
        model: has whole latents, which are replaced by shards here.
        world_group: ranks that share dense matrices; None for one rank.
        expert_data_group: ranks that share routed experts; None for one rank.
        dtype: dtype of the products' inputs.
        packing: format of the codes in the all-gather.
        bucket: number of codes that are gathered together.

    Attributes:
        by_name: sharded matrices by parameter name.
        parameters: this rank's shards by parameter name.
        stale: True if latents have changed since codes were last gathered.
        gatherings: number of times that codes were gathered.
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
        pending: list[GradReduceScatter] = []
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
                    pending,
                )
                latents = nn.Parameter(shard.take_from(whole))
                setattr(module, name, latents)
                module.sources[name] = shard
                self.by_name[f"{prefix}.{name}"], self.parameters[f"{prefix}.{name}"] = shard, latents

    def expect(self, last: bool) -> None:
        """Prepare a forward pass; the gradients of the `last` one of a step are summed at their owners."""
        for name, shard in self.by_name.items():
            shard.reducer.make_anchor(self.parameters[name], last)

    def find(self, parameter: nn.Parameter) -> TernaryShard | None:
        """Return the sharded matrix that a parameter is a shard of; None for other parameters."""
        return next((self.by_name[name] for name, latents in self.parameters.items() if latents is parameter), None)

    @torch.no_grad()
    def gather(self) -> None:
        """Quantize all shards and gather their codes. Collective."""
        groups: dict[bool, list[tuple[TernaryShard, Tensor]]] = {}
        for name, shard in self.by_name.items():
            groups.setdefault(shard.routed, []).append((shard, self.parameters[name].data))
        for members in groups.values():
            totals = self._sum_up(members)
            for bucket in _buckets(list(zip(members, totals, strict=True)), self.bucket):
                self._gather_codes([(shard, shard.codes(latents, total)) for (shard, latents), total in bucket])
        self.gatherings += 1
        self.stale = False

    def _sum_up(self, members: list[tuple[TernaryShard, Tensor]]) -> list[Tensor]:
        """Σ|w| of each matrix's scales over all shards: one all-reduce."""
        sums = [shard.sums(latents) for shard, latents in members]
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
        """Return the memory of codes and scales in bytes."""
        return sum(s.packed.nbytes + s.gamma.nbytes for s in self.by_name.values())


def _buckets(
    members: list[tuple[tuple[TernaryShard, Tensor], Tensor]], limit: int
) -> Iterator[list[tuple[tuple[TernaryShard, Tensor], Tensor]]]:
    """Consecutive matrices whose shards have at most `limit` codes together; a larger one goes alone."""
    bucket: list[tuple[tuple[TernaryShard, Tensor], Tensor]] = []
    size = 0
    for member in members:
        codes = member[0][0].size
        if bucket and size + codes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(member)
        size += codes
    if bucket:
        yield bucket
