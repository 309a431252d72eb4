"""Token mixers: retention and attention differ in how they mix q, k and v; the projections around them are shared.

The projections hold all weights and no collective, so they can be recomputed in backward.

Shapes:
    B: batch.
    H: heads.
    T: tokens of a sequence.
    K: key size of a head.
    V: value size of a head.
    D: hidden size.
    J: taps of the short convolution on earlier tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kabrn_dist.config import RetentionConfig
from kabrn_dist.model.bitlinear import BitLinear
from kabrn_dist.model.short_conv import ShortConv, last_inputs, preceding_inputs
from kabrn_dist.ops.activation_quant import Quantized, normalize_quantize
from kabrn_dist.ops.gate import gated
from kabrn_dist.ops.heads import norm_heads, rotate
from kabrn_dist.ops.weight_quant import QuantState


class PositionInfo(NamedTuple):
    """Positions of a batch's tokens, computed once per forward pass for all layers.

    Attributes:
        documents: [B,T] int64, numbers of the documents.
        starts: [B,T] bool, true at a document's first token.
        cos: [B,1,T,K/2] fp32, of the rotary angles of the positions within documents.
        sin: [B,1,T,K/2] fp32, of the same angles.
        positions: [B,T] int64, within documents.
        decoding: whether a text is generated; sums then have the order of the runtime in C.
    """

    documents: Tensor
    starts: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    decoding: bool = False


class MixerState(NamedTuple):
    """State that decoding keeps of a layer with short convolutions.

    Attributes:
        mixer_state: of the mixer; None if it keeps none.
        mixer_conv_state: [B,J,D], the last inputs of the mixer, for its convolution.
        ffn_conv_state: [B,J,D], the last inputs of the feed-forward, for its convolution; None for a mixer alone.
    """

    mixer_state: Any
    mixer_conv_state: Tensor
    ffn_conv_state: Tensor | None = None


def make_position_info(documents: Tensor, positions: Tensor, key_dim: int) -> PositionInfo:
    """Return starts and rotary angles (RoFormer, arXiv 2104.09864, base 10,000) of [B,T] documents and positions."""
    half = key_dim // 2
    # In fp32 an angle at position 10⁶ would be off by 0.06.
    frequencies = 10000.0 ** (-torch.arange(half, device=positions.device, dtype=torch.float64) / half)
    angles = positions[:, None, :, None] * frequencies
    return PositionInfo(documents, positions == 0, angles.cos().float(), angles.sin().float(), positions)


class MixerInputs(nn.Module):
    """Projections to queries, keys, values and the gate, from one normalized and quantized input.

    Args:
        hidden_size: D.
        config: heads and their sizes.
        quant: see `BitLinear`.
        kernel_size: of a short convolution in front; 0 for none.
    """

    def __init__(
        self, hidden_size: int, config: RetentionConfig, quant: bool | QuantState, kernel_size: int = 0
    ) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.convolution = ShortConv(hidden_size, kernel_size) if kernel_size else None
        keys, values = config.num_heads * config.key_dim, config.num_heads * config.value_dim
        self.query = BitLinear(hidden_size, keys, quant=quant)
        self.key = BitLinear(hidden_size, keys, quant=quant)
        self.value = BitLinear(hidden_size, values, quant=quant)
        self.gate = BitLinear(hidden_size, values, quant=quant)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, before: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Project the tokens.

        Args:
            x: [B,T,D].
            cos: see `PositionInfo`.
            sin: see `PositionInfo`.
            before: [B,J,D], inputs in front of x for the convolution; None without one.
            positions: [B,T] int64.

        Returns:
            q [B,H,T,K] and k [B,H,T,K], both rotated, v [B,H,T,V] and the gate [B,T,H·V].
        """
        if self.convolution is not None:
            x = self.convolution(x, before, positions)
        quantized = normalize_quantize(x, self.query.lam)
        q, k, v = (
            matrix(quantized).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for matrix in (self.query, self.key, self.value)
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v, self.gate(quantized)


class MixerOutput(nn.Module):
    """Norm of each head, a swish gate, and the output projection.

    Args:
        hidden_size: D.
        config: heads and their sizes.
        quant: see `BitLinear`.
        init_gain: see `BitLinear`.
        eps: of the heads' norm.
    """

    def __init__(
        self, hidden_size: int, config: RetentionConfig, quant: bool | QuantState, init_gain: float, eps: float
    ) -> None:
        super().__init__()
        self.eps = eps
        self.out = BitLinear(config.num_heads * config.value_dim, hidden_size, init_gain, quant=quant)

    def forward(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """Return the mixer's output [B,T,D] of mixed values [B,H,T,V] and a gate [B,T,H·V]."""
        heads = norm_heads(mixed, self.eps)
        ones = heads.new_ones(*heads.shape[:-1], 1, dtype=torch.promote_types(heads.dtype, torch.float32))
        gates, values = (Quantized(each, ones).rows() for each in (gate, heads))
        return self.out(gated(gates, values, self.out.lam).shaped(heads.shape[:-1]))


class Mixer(nn.Module, ABC):
    """A layer that mixes tokens: projections around `mix`, which holds no weights and is the subclass's own.

    Args:
        hidden_size: D.
        config: heads and their sizes.
        quant: see `BitLinear`.
        init_gain: standard deviation of the output at the start, for inputs of unit variance.
        eps: of the heads' norm.
        kernel_size: of a short convolution in front; 0 for none.
        group: the sequence group, in the order of the slices; None if rows are whole.
    """

    def __init__(
        self,
        hidden_size: int,
        config: RetentionConfig,
        quant: bool | QuantState,
        init_gain: float,
        eps: float,
        kernel_size: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.config, self.kernel_size, self.group = config, kernel_size, group
        self.inputs = MixerInputs(hidden_size, config, quant, kernel_size)
        self.output = MixerOutput(hidden_size, config, quant, init_gain, eps)

    def forward(self, x: Tensor, position: PositionInfo, state: Any = None) -> tuple[Tensor, Any]:
        """Mix tokens [B,T,D] → [B,T,D]; also return the state after the last token.

        Collective over the sequence group.

        Args:
            x: [B,T,D].
            position: of the tokens.
            state: returned by an earlier call, which this one continues.
        """
        recent = state.mixer_conv_state if isinstance(state, MixerState) else None
        before = preceding_inputs(x, self.kernel_size - 1, recent, self.group) if self.kernel_size else None
        q, k, v, gate = self.inputs(x, position.cos, position.sin, before, position.positions)
        mixer_state = state.mixer_state if isinstance(state, MixerState) else state
        mixed, new_state = self.mix(q, k, v, position, mixer_state)
        if before is not None and self.group is None:
            new_state = MixerState(new_state, last_inputs(before, x))
        return self.output(mixed, gate), new_state

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor, position: PositionInfo, state: Any) -> tuple[Tensor, Any]:
        """Return mixed values and the state after the last token.

        Args:
            q: [B,H,T,K].
            k: [B,H,T,K].
            v: [B,H,T,V].
            position: of the tokens.
            state: after the tokens before; None at the start of a row.

        Returns:
            [B,H,T,V], and the mixer's own kind of state.
        """
