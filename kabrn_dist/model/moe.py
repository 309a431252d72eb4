"""Feed-forwards of KAN experts: a mixture (DeepSeekMoE, arXiv 2401.06066), or one dense network.

Shapes:
    B: batch.
    T: tokens of a sequence.
    D: hidden size.
    N: B·T tokens.
    E: routed experts.
    k: experts that a token visits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kabrn_dist.config import ModelConfig
from kabrn_dist.distributed.all_to_all import ExpertLink
from kabrn_dist.distributed.token_dispatch import QuantizedRows, dispatch_tokens
from kabrn_dist.model.experts.base import Experts, ExpertSpec
from kabrn_dist.model.experts.registry import EXPERT_TYPES
from kabrn_dist.model.router import Router, RouterStats, TokenCoordinates
from kabrn_dist.ops.activation_quant import Quantized, normalize_quantize
from kabrn_dist.ops.weight_quant import QuantState


class RouterInputs(NamedTuple):
    """Inputs of a layer's router besides the tokens: its rows of the `RouterStates`, and coordinates for jitter.

    Attributes:
        bias: [E] fp32, added to the scores where experts are chosen.
        prev_load: [E] fp32, each expert's fraction of the last step's routed tokens.
        step: optimizer steps done.
        coordinates: of the tokens, for jitter; None in decoding.
    """

    bias: Tensor
    prev_load: Tensor
    step: int
    coordinates: TokenCoordinates | None


class MixtureOfExperts(nn.Module):
    """x → Σ shared(x) + Σ weight·routed(x), over one normalized and quantized input.

    Args:
        config: of the model.
        init_gain: standard deviation of each expert's output at the start, for inputs of unit variance.
        link: how tokens travel to the experts of other ranks; this rank holds `link.placement.local`.
        sequence_group: the ranks that hold slices of the same sequences; None if sequences are whole.
        force_load_balance: see `Router`.
        quant: the `QuantState` that a model's modules share, or False for plain matrices; by default
            `config.quantize`.

    Attributes:
        router: chooses each token's experts.
        routed: this rank's routed experts.
        shared: experts that every token visits; None if there are none.
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
        experts = config.experts
        self.config, self.link = experts, link
        self.router = Router(config.hidden_size, config, sequence_group, force_load_balance)
        size = config, experts.expert_hidden_size
        self.routed = _make_experts(*size, link.placement.local, init_gain, quant)
        self.shared: Experts | None = None
        if experts.num_shared_experts:
            self.shared = _make_experts(*size, range(experts.num_shared_experts), init_gain, quant)

    def forward(self, x: Tensor, router_inputs: RouterInputs) -> tuple[Tensor, RouterStats]:
        """Return Σ shared(x) + Σ weight·routed(x) [B,T,D] of x [B,T,D], and the router's statistics.

        The shared experts run while tokens travel, and the router's sums are taken while results travel back.
        Collective over the expert group.
        """
        plain, lam = normalize_quantize(x, False), self.routed.lam
        routing = self.router(plain.codes, *router_inputs)
        tokens = (normalize_quantize(x, lam) if lam else plain).rows()
        exchange = dispatch_tokens(tokens, routing.expert_ids, self.link)
        shared = self._apply_shared(tokens)
        exchange.apply(self._apply_routed)
        stats = self.router.summarize(routing)
        routed = exchange.combine(routing.weights)
        # One after the other, as the runtime in C adds them.
        for copy in shared:
            routed = routed + copy
        return routed.view_as(x), stats

    def _apply_routed(self, x: QuantizedRows, tokens_per_expert: list[int]) -> Tensor:
        out: Tensor = self.routed(Quantized(*x), tokens_per_expert)
        return out

    def _apply_shared(self, x: Quantized) -> Sequence[Tensor]:
        """Results [N,D] of each shared expert."""
        if self.shared is None:
            return ()
        copies, rows = self.config.num_shared_experts, len(x.codes)
        if copies == 1:
            return (self.shared(x, [rows]),)
        return self.shared(x.repeat(copies), [rows] * copies).view(copies, *x.codes.shape).unbind()


class DenseFeedForward(nn.Module):
    """x → expert(x): one network of the experts' type that every token passes through.

    Args:
        config: of the model.
        init_gain: standard deviation of the output at the start, for inputs of unit variance.
        quant: see `MixtureOfExperts`.

    Attributes:
        shared: the network, a stack of one expert.
    """

    def __init__(self, config: ModelConfig, init_gain: float, quant: bool | QuantState | None = None) -> None:
        super().__init__()
        self.shared = _make_experts(config, config.dense_hidden_size, range(1), init_gain, quant)

    def forward(self, x: Tensor) -> Tensor:
        """Return expert(x) [B,T,D] of x [B,T,D]."""
        tokens = normalize_quantize(x, self.shared.lam).rows()
        return self.shared(tokens, [len(tokens.codes)]).view_as(x)


def _make_experts(
    config: ModelConfig, expert_hidden_size: int, expert_ids: range, init_gain: float, quant: bool | QuantState | None
) -> Experts:
    quant = config.quantize if quant is None else quant
    spec = ExpertSpec(config.hidden_size, expert_hidden_size, config.experts, expert_ids, quant, init_gain)
    return EXPERT_TYPES[config.experts.type](spec)


def moe_naive(layer: MixtureOfExperts, x: Tensor, router_inputs: RouterInputs) -> Tensor:
    """Compute the layer by definition, on one process: every expert sees every token, and weights pick.

    Args:
        layer: with all experts in this process.
        x: [B,T,D].
        router_inputs: of the layer's router.

    Returns:
        [B,T,D].
    """
    routing = layer.router(normalize_quantize(x, False).codes, *router_inputs)
    experts = layer.link.placement.total
    tokens = normalize_quantize(x, layer.routed.lam).rows()
    # A dropped token's weight lands in a column of its own, which no expert reads.
    weights = torch.zeros(len(tokens.codes), experts + 1, dtype=routing.weights.dtype)
    weights = weights.scatter_add(1, routing.expert_ids, routing.weights)[:, :experts]
    outputs = _apply_every_expert(layer.routed, tokens)
    out = torch.einsum("ne,end->nd", weights.to(outputs.dtype), outputs)
    if layer.shared is not None:
        out = out + _apply_every_expert(layer.shared, tokens).sum(0)
    return out.view_as(x)


def _apply_every_expert(experts: Experts, x: Quantized) -> Tensor:
    """[E,N,D]."""
    n = len(experts.expert_ids)
    return experts(x.repeat(n), [len(x.codes)] * n).view(n, *x.codes.shape)
