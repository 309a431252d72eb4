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
from kabrn_dist.ops.weight_quant import QuantState

# A document's first tokens can retain almost nothing (q·k ≈ 0); a usual epsilon would let the norm blow that up to
# unit size, and its gradient by a thousand: measured as spikes of the gradient's norm from 0.8 to 9.
RETENTION_NORM_EPS = 1e-2


class Retention(Mixer):
    """The layer of multi-scale retention. Its state is [B,H,K,V] fp32, whatever the length.

    Args:
        hidden_size: D.
        config: heads, their sizes and decays.
        quant: see `BitLinear`.
        init_gain: see `Mixer`.
        link: how states travel between slices of a sequence; None if sequences are whole.
        kernel_size: see `Mixer`.
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
        if self.link is not None:
            if state is not None:
                raise ValueError(
                    "retention: a state with a sequence that is spread over ranks, which cannot be continued; "
                    "decode with link=None"
                )
            starts = position.starts[:, 0]
            return retention_slice(q, k, v, decay, position.documents, starts, self.link, self.config.chunk_size), None
        if position.decoding and q.device.type == "cpu" and q.dtype == torch.float32:
            return retention_recurrent(q, k, v, decay, position.starts, state)
        if state is None or q.shape[2] > 1:
            return retention_chunk(q, k, v, decay, position.documents, state, self.config.chunk_size)
        out, state = retention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], decay, state, position.starts[:, 0])
        return out[:, :, None], state
