"""Feed-forwards of KAN experts: a mixture (DeepSeekMoE, arXiv 2401.06066), or one dense network.

Shapes: B batch, T time, D width, N = B·T tokens, E routed experts, k experts a token visits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kabrn_dist.config import Model as Settings
from kabrn_dist.model.bitlinear import normalise
from kabrn_dist.model.kan.forms import FORMS
from kabrn_dist.model.router import Places, Router, RouterSums
from kabrn_dist.parallel.dispatch import finish_combine, finish_dispatch, start_combine, start_dispatch
from kabrn_dist.parallel.route import plan_route
from kabrn_dist.parallel.wire import Wire


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
        forced: see `Router`.
    """

    def __init__(
        self,
        settings: Settings,
        gain: float,
        wire: Wire,
        sequence_group: dist.ProcessGroup | None = None,
        forced: bool = False,
    ) -> None:
        super().__init__()
        experts, width, self.quantised = settings.experts, settings.width, settings.quantise
        self.settings, self.wire = experts, wire
        form = FORMS[experts.form]
        self.router = Router(width, settings, sequence_group, forced)
        self.routed = form(width, experts.hidden, experts, wire.placement.local, self.quantised, gain)
        self.shared = None
        if experts.shared:
            self.shared = form(width, experts.hidden, experts, range(experts.shared), self.quantised, gain)

    def forward(self, x: Tensor, guide: Guide) -> tuple[Tensor, RouterSums]:
        """[B,T,D] → [B,T,D] and the router's sums.

        While copies travel there, the shared experts run; while results travel back, the router is summed up.
        """
        plain = normalise(x, False)
        routing = self.router(plain.codes, *guide)
        shared_input = normalise(x) if self.quantised else plain
        codes, scale = (part.flatten(0, 1) for part in shared_input)
        route = plan_route(routing.choice, self.wire)
        flight = start_dispatch(codes, scale, route, self.wire)
        shared = self._visit_shared(codes, scale)
        results = self.routed(*finish_dispatch(flight), route.counts)
        back = start_combine(results, routing.weights, route, self.wire)
        sums = self.router.summarise(routing)
        out = finish_combine(back)
        return (out if shared is None else out + shared).view_as(x), sums

    def _visit_shared(self, codes: Tensor, scale: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        copies = self.settings.shared
        if copies == 1:
            return self.shared(codes, scale, [len(codes)])
        every = self.shared(codes.repeat(copies, 1), scale.repeat(copies, 1), [len(codes)] * copies)
        return every.view(copies, *codes.shape).sum(0)


class DenseFeedForward(nn.Module):
    """x → expert(x): one network of the experts' form that every token passes through."""

    def __init__(self, settings: Settings, gain: float) -> None:
        super().__init__()
        self.quantised = settings.quantise
        form = FORMS[settings.experts.form]
        self.shared = form(settings.width, settings.dense_hidden, settings.experts, range(1), self.quantised, gain)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,D] → [B,T,D]."""
        codes, scale = (part.flatten(0, 1) for part in normalise(x, self.quantised))
        return self.shared(codes, scale, [len(codes)]).view_as(x)


def mixture_naive(layer: MixtureOfExperts, x: Tensor, guide: Guide) -> Tensor:
    """The layer by definition, on one process: every expert sees every token, and weights pick. [B,T,D] → same."""
    routing = layer.router(normalise(x, False).codes, *guide)
    experts = layer.wire.placement.total
    codes, scale = (part.flatten(0, 1) for part in normalise(x, layer.quantised))
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
