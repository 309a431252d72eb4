"""Multi-scale retention (RetNet, arXiv 2307.08621) as a layer.

Shapes:
    B: batch.
    H: heads.
    T: tokens of a sequence.
    K: key size of a head.
    V: value size of a head.
    D: hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kabrn_dist.config import RetentionConfig
from kabrn_dist.distributed.state_scan import SequenceLink
from kabrn_dist.model.mixer import Mixer, PositionInfo
from kabrn_dist.ops.retention import log_decays, retention_chunk, retention_recurrent, retention_step
from kabrn_dist.ops.retention_chunkwise import retention_slice
from kabrn_dist.ops.retention_initial import add_initial_state, decay_since_start
from kabrn_dist.ops.weight_quant import QuantState

# A document's first tokens can retain almost nothing (q·k ≈ 0); a usual epsilon would let the norm blow that up to
# unit size, and its gradient by a thousand: measured as spikes of the gradient's norm from 0.8 to 9.
RETENTION_NORM_EPS = 1e-2
# Parameters whose products, summed over their rank R, are the trained initial state: [H,R,K] and [H,R,V].
STATE_KEY, STATE_VALUE = "state_key", "state_value"


class Retention(Mixer):
    """The layer of multi-scale retention. Its state is [B,H,K,V] fp32, whatever the length.

    Args:
        hidden_size: D.
        config: heads, their sizes and decays.
        quant: see `BitLinear`.
        init_gain: see `Mixer`.
        link: how states travel between slices of a sequence; None if sequences are whole.
        kernel_size: see `Mixer`.

    Attributes:
        fixed_initial_state: [H,K,V] fp32, the state that documents begin with, besides a trained one; None for zeros.
    """

    def __init__(
        self,
        hidden_size: int,
        config: RetentionConfig,
        quant: bool | QuantState,
        init_gain: float,
        link: SequenceLink | None = None,
        kernel_size: int = 0,
    ) -> None:
        super().__init__(
            hidden_size, config, quant, init_gain, RETENTION_NORM_EPS, kernel_size, link.group if link else None
        )
        self.link = link
        self.fixed_initial_state: Tensor | None = None

    def trained_initial_state(self) -> Tensor | None:
        """Return the state [H,K,V] of the parameters, differentiable; None if there are none."""
        if STATE_KEY not in self._parameters:
            return None
        return torch.einsum("hrk,hrv->hkv", self.get_parameter(STATE_KEY), self.get_parameter(STATE_VALUE))

    def initial_state(self) -> Tensor | None:
        """Return the state [H,K,V] that documents begin with; None for zeros."""
        fixed, trained = self.fixed_initial_state, self.trained_initial_state()
        if fixed is None or trained is None:
            return trained if fixed is None else fixed
        return fixed.to(trained) + trained

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, position: PositionInfo, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the recurrent form to one token on top of a state, else the chunkwise form; see `Mixer.mix`.

        On a CPU, tokens that are decoded have the recurrent form however many they are: their bits are the runtime's.

        Raises:
            ValueError: for a state with a sequence group; decoding is for whole rows.
        """
        # Created in each call, so that no cast of the model can round it: γ is 1 in bf16 from the fourth head on.
        decay = torch.tensor(log_decays(self.config.decay, self.config.num_heads), device=q.device)
        q = q * self.config.key_dim**-0.5
        initial = self.initial_state()
        if initial is not None:
            return self._mix_from(initial.to(q.device), q, k, v, decay, position, state)
        return self._mix_from_zeros(q, k, v, decay, position, state)

    def _mix_from_zeros(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, position: PositionInfo, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.link is not None:
            if state is not None:
                raise ValueError(
                    "retention: a state with a sequence that is spread over ranks, which cannot be continued; "
                    "decode with link=None"
                )
            starts = position.starts[:, 0]
            return retention_slice(q, k, v, decay, position.documents, starts, self.link, self.config.chunk_size), None
        if _is_in_order(q, position):
            return retention_recurrent(q, k, v, decay, position.starts, state)
        if state is None or q.shape[2] > 1:
            return retention_chunk(q, k, v, decay, position.documents, state, self.config.chunk_size)
        out, state = retention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], decay, state, position.starts[:, 0])
        return out[:, :, None], state

    def _mix_from(
        self,
        initial: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        position: PositionInfo,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same, where documents begin with the state `initial` [H,K,V]."""
        positions, starts = position.positions, position.starts
        if _is_in_order(q, position) or (state is not None and q.shape[2] == 1):
            if state is None:
                # What is left of it at a first token that does not begin its document.
                left = decay_since_start(decay, positions[:, :1] - 1).to(initial.dtype)
                state = initial * left[..., None]
            if _is_in_order(q, position):
                return retention_recurrent(q, k, v, decay, starts, state, initial)
            out, state = retention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], decay, state, starts[:, 0], initial)
            return out[:, :, None], state
        carried = None
        if state is not None:
            state = state * ~starts[:, :1, None, None]
            carried = (position.documents == position.documents[:, :1]) & ~starts[:, :1]
        out, after = self._mix_from_zeros(q, k, v, decay, position, state)
        out = add_initial_state(out, q, decay, initial, positions, carried)
        if after is not None:
            left = decay_since_start(decay, positions[:, -1:])
            if carried is not None:
                left = left.masked_fill(carried[:, None, -1:], 0)
            after = after + initial.to(after.dtype) * left[..., None].to(after.dtype)
        return out, after


def _is_in_order(q: Tensor, position: PositionInfo) -> bool:
    """Whether sums have the order of the runtime in C."""
    return position.decoding and q.device.type == "cpu" and q.dtype == torch.float32
