"""What a step says of its mixtures of experts: from global counts to the figures worth watching.

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

# An expert with less than this share of its ideal load learns next to nothing.
NEARLY_DEAD = 0.1


class MoEStepStats(NamedTuple):
    """One optimizer step's mixtures, over all ranks and micro-batches.

    Attributes:
        layers: numbers of the L layers that hold a mixture.
        tokens: tokens that each layer saw.
        load: [L,E] copies that chose each expert, dropped ones included.
        entropy: [L] Σ over tokens of the routers' entropy in nats.
        dropped: [L] copies beyond the experts' capacity.
        bias: [L,E] the routers' balancing bias.
        traffic: [W,L,3] of each rank: copies that arrived at its experts, bytes that it sent to other ranks, seconds
            in the exchange; None where nothing is exchanged.
    """

    layers: Sequence[int]
    tokens: int
    load: Tensor
    entropy: Tensor
    dropped: Tensor
    bias: Tensor
    traffic: Tensor | None = None


def gather_moe_stats(
    mesh: Mesh, layers: Sequence[int], tokens: int, sums: Sequence[BatchStats], bias: Tensor, traffic: Sequence[Traffic]
) -> MoEStepStats:
    """Add up what all ranks and micro-batches of a step say. Collective.

    Args:
        sums: this rank's, a micro-batch each; traffic: this rank's, a layer each.
    """
    load, entropy, dropped = (
        mesh.all_reduce_sum(torch.stack([getattr(s, name) for s in sums]).sum(0))
        for name in ("tokens_per_expert", "entropy", "dropped")
    )
    everyone = None
    if mesh.expert_parallel > 1:
        own = [[taken.routed_tokens, taken.bytes_sent, taken.wait_seconds] for taken in traffic]
        everyone = torch.zeros(mesh.world_size, len(traffic), 3, dtype=torch.float64, device=mesh.device)
        everyone[mesh.rank] = torch.tensor(own, dtype=torch.float64).view(-1, 3)
        everyone = mesh.all_reduce_sum(everyone)
    return MoEStepStats(layers, tokens, load, entropy, dropped, bias, everyone)


class LoadBalance(NamedTuple):
    """How even loads are; every field has the loads' shape without its last axis, float64.

    Attributes:
        most, least: largest and smallest load over the ideal, the mean.
        variation: standard deviation over mean (CV).
        violation: (max − mean) / mean, MaxVio of Wang et al. (arXiv 2408.15664, eq. 4).
        dead: experts without a copy. starving: experts below `NEARLY_DEAD` of the ideal, dead ones included.
    """

    most: Tensor
    least: Tensor
    variation: Tensor
    violation: Tensor
    dead: Tensor
    underused: Tensor


def measure_balance(load: Tensor) -> LoadBalance:
    """[…,E] copies of each expert → their balance. A layer without a copy has a load of 0 everywhere."""
    load = load.detach().double().cpu()
    share = load / load.mean(-1, keepdim=True).clamp(min=1e-9)
    most = share.amax(-1)
    dead, starving = ((share <= limit).sum(-1).double() for limit in (0.0, NEARLY_DEAD))
    return LoadBalance(most, share.amin(-1), share.std(-1, correction=0), most - 1, dead, starving)


def expert_values(watch: MoEStepStats) -> dict[str, float]:
    """The few figures of each layer that tell a healthy mixture from an ailing one, for TensorBoard and the log."""
    balance = measure_balance(watch.load)
    bias = watch.bias.detach().double().cpu()
    columns: dict[str, Tensor] = {
        "load_max": balance.most,
        "load_min": balance.least,
        "maxvio": balance.violation,
        "dead": balance.dead,
        "router_entropy": watch.entropy.detach().double().cpu() / watch.tokens,
        "bias_range": bias.amax(-1) - bias.amin(-1),
    }
    dropped = watch.dropped.detach().double().cpu()
    if bool(dropped.any()):
        columns["dropped"] = dropped / watch.load.detach().double().cpu().sum(-1).clamp(min=1)
    return {
        f"experts/{name}/layer_{layer}": value
        for name, column in columns.items()
        for layer, value in zip(watch.layers, column.tolist(), strict=True)
    }


def expert_lists(watch: MoEStepStats) -> dict[str, list[object]]:
    """What `launch/report.py experts` draws from, for the log alone: whole loads, and each rank's traffic.

    Keys: experts/layers [L], experts/load [L][E], and with traffic experts/copies, experts/bytes, experts/seconds,
    each [W][L].
    """
    lists: dict[str, list[object]] = {
        "experts/layers": list(watch.layers),
        "experts/load": watch.load.detach().round().to(torch.int64).tolist(),
    }
    if watch.traffic is not None:
        traffic = watch.traffic.detach().double().cpu()
        lists["experts/copies"] = traffic[..., 0].round().to(torch.int64).tolist()
        lists["experts/bytes"] = traffic[..., 1].round().to(torch.int64).tolist()
        lists["experts/seconds"] = [[round(value, 6) for value in rank] for rank in traffic[..., 2].tolist()]
    return lists
