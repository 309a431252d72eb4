"""The ternary matrices of a model in training, read where they lie: each weight is visited by exactly one rank.

Shapes: E matrices of a stack, O output width, I input width, n latents of a shard that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.backend.deepspeed import gathered
from kabrn_dist.backend.engine import Engine
from kabrn_dist.ops.weight_quant import absmean_quantize, round_latents


class TernaryPart(NamedTuple):
    """A ternary matrix, or a piece of one, that this rank counts.

    Attributes:
        layer: number of the layer.
        latent: high-precision weights, [E,O,I] or [n].
        codes: their −1, 0, 1, of the same shape.
        gamma: scales, which broadcast to that shape.
    """

    layer: int
    latent: Tensor
    codes: Tensor
    gamma: Tensor


@torch.no_grad()
def counted_parts(engine: Engine) -> Iterator[TernaryPart]:
    """Yield the parts that this rank counts: over all ranks every weight once, whatever the layout. Collective.

    A part is only valid until the next one is asked for.
    """
    if not engine.config.model.quantize:
        return
    engine.refresh()
    for number, (layer, _, weight, routed) in enumerate(engine.model.ternary_weights()):
        shard = engine.ternary_shard(weight)
        if shard is not None:
            for latent, gamma in shard.scaled_runs(weight.detach()):
                yield TernaryPart(layer, latent, round_latents(latent[None], gamma.view(1, 1))[0], gamma)
            continue
        with gathered([weight], engine.stage):
            if is_counted_here(engine, number, routed):
                latent = weight.detach().view(-1, *weight.shape[-2:])
                yield TernaryPart(layer, latent, *absmean_quantize(latent, engine.config.model.scale_group_size))


def current_codes(engine: Engine) -> list[Tensor]:
    """Return the int8 codes of `counted_parts`, as the forward pass has them now. Collective."""
    return [part.codes.to(torch.int8) for part in counted_parts(engine)]


def is_counted_here(engine: Engine, number: int, routed: bool) -> bool:
    """Return True on the one of the ranks that hold a matrix that counts it: they take turns.

    All ranks hold dense ones; experts are held by the ranks with the same rank in their expert group.

    Args:
        engine: the model in training.
        number: position of the matrix among `ternary_weights`; it is not sharded.
        routed: whether it belongs to routed experts.
    """
    mesh = engine.mesh
    holders = mesh.expert_parallel if routed else 1
    return number % (mesh.world_size // holders) == mesh.rank // holders
