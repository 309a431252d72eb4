"""What a configuration would be: parallel layout and parameters, counted on a model without memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kabrn_dist.config import Config
from kabrn_dist.mesh import alone
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.parallel.placement import Placement


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        total: of the whole model; active: that one token passes through; expert: of one routed expert of one layer;
        ternary: that are ternary in the forward pass; per_rank: held by each rank of an expert group, before ZeRO.
    """

    total: int
    active: int
    expert: int
    ternary: int
    per_rank: tuple[int, ...]


def count_parameters(config: Config) -> Parameters:
    """Count on the meta device: nothing is allocated."""
    settings = config.model
    with torch.device("meta"):
        model = MixKABRN(settings, Placement((settings.experts.routed,), 0), alone("meta"))
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for p in model.routed_parameters())
    expert = routed // (settings.experts.routed * len(settings.layers))
    dense = total - routed
    # The embedding is a look-up of one row.
    active = dense - settings.vocabulary * settings.width + settings.width
    active += expert * settings.experts.top_k * len(settings.layers)
    ternary = sum(w.numel() for _, w in model.bit_weights()) if settings.quantise else 0
    per_rank = tuple(dense + expert * n * len(settings.layers) for n in config.placement())
    return Parameters(total, active, expert, ternary, per_rank)


def describe(config: Config, world: int) -> str:
    """What `--dry-run` prints: the layout on `world` processes, the parameters, and the length of the run."""
    counts, training = count_parameters(config), config.training
    expert, sequence = config.parallel.expert, config.parallel.sequence
    tokens = training.batch * config.data.sequence_length
    mebibytes = (counts.ternary / 4 + 2 * (counts.total - counts.ternary)) / 2**20
    groups = "; ".join(str(list(range(a, a + expert))) for a in range(0, world, expert)[:4]) if expert > 1 else "none"
    more = " …" if expert > 1 and world // expert > 4 else ""
    lines = [
        f"processes            {world} (ZeRO {config.parallel.zero}, expert parallelism {expert}, "
        f"sequence parallelism {sequence}: slices of {config.data.sequence_length // sequence} tokens)",
        f"expert groups        {groups}{more}",
        f"experts per rank     {list(config.placement())}",
        f"parameters           {counts.total:,} in all, {counts.active:,} active per token",
        f"of one expert        {counts.expert:,} (× {config.model.experts.routed} routed × {len(config.model.layers)})",
        f"ternary              {counts.ternary:,} ({counts.ternary / counts.total:.1%}); "
        f"{mebibytes:.2f} MiB at 2 bits each and 2 bytes for the rest",
        f"held per rank        {' or '.join(f'{n:,}' for n in sorted(set(counts.per_rank)))} before ZeRO",
        f"one step             {training.batch} sequences = {tokens:,} tokens: {world // sequence} data ranks × "
        f"{config.accumulation(world)} micro-batches × {training.micro_batch}",
        f"the run              {training.steps:,} steps = {training.steps * tokens:,} tokens, {training.precision}",
    ]
    return "\n".join(lines)
