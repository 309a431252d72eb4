"""What reaches the learned functions: validation sequences run through the model, layer by layer.

Shapes: B batch, T time, D width, N = B·T tokens, E experts, k experts a token visits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.analysis.run import Network, list_networks
from kabrn_dist.data.dataset import Batch
from kabrn_dist.model.mixer import make_position_info
from kabrn_dist.model.mixkabrn import Block, MixKABRN
from kabrn_dist.model.moe import MixtureOfExperts, RouterInputs
from kabrn_dist.ops.activation_quant import normalize_quantize


class Rows(NamedTuple):
    """What one network reads: codes [R,D] over scales [R,1], rows sorted by expert, `counts` of each expert."""

    network: Network
    codes: Tensor
    scale: Tensor
    counts: list[int]


class Reach(NamedTuple):
    """How far a network's inputs reach.

    Attributes:
        counts: [E] rows of each expert.
        outside: "inner", "outer" → [E] share of the values outside the range of the functions before and after the
            hidden layer; NaN for an expert without rows; empty for a form without functions.
        quantile: 99.9 % of the inner functions' inputs are smaller in size.
    """

    counts: Tensor
    outside: dict[str, Tensor]
    quantile: float


@torch.no_grad()
def measure_reach(model: MixKABRN, batch: Batch) -> list[Reach]:
    """One `Reach` a network, in the order of `list_networks`. The model must be whole, in this process."""
    return [_reach(rows) for rows in read_inputs(model, batch)]


def read_inputs(model: MixKABRN, batch: Batch) -> Iterator[Rows]:
    """The stream of a forward pass, stopped in front of every network."""
    place = make_position_info(batch.documents, batch.positions, model.config.retention.key_dim)
    x, row = model.embedding(batch.tokens), 0
    networks = list_networks(model)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        mixed = x + block.mixer(x, place, None)[0]
        normed = normalize_quantize(mixed, False).codes
        codes, scale, _ = normalize_quantize(mixed, model.config.quantize).rows()
        guide, choice = None, None
        if isinstance(block.mixture, MixtureOfExperts):
            guide = RouterInputs(model.routers.bias[row], model.routers.prev_load[row], model.routers.step, None)
            choice, row = block.mixture.router(normed, *guide).expert_ids, row + 1
        for network in (each for each in networks if each.layer == layer):
            everyone = torch.arange(len(network.experts.expert_ids)).expand(len(codes), -1)
            chosen = choice if network.kind == "routed" and choice is not None else everyone
            yield _sort(network, codes, scale, chosen)
        x = block(x, place, None, guide)[0]


def _sort(network: Network, codes: Tensor, scale: Tensor, choice: Tensor) -> Rows:
    """Copies of the rows by expert; a choice [N,k] of E stands for a dropped copy."""
    experts = len(network.experts.expert_ids)
    flat = choice.flatten()
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    rows = flat.argsort(stable=True)[: sum(counts)] // choice.shape[1]
    return Rows(network, codes[rows], scale[rows], counts)


def _reach(rows: Rows) -> Reach:
    counts = torch.tensor(rows.counts)
    outside = rows.network.experts.outside(rows.codes, rows.scale, rows.counts)
    empty = counts == 0
    sizes = (rows.codes / rows.scale).abs().flatten().float()
    at = max(1, round(0.999 * len(sizes)))
    quantile = float(sizes.kthvalue(at).values) if len(sizes) else float("nan")
    return Reach(counts, {role: v.masked_fill(empty, float("nan")) for role, v in outside.items()}, quantile)
