"""Load-balance metrics of the mixtures of experts, per layer, for one optimizer step.

Shapes: L mixture layers, E routed experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.distributed.all_to_all import Traffic
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.model.mixkabrn import BatchStats

# An expert with a smaller fraction of its ideal load learns next to nothing.
UNDERUSED = 0.1


class MoEStepStats(NamedTuple):
    """One optimizer step's mixtures, over all ranks and micro-batches.

    Attributes:
        layers: numbers of the L layers that hold a mixture.
        tokens: tokens that each layer saw.
        tokens_per_expert: [L,E] tokens routed to each expert, dropped ones included.
        entropy: [L] Σ over tokens of the routers' entropy in nats.
        dropped: [L] routed tokens beyond the experts' capacity.
        bias: [L,E] the routers' balancing bias.
        traffic: [W,L,3] for each rank: routed tokens that arrived at its experts, bytes that it sent to other ranks,
            seconds in the exchange; None if nothing is exchanged.
    """

    layers: Sequence[int]
    tokens: int
    tokens_per_expert: Tensor
    entropy: Tensor
    dropped: Tensor
    bias: Tensor
    traffic: Tensor | None = None


def gather_moe_stats(
    mesh: Mesh, layers: Sequence[int], tokens: int, sums: Sequence[BatchStats], bias: Tensor, traffic: Sequence[Traffic]
) -> MoEStepStats:
    """Add up the statistics of all ranks and micro-batches of a step. Collective.

    Args:
        mesh: all ranks.
        layers: numbers of the L layers that hold a mixture.
        tokens: tokens that each layer saw on all ranks.
        sums: this rank's statistics, one entry per micro-batch.
        bias: [L,E] the routers' balancing bias.
        traffic: this rank's counters, one entry per layer.
    """
    tokens_per_expert, entropy, dropped = (
        mesh.all_reduce_sum(torch.stack([getattr(s, name) for s in sums]).sum(0))
        for name in ("tokens_per_expert", "entropy", "dropped")
    )
    all_traffic = None
    if mesh.expert_parallel > 1:
        own = [[layer.routed_tokens, layer.bytes_sent, layer.wait_seconds] for layer in traffic]
        all_traffic = torch.zeros(mesh.world_size, len(traffic), 3, dtype=torch.float64, device=mesh.device)
        all_traffic[mesh.rank] = torch.tensor(own, dtype=torch.float64).view(-1, 3)
        all_traffic = mesh.all_reduce_sum(all_traffic)
    return MoEStepStats(layers, tokens, tokens_per_expert, entropy, dropped, bias, all_traffic)


class LoadBalance(NamedTuple):
    """Evenness of expert loads; every field has the loads' shape without its last axis, float64.

    Attributes:
        most: largest load over the ideal, which is the mean.
        least: smallest load over the ideal.
        variation: standard deviation over mean (CV).
        violation: (max − mean) / mean, MaxVio of Wang et al. (arXiv 2408.15664, eq. 4).
        dead: number of experts without a token.
        underused: number of experts below `UNDERUSED` of the ideal, dead ones included.
    """

    most: Tensor
    least: Tensor
    variation: Tensor
    violation: Tensor
    dead: Tensor
    underused: Tensor


def measure_balance(tokens_per_expert: Tensor) -> LoadBalance:
    """Return the balance of loads […,E]. A layer without a token has a load of 0 everywhere."""
    loads = tokens_per_expert.detach().double().cpu()
    relative = loads / loads.mean(-1, keepdim=True).clamp(min=1e-9)
    most = relative.amax(-1)
    dead, underused = ((relative <= limit).sum(-1).double() for limit in (0.0, UNDERUSED))
    return LoadBalance(most, relative.amin(-1), relative.std(-1, correction=0), most - 1, dead, underused)


def expert_values(stats: MoEStepStats) -> dict[str, float]:
    """Return the few scalars of each layer that tell a balanced mixture from a collapsed one, by name in the log."""
    balance = measure_balance(stats.tokens_per_expert)
    bias = stats.bias.detach().double().cpu()
    columns: dict[str, Tensor] = {
        "load_max": balance.most,
        "load_min": balance.least,
        "maxvio": balance.violation,
        "dead": balance.dead,
        "router_entropy": stats.entropy.detach().double().cpu() / stats.tokens,
        "bias_range": bias.amax(-1) - bias.amin(-1),
    }
    dropped = stats.dropped.detach().double().cpu()
    if bool(dropped.any()):
        columns["dropped"] = dropped / stats.tokens_per_expert.detach().double().cpu().sum(-1).clamp(min=1)
    return {
        f"experts/{name}/layer_{layer}": value
        for name, column in columns.items()
        for layer, value in zip(stats.layers, column.tolist(), strict=True)
    }


def expert_lists(stats: MoEStepStats) -> dict[str, list[object]]:
    """Return all loads and each rank's traffic, for log.jsonl only; the report on experts draws them.

    Keys: experts/layers [L], experts/load [L][E], and with traffic experts/copies, experts/bytes, experts/seconds,
    each [W][L].
    """
    lists: dict[str, list[object]] = {
        "experts/layers": list(stats.layers),
        "experts/load": stats.tokens_per_expert.detach().round().to(torch.int64).tolist(),
    }
    if stats.traffic is not None:
        traffic = stats.traffic.detach().double().cpu()
        lists["experts/copies"] = traffic[..., 0].round().to(torch.int64).tolist()
        lists["experts/bytes"] = traffic[..., 1].round().to(torch.int64).tolist()
        lists["experts/seconds"] = [[round(value, 6) for value in rank] for rank in traffic[..., 2].tolist()]
    return lists
