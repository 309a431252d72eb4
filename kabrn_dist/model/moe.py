"""Feed-forwards of KAN experts: a mixture (DeepSeekMoE, arXiv 2401.06066), or one dense network.

Shapes: B batch, T time, D width, N = B·T tokens, E routed experts, k experts a token visits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kabrn_dist.config import ModelConfig
from kabrn_dist.distributed.all_to_all import ExpertLink
from kabrn_dist.distributed.token_dispatch import QuantizedRows, dispatch_tokens
from kabrn_dist.model.experts.registry import EXPERT_TYPES
from kabrn_dist.model.router import Router, RouterStats, TokenCoordinates
from kabrn_dist.ops.activation_quant import Quantized, normalize_quantize
from kabrn_dist.ops.weight_quant import QuantState


class RouterInputs(NamedTuple):
    """What a layer's router goes by beside the tokens themselves: its rows of the `RouterStates`, and the places.

    Attributes:
        bias, share: [E] fp32; step: optimizer steps done.
        places: of the tokens, for jitter; None in decoding.
    """

    bias: Tensor
    prev_load: Tensor
    step: int
    coordinates: TokenCoordinates | None


class MixtureOfExperts(nn.Module):
    """x → Σ shared(x) + Σ weight·routed(x), over one normalised and quantised input.

    Args:
        link: how tokens travel to the experts of other ranks; this rank holds `link.placement.local`.
        sequence_group: the ranks that hold slices of the same sequences; None when they are whole.
        quantised: False for plain matrices, or what the modules of a model share; default: as the settings say.
        forced: see `Router`.
    """

    def __init__(
        self,
        config: ModelConfig,
        init_gain: float,
        link: ExpertLink,
        sequence_group: dist.ProcessGroup | None = None,
        force_load_balance: bool = False,
        quant: bool | QuantState | None = None,
    ) -> None:
        super().__init__()
        experts, width = config.experts, config.hidden_size
        self.config, self.link = experts, link
        quant = config.quantize if quant is None else quant
        form = EXPERT_TYPES[experts.type]
        self.router = Router(width, config, sequence_group, force_load_balance)
        self.routed = form(width, experts.expert_hidden_size, experts, link.placement.local, quant, init_gain)
        self.shared = None
        if experts.num_shared_experts:
            self.shared = form(
                width, experts.expert_hidden_size, experts, range(experts.num_shared_experts), quant, init_gain
            )

    def forward(self, x: Tensor, guide: RouterInputs) -> tuple[Tensor, RouterStats]:
        """Return Σ shared(x) + Σ weight·routed(x) [B,T,D] of x [B,T,D], and the router's statistics.

        The shared experts run while tokens travel, and the router's sums are taken while results travel back.
        """
        plain, lam = normalize_quantize(x, False), self.routed.lam
        routing = self.router(plain.codes, *guide)
        tokens = (normalize_quantize(x, lam) if lam else plain).rows()
        exchange = dispatch_tokens(tokens, routing.expert_ids, self.link)
        shared = self._apply_shared(tokens)
        exchange.apply(self._apply_routed)
        stats = self.router.summarize(routing)
        routed = exchange.combine(routing.weights)
        return (routed if shared is None else routed + shared).view_as(x), stats

    def _apply_routed(self, x: QuantizedRows, tokens_per_expert: list[int]) -> Tensor:
        codes, scale, int8_codes = x
        out: Tensor = self.routed(codes, scale, tokens_per_expert, int8_codes)
        return out

    def _apply_shared(self, x: Quantized) -> Tensor | None:
        if self.shared is None:
            return None
        copies, rows = self.config.num_shared_experts, len(x.codes)
        if copies == 1:
            return self.shared(x.codes, x.scale, [rows], x.int8_codes)
        codes, scale, kept = (None if part is None else part.repeat(copies, 1) for part in x)
        return self.shared(codes, scale, [rows] * copies, kept).view(copies, *x.codes.shape).sum(0)


class DenseFeedForward(nn.Module):
    """x → expert(x): one network of the experts' form that every token passes through."""

    def __init__(self, config: ModelConfig, init_gain: float, quant: bool | QuantState | None = None) -> None:
        super().__init__()
        form = EXPERT_TYPES[config.experts.type]
        quant = config.quantize if quant is None else quant
        self.shared = form(config.hidden_size, config.dense_hidden_size, config.experts, range(1), quant, init_gain)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,D] → [B,T,D]."""
        read = normalize_quantize(x, self.shared.lam).rows()
        return self.shared(read.codes, read.scale, [len(read.codes)], read.int8_codes).view_as(x)


def moe_naive(layer: MixtureOfExperts, x: Tensor, guide: RouterInputs) -> Tensor:
    """The layer by definition, on one process: every expert sees every token, and weights pick. [B,T,D] → same."""
    routing = layer.router(normalize_quantize(x, False).codes, *guide)
    experts = layer.link.placement.total
    codes, scale, _ = normalize_quantize(x, layer.routed.lam).rows()
    # A dropped copy's weight lands in a column of its own, which no expert reads.
    dense = torch.zeros(len(codes), experts + 1, dtype=routing.weights.dtype)
    dense = dense.scatter_add(1, routing.expert_ids, routing.weights)[:, :experts]
    everyone = _every_expert(layer.routed, codes, scale)
    out = torch.einsum("ne,end->nd", dense.to(everyone.dtype), everyone)
    if layer.shared is not None:
        out = out + _every_expert(layer.shared, codes, scale).sum(0)
    return out.view_as(x)


def _every_expert(experts: nn.Module, codes: Tensor, scale: Tensor) -> Tensor:
    n = len(experts.expert_ids)  # type: ignore[arg-type]
    return experts(codes.repeat(n, 1), scale.repeat(n, 1), [len(codes)] * n).view(n, *codes.shape)
