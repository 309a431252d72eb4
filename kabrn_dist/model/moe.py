"""Mixture of KAN experts (DeepSeekMoE, arXiv 2401.06066): a router, routed experts on all ranks, shared experts here.

Shapes: B batch, T time, D width, N = B·T tokens, E routed experts, k experts a token visits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from kabrn_dist.config import Experts as Settings
from kabrn_dist.model.bitlinear import quantise, rms_norm, widen
from kabrn_dist.model.initial import draw_normal
from kabrn_dist.model.kan.forms import FORMS
from kabrn_dist.parallel.dispatch import combine, dispatch, plan_route
from kabrn_dist.parallel.placement import Placement


class RouterSums(NamedTuple):
    """What a router says of its tokens, as sums over them, so that batches can be added up in any split.

    Attributes:
        balance: scalar, Σ over sequences of the balance loss. Differentiable.
        z: scalar, Σ over tokens of logsumexp(logits)². Differentiable.
        load: [E] copies sent to each expert.
        entropy: scalar, Σ over tokens of the entropy of the scores, in nats.
    """

    balance: Tensor
    z: Tensor
    load: Tensor
    entropy: Tensor


class Router(nn.Module):
    """Scores in fp32, the k best experts, and their weights, which sum to 1 for each token."""

    def __init__(self, width: int, settings: Settings, sequence_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.settings, self.sequence_group = settings, sequence_group
        self.weight = nn.Parameter(torch.empty(settings.routed, width))

    def initialise(self, seed: int, name: str) -> None:
        self.weight.data.copy_(draw_normal(seed, f"{name}.weight", tuple(self.weight.shape), 0.02))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, RouterSums]:
        """[B,T,D] normalised → choice [N,k] int64, weights [N,k] fp32, sums.

        Balance: sequence-wise (DeepSeek-V3, arXiv 2412.19437, eq. 17–20), so that no split of the batch changes it.
        """
        k, experts = self.settings.top_k, self.settings.routed
        logits = F.linear(widen(x), widen(self.weight))
        scores = logits.sigmoid() if True else logits.softmax(-1)
        shares = scores / scores.sum(-1, keepdim=True)
        # A stable sort breaks ties by the expert's number, on every device and in every run.
        choice = scores.detach().argsort(dim=-1, descending=True, stable=True)[..., :k]
        chosen = scores.gather(-1, choice)
        sent = torch.zeros_like(scores).scatter_(-1, choice, 1.0)
        balance = (self._frequency(sent) * (experts / k) * shares.sum(1)).sum()
        entropy = -(shares * shares.clamp(min=1e-20).log()).sum()
        sums = RouterSums(balance, logits.logsumexp(-1).square().sum(), sent.sum((0, 1)).detach(), entropy.detach())
        weights = chosen / chosen.sum(-1, keepdim=True)
        return choice.flatten(0, 1), weights.flatten(0, 1), sums

    def _frequency(self, sent: Tensor) -> Tensor:
        """[B,T,E] copies sent → [B,E] of whole sequences, divided by the square of their length.

        The loss is linear in the scores, so slices need each other's counts only, and no gradient travels.
        """
        counts, length = sent.sum(1), sent.shape[1]
        if self.sequence_group is not None:
            dist.all_reduce(counts, group=self.sequence_group)
            length *= dist.get_world_size(self.sequence_group)
        return counts / length**2


class MixtureOfExperts(nn.Module):
    """x → Σ shared(x) + Σ weight·routed(x), over one normalised and quantised input.

    Args:
        placement: the routed experts of each rank of `group`; this rank holds `placement.local`.
        group: the expert group; None when all experts are here.
        sequence_group: the ranks that hold slices of the same sequences; None when they are whole.
    """

    def __init__(
        self,
        width: int,
        settings: Settings,
        quantised: bool,
        gain: float,
        placement: Placement,
        group: dist.ProcessGroup | None,
        sequence_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.quantised, self.placement, self.group = settings, quantised, placement, group
        form = FORMS[settings.form]
        self.router = Router(width, settings, sequence_group)
        self.routed = form(width, settings.hidden, settings, placement.local, quantised, gain)
        self.shared = (
            form(width, settings.hidden, settings, range(settings.shared), quantised, gain) if settings.shared else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, RouterSums]:
        """[B,T,D] → [B,T,D] and the router's sums."""
        normed = rms_norm(x)
        choice, weights, sums = self.router(normed)
        codes, scale = (part.flatten(0, 1) for part in quantise(normed, self.quantised))
        route = plan_route(choice, self.placement, self.group)
        k = self.settings.top_k
        arrived = dispatch(codes, k, route, self.group), dispatch(scale, k, route, self.group)
        out = combine(self.routed(*arrived, route.counts), weights, route, self.group)
        if self.shared is not None:
            copies = self.settings.shared
            every = (part.repeat(copies, 1) for part in (codes, scale)) if copies > 1 else (codes, scale)
            out = out + self.shared(*every, [len(codes)] * copies).view(copies, *out.shape).sum(0)
        return out.view_as(x), sums


def mixture_naive(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """The layer by definition, on one process: every expert sees every token, and weights pick. [B,T,D] → same."""
    normed = rms_norm(x)
    choice, weights, _ = layer.router(normed)
    codes, scale = (part.flatten(0, 1) for part in quantise(normed, layer.quantised))
    dense = torch.zeros(len(choice), layer.placement.total, dtype=weights.dtype).scatter(1, choice, weights)
    everyone = _every_expert(layer.routed, codes, scale)
    out = torch.einsum("ne,end->nd", dense.to(everyone.dtype), everyone)
    if layer.shared is not None:
        out = out + _every_expert(layer.shared, codes, scale).sum(0)
    return out.view_as(x)


def _every_expert(experts: nn.Module, codes: Tensor, scale: Tensor) -> Tensor:
    n = len(experts.experts)  # type: ignore[arg-type]
    return experts(codes.repeat(n, 1), scale.repeat(n, 1), [len(codes)] * n).view(n, *codes.shape)
