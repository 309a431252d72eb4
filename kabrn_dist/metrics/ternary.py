"""The instruments of ternary weights: sums that add up over pieces, ranks and layouts, and what they say of a layer.

Shapes: L layers, M ternary matrices or stacks of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.backend.deepspeed import gathered, is_expert
from kabrn_dist.backend.engine import Engine
from kabrn_dist.backend.ternary_sharding import TernaryShard
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.weight_quant import absmean_quantize, round_latents
from kabrn_dist.plots.weights import BINS, TernaryFigure, count_latents

# Rows and columns of a matrix in its picture.
CORNER = 64


class TernaryStats(NamedTuple):
    """Sums over weights, float64 scalars or [L]. Those of all pieces of a tensor add up to those of the whole.

    Attributes:
        total: weights. minus, zero, plus: of them with the code −1, 0, +1. flips: whose code has changed.
        distance: Σ | |w| − γ/2 | / (γ/2), how far latents are from the nearest threshold, in thresholds.
        scale: Σ γ.
    """

    total: Tensor
    minus: Tensor
    zero: Tensor
    plus: Tensor
    flips: Tensor
    distance: Tensor
    scale: Tensor

    def values(self) -> dict[str, Tensor]:
        """Means: the shares `minus`, `zero`, `plus` and `flips`, `margin` and `scale`.

        The margin is the mean distance of |w| from the threshold γ/2 at which its code changes, relative to that
        threshold: 0 where all latents lie on it, 1.31 for Gaussian ones. (The mean of |w| relative to the threshold
        says nothing: γ is the mean of |w|, so it is 2 whatever the weights are.)
        """
        shares = {name: getattr(self, name) / self.total for name in ("minus", "zero", "plus", "flips")}
        return shares | {"margin": self.distance / self.total, "scale": self.scale / self.total}


def weight_sums(latent: Tensor, codes: Tensor, gamma: Tensor, before: Tensor | None = None) -> TernaryStats:
    """The sums of any piece of a ternary matrix, or of several.

    Args:
        latent: high-precision weights, of any shape and float dtype.
        codes: their −1, 0, 1, of the same shape and any dtype.
        gamma: the scale of each weight's matrix, which broadcasts to that shape.
        before: the codes before an update; None counts no flips.
    """
    sizes = latent.detach().float().abs()
    half = gamma.float() / 2
    counted = [(codes == value).sum() for value in (-1, 0, 1)]
    flips = (codes != before).sum() if before is not None else torch.zeros((), device=latent.device)
    distance = ((sizes - half).abs() / half).sum(dtype=torch.float64)
    scale = gamma.expand_as(latent).sum(dtype=torch.float64)
    total = torch.tensor(latent.numel(), device=latent.device)
    return TernaryStats(*(part.double() for part in (total, *counted, flips, distance, scale)))


def named_bit_weights(model: MixKABRN) -> Iterator[tuple[int, str, torch.nn.Parameter]]:
    """(layer, name within the layer, latent weight [O,I] or [E,O,I]) of every ternary matrix."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for layer, weight in model.ternary_weights():
        yield layer, names[id(weight)].removeprefix(f"blocks.{layer}.").removesuffix(".weight"), weight


def current_codes(engine: Engine) -> list[Tensor]:
    """Codes of the matrices that this rank counts, int8, as the forward pass has them now. Collective."""
    return [codes.to(torch.int8) for _, _, codes, _ in _counted(engine)]


def measure_weights(engine: Engine, before: list[Tensor]) -> TernaryStats | None:
    """[L] sums over all matrices of each layer, each counted once, whatever the layout. Collective.

    Args:
        before: `current_codes` before the update.

    Returns:
        None where the model has no ternary weights.
    """
    settings = engine.config.model
    if not settings.quantize:
        return None
    sums = torch.zeros(len(TernaryStats._fields), len(settings.layers), dtype=torch.float64, device=engine.mesh.device)
    for (layer, latent, codes, gamma), old in zip(_counted(engine), before, strict=True):
        sums[:, layer] += torch.stack(weight_sums(latent, codes, gamma, old))
    return TernaryStats(*engine.mesh.all_reduce_sum(sums))


