"""Token mixers: what a layer's q, k and v become is the mixer's own; what stands before and after is shared.

The parts before and after hold all weights and no collective, so they can be recomputed in backward.

Shapes: B batch, H heads, T time, K key width of a head, V value width of a head, D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from kabrn_dist.config import RetentionConfig
from kabrn_dist.model.bitlinear import BitLinear
from kabrn_dist.model.short_conv import ShortConv, last_inputs, preceding_inputs
from kabrn_dist.ops.activation_quant import normalize_quantize, rms_norm, to_fp32
from kabrn_dist.ops.weight_quant import QuantState


class PositionInfo(NamedTuple):
    """What all layers need to know about a batch's tokens, computed once per forward pass.

    Attributes:
        documents: [B,T] int64; starts: [B,T] bool, true at a document's first token.
        cos, sin: [B,1,T,K/2] fp32 rotary angles of the positions within documents.
        positions: [B,T] int64, within documents.
    """

    documents: Tensor
    starts: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor


class MixerState(NamedTuple):
    """What decoding keeps of a layer with a convolution.

    Attributes:
        mixed: what the mixer keeps; None where it keeps nothing.
        recent: [B,J,D], the last J inputs of the mixer, which is all that its convolution needs.
        between: [B,J,D], those of the feed-forward; None where a mixer stands alone.
    """

    mixer_state: Any
    mixer_conv_state: Tensor
    ffn_conv_state: Tensor | None = None


def make_position_info(documents: Tensor, positions: Tensor, key_dim: int) -> PositionInfo:
    """Rotary angles (RoFormer, arXiv 2104.09864, base 10,000) for [B,T] documents and positions in them."""
    half = key_dim // 2
    # In fp32 an angle at position 10⁶ would be off by 0.06.
    speeds = 10000.0 ** (-torch.arange(half, device=positions.device, dtype=torch.float64) / half)
    angles = positions[:, None, :, None] * speeds
    return PositionInfo(documents, positions == 0, angles.cos().float(), angles.sin().float(), positions)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (first half, second half) of [B,H,T,K] by its angle, in fp32; same dtype out."""
    left, right = to_fp32(x).chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1).to(x.dtype)


class MixerInputs(nn.Module):
    """One normalised and quantised input for queries, keys, values and the gate; convolved before, if it is to be."""

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
        """[B,T,D] → q [B,H,T,K] and k [B,H,T,K], both rotated, v [B,H,T,V], gate [B,T,H·V].

        Args:
            before: [B,J,D], what the convolution sees in front of x.
        """
        if self.convolution is not None:
            x = self.convolution(x, before, positions)
        shared = normalize_quantize(x, self.query.lam)
        q, k, v = (
            matrix(shared).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for matrix in (self.query, self.key, self.value)
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v, self.gate(shared)


class MixerOutput(nn.Module):
    """Heads normalised one by one, a swish gate, and the output matrix."""

    def __init__(
        self, hidden_size: int, config: RetentionConfig, quant: bool | QuantState, init_gain: float, eps: float
    ) -> None:
        super().__init__()
        self.eps = eps
        self.out = BitLinear(config.num_heads * config.value_dim, hidden_size, init_gain, quant=quant)

    def forward(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """[B,H,T,V] and gate [B,T,H·V] → [B,T,D]."""
        heads = rms_norm(mixed, self.eps).transpose(1, 2).flatten(2)
        return self.out(normalize_quantize(heads * F.silu(gate), self.out.lam))


class Mixer(nn.Module, ABC):
    """A layer that mixes tokens: `mix` is what retention and attention differ in. It holds no weights.

    Args:
        taps: J, tokens that a convolution in front sees before each one; 0: none.
        group: the sequence group, in the order of the slices; None where rows are whole.
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

    def forward(self, x: Tensor, place: PositionInfo, state: Any = None) -> tuple[Tensor, Any]:
        """[B,T,D] → [B,T,D] and the state after the last token; `state` continues an earlier call."""
        recent = state.mixer_conv_state if isinstance(state, MixerState) else None
        before = preceding_inputs(x, self.kernel_size - 1, recent, self.group) if self.kernel_size else None
        q, k, v, gate = self.inputs(x, place.cos, place.sin, before, place.positions)
        mixed, kept = self.mix(q, k, v, place, state.mixer_state if isinstance(state, MixerState) else state)
        if before is not None and self.group is None:
            kept = MixerState(kept, last_inputs(before, x))
        return self.output(mixed, gate), kept

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor, place: PositionInfo, state: Any) -> tuple[Tensor, Any]:
        """[B,H,T,K], [B,H,T,K], [B,H,T,V] → [B,H,T,V] and the state after the last token."""
