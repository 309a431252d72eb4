"""Feed-forwards of KAN experts: a mixture (DeepSeekMoE, arXiv 2401.06066), or one dense network.

Shapes: B batch, T time, D width, N = B·T tokens, E routed experts, k experts a token visits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kabrn_dist.config import Model as Settings
from kabrn_dist.distributed.all_to_all import Wire
from kabrn_dist.distributed.token_dispatch import finish_combine, finish_dispatch, start_combine, start_dispatch
from kabrn_dist.distributed.token_permutation import plan_route
from kabrn_dist.model.experts.registry import FORMS
from kabrn_dist.model.router import Places, Router, RouterSums
from kabrn_dist.ops.activation_quant import Quantised, normalise
from kabrn_dist.ops.weight_quant import Blend


class Guide(NamedTuple):
    """What a layer's router goes by beside the tokens themselves: its rows of the `RouterStates`, and the places.

    Attributes:
        bias, share: [E] fp32; step: optimizer steps done.
        places: of the tokens, for jitter; None in decoding.
    """

    bias: Tensor
    share: Tensor
    step: int
    places: Places | None


class MixtureOfExperts(nn.Module):
    """x → Σ shared(x) + Σ weight·routed(x), over one normalised and quantised input.

    Args:
        wire: how copies travel to the experts of other ranks; this rank holds `wire.placement.local`.
        sequence_group: the ranks that hold slices of the same sequences; None when they are whole.
        quantised: False for plain matrices, or what the modules of a model share; default: as the settings say.
        forced: see `Router`.
    """

    def __init__(
        self,
        settings: Settings,
        gain: float,
        wire: Wire,
        sequence_group: dist.ProcessGroup | None = None,
        forced: bool = False,
        quantised: bool | Blend | None = None,
    ) -> None:
        super().__init__()
        experts, width = settings.experts, settings.width
        self.settings, self.wire = experts, wire
        quantised = settings.quantise if quantised is None else quantised
        form = FORMS[experts.form]
        self.router = Router(width, settings, sequence_group, forced)
        self.routed = form(width, experts.hidden, experts, wire.placement.local, quantised, gain)
        self.shared = None
        if experts.shared:
            self.shared = form(width, experts.hidden, experts, range(experts.shared), quantised, gain)

    def forward(self, x: Tensor, guide: Guide) -> tuple[Tensor, RouterSums]:
        """[B,T,D] → [B,T,D] and the router's sums.

        While copies travel there, the shared experts run; while results travel back, the router is summed up.
        """
        plain, share = normalise(x, False), self.routed.share
        routing = self.router(plain.codes, *guide)
        read = (normalise(x, share) if share else plain).rows()
        route = plan_route(routing.choice, self.wire)
        flight = start_dispatch(read.codes, read.scale, route, self.wire, read.kept)
        shared = self._visit_shared(read)
        codes, scale, kept = finish_dispatch(flight)
        results = self.routed(codes, scale, route.counts, kept)
        back = start_combine(results, routing.weights, route, self.wire)
        sums = self.router.summarise(routing)
        out = finish_combine(back)
        return (out if shared is None else out + shared).view_as(x), sums

    def _visit_shared(self, x: Quantised) -> Tensor | None:
        if self.shared is None:
            return None
        copies, rows = self.settings.shared, len(x.codes)
        if copies == 1:
            return self.shared(x.codes, x.scale, [rows], x.kept)
        codes, scale, kept = (None if part is None else part.repeat(copies, 1) for part in x)
        return self.shared(codes, scale, [rows] * copies, kept).view(copies, *x.codes.shape).sum(0)


class DenseFeedForward(nn.Module):
    """x → expert(x): one network of the experts' form that every token passes through."""

    def __init__(self, settings: Settings, gain: float, quantised: bool | Blend | None = None) -> None:
        super().__init__()
        form = FORMS[settings.experts.form]
        quantised = settings.quantise if quantised is None else quantised
        self.shared = form(settings.width, settings.dense_hidden, settings.experts, range(1), quantised, gain)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,D] → [B,T,D]."""
        read = normalise(x, self.shared.share).rows()
        return self.shared(read.codes, read.scale, [len(read.codes)], read.kept).view_as(x)


def mixture_naive(layer: MixtureOfExperts, x: Tensor, guide: Guide) -> Tensor:
    """The layer by definition, on one process: every expert sees every token, and weights pick. [B,T,D] → same."""
    routing = layer.router(normalise(x, False).codes, *guide)
    experts = layer.wire.placement.total
    codes, scale, _ = normalise(x, layer.routed.share).rows()
    # A dropped copy's weight lands in a column of its own, which no expert reads.
    dense = torch.zeros(len(codes), experts + 1, dtype=routing.weights.dtype)
    dense = dense.scatter_add(1, routing.choice, routing.weights)[:, :experts]
    everyone = _every_expert(layer.routed, codes, scale)
    out = torch.einsum("ne,end->nd", dense.to(everyone.dtype), everyone)
    if layer.shared is not None:
        out = out + _every_expert(layer.shared, codes, scale).sum(0)
    return out.view_as(x)


def _every_expert(experts: nn.Module, codes: Tensor, scale: Tensor) -> Tensor:
    n = len(experts.experts)  # type: ignore[arg-type]
    return experts(codes.repeat(n, 1), scale.repeat(n, 1), [len(codes)] * n).view(n, *codes.shape)