def weight_values(sums: TernaryStats | None) -> dict[str, float]:
    """The layers' means by the names of the log."""
    return {
        f"ternary/{name}/layer_{layer}": value
        for name, column in (sums.values() if sums else {}).items()
        for layer, value in enumerate(column.tolist())
    }


@torch.no_grad()
def collect_figure(name: str, weight: Tensor, group: int | None = None) -> TernaryFigure:
    """The picture's data of a latent weight [O,I], or of a stack [E,O,I]; `group`: outputs that share a scale."""
    latent = weight.detach().view(-1, *weight.shape[-2:])
    codes, gamma = absmean_quantize(latent, group)
    return TernaryFigure(name, count_latents(latent, gamma), codes[0, :CORNER, :CORNER].cpu(), tuple(weight.shape))


def _portray_piece(name: str, shard: TernaryShard, piece: Tensor) -> TernaryFigure:
    """Of the latents that this rank holds, and of the codes of the whole."""
    histogram = torch.zeros(BINS, dtype=torch.float64, device=piece.device)
    for latent, gamma in shard.scaled_runs(piece.detach()):
        histogram += count_latents(latent, gamma)
    codes = shard.matrices().codes(torch.int8)[0, :CORNER, :CORNER].cpu()
    return TernaryFigure(name, histogram, codes, shard.logical)


@torch.no_grad()
def collect_layer_figures(engine: Engine) -> dict[int, list[TernaryFigure]]:
    """Layer → its matrices: latents of all experts, each counted once, and codes of this rank's first. Collective."""
    settings = engine.config.model
    weights = list(named_bit_weights(engine.model)) if settings.quantize else []
    counts = torch.zeros(len(weights), BINS, dtype=torch.float64, device=engine.mesh.device)
    portraits = []
    engine.refresh()
    for number, (_, name, weight) in enumerate(weights):
        shard = engine.ternary_shard(weight)
        if shard is not None:
            portraits.append(_portray_piece(name, shard, weight))
            counts[number] = portraits[-1].histogram
            continue
        with gathered([weight], engine.stage):
            portraits.append(collect_figure(name, weight, settings.scale_group_size))
            if _has_turn(engine, number, weight):
                counts[number] = portraits[-1].histogram
    found: dict[int, list[TernaryFigure]] = {}
    for (layer, _, weight), portrait, histogram in zip(
        weights, portraits, engine.mesh.all_reduce_sum(counts).cpu(), strict=True
    ):
        shard = engine.ternary_shard(weight)
        routed = is_expert(weight) if shard is None else shard.routed
        shape = (settings.experts.num_experts, *portrait.shape[1:]) if routed else portrait.shape
        found.setdefault(layer, []).append(portrait._replace(histogram=histogram, shape=shape))
    return found


@torch.no_grad()
def _counted(engine: Engine) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(layer, latents [E,O,I], codes, γ [E,1,1]) of the matrices that this rank counts. Collective."""
    if not engine.config.model.quantize:
        return
    engine.refresh()
    for number, (layer, weight) in enumerate(engine.model.ternary_weights()):
        shard = engine.ternary_shard(weight)
        if shard is not None:
            yield from ((layer, *part) for part in _counted_pieces(shard, weight))
            continue
        with gathered([weight], engine.stage):
            if _has_turn(engine, number, weight):
                latent = weight.detach().view(-1, *weight.shape[-2:])
                yield layer, latent, *absmean_quantize(latent, engine.config.model.scale_group_size)


def _counted_pieces(shard: TernaryShard, piece: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Latents [n], codes and γ of each run of a piece: no other rank holds them."""
    for latent, gamma in shard.scaled_runs(piece.detach()):
        yield latent, round_latents(latent[None], gamma.view(1, 1))[0], gamma


def _has_turn(engine: Engine, number: int, weight: torch.nn.Parameter) -> bool:
    """Whether this rank counts this matrix: one of those that hold it does, in turns.

    All ranks hold dense ones, and experts are held by the ranks whose place in their expert group is the same.
    """
    mesh = engine.mesh
    holders = mesh.expert_parallel if is_expert(weight) else 1
    return number % (mesh.world_size // holders) == mesh.rank // holders
