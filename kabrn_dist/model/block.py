"""One layer of the model: a token mixer and a feed-forward, each added to the residual stream.

Shapes:
    B: batch.
    T: tokens of a sequence.
    D: hidden size.
    J: taps of the short convolution on earlier tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kabrn_dist.config import ModelConfig
from kabrn_dist.model.activation_checkpointing import checkpoint_experts, checkpoint_module
from kabrn_dist.model.experts.base import Experts
from kabrn_dist.model.mixer import Mixer, MixerState, PositionInfo
from kabrn_dist.model.moe import DenseFeedForward, MixtureOfExperts, RouterInputs
from kabrn_dist.model.router import RouterStats
from kabrn_dist.model.short_conv import ShortConv, last_inputs, preceding_inputs


class Block(nn.Module):
    """x → x + Mixer(x), then x → x + FeedForward(x).

    Args:
        mixer: retention or attention.
        mixture: a mixture of experts, or one dense network.
        config: of the model; says whether short convolutions stand in front of both, and what backward recomputes.
    """

    def __init__(self, mixer: Mixer, mixture: MixtureOfExperts | DenseFeedForward, config: ModelConfig) -> None:
        super().__init__()
        self.mixer, self.mixture = mixer, mixture
        self.convolution = ShortConv(config.hidden_size, config.short_conv_size) if config.short_conv_size else None
        if config.activation_checkpointing != "keep":
            self._checkpoint_activations(offload=config.activation_checkpointing == "offload")

    def forward(
        self, x: Tensor, position: PositionInfo, state: Any, router_inputs: RouterInputs | None
    ) -> tuple[Tensor, Any, RouterStats | None]:
        """Apply the layer to the residual stream.

        Args:
            x: [B,T,D].
            position: of the tokens.
            state: what an earlier call on the same rows returned; None at their start.
            router_inputs: of this layer's router; None for a dense network.

        Returns:
            The stream [B,T,D], the state after the last token, and the router's sums (None for a dense network).
        """
        x, new_state = self.mix(x, position, state)
        inputs, before = self.feed_forward_input(x, position, state)
        if before is not None and isinstance(new_state, MixerState):
            new_state = new_state._replace(ffn_conv_state=last_inputs(before, x))
        out, stats = self.feed_forward(inputs, router_inputs)
        return x + out, new_state, stats

    def mix(self, x: Tensor, position: PositionInfo, state: Any) -> tuple[Tensor, Any]:
        """Return x + Mixer(x) [B,T,D] and the mixer's new state."""
        mixed, state = self.mixer(x, position, state)
        return x + mixed, state

    def feed_forward_input(self, x: Tensor, position: PositionInfo, state: Any) -> tuple[Tensor, Tensor | None]:
        """Return what the feed-forward reads [B,T,D], and the inputs [B,J,D] that its convolution saw before x."""
        if self.convolution is None:
            return x, None
        recent = state.ffn_conv_state if isinstance(state, MixerState) else None
        before = preceding_inputs(x, self.mixer.kernel_size - 1, recent, self.mixer.group)
        return self.convolution(x, before, position.positions), before

    def feed_forward(self, x: Tensor, router_inputs: RouterInputs | None) -> tuple[Tensor, RouterStats | None]:
        """Return the feed-forward's output [B,T,D], and the router's sums of a mixture."""
        if router_inputs is None:
            return self.mixture(x), None
        out, stats = self.mixture(x, router_inputs)
        return out, stats

    def _checkpoint_activations(self, offload: bool) -> None:
        # Only parts without a collective are recomputed, so the all-to-alls run once, in one order.
        checkpoint_module(self.mixer.inputs, offload)
        checkpoint_module(self.mixer.output, offload)
        for name in ("routed", "shared"):
            experts = getattr(self.mixture, name, None)
            if isinstance(experts, Experts):
                checkpoint_experts(experts, offload)
