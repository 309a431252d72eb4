"""Multi-scale retention (RetNet, arXiv 2307.08621) as a layer.

Shapes: B batch, H heads, T time, K key width of a head, V value width of a head, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kabrn_dist.config import RetentionConfig
from kabrn_dist.distributed.state_scan import SequenceLink
from kabrn_dist.model.mixer import Mixer, PositionInfo
from kabrn_dist.ops.retention import log_decays, retention_chunk, retention_step
from kabrn_dist.ops.retention_chunkwise import retention_slice
from kabrn_dist.ops.weight_quant import QuantState

# A document's first tokens can retain almost nothing (q·k ≈ 0); a usual epsilon would let the norm blow that up to
# unit size, and its gradient by a thousand: measured as spikes of the gradient's norm from 0.8 to 9.
HEAD_NORM_EPS = 1e-2


class Retention(Mixer):
    """The layer. Its state is [B,H,K,V] fp32, whatever the length."""

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
            hidden_size, config, quant, init_gain, HEAD_NORM_EPS, kernel_size, link.group if link else None
        )
        self.link = link

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, place: PositionInfo, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One token on top of a state takes the recurrent form, all else the chunkwise one."""
        # Made anew each time, so that no cast of the model can round it: γ is 1 in bf16 from the fourth head on.
        decay = torch.tensor(log_decays(self.config.decay, self.config.num_heads), device=q.device)
        q = q * self.config.key_dim**-0.5
        if self.link is not None:
            if state is not None:
                raise ValueError("state: a sequence that is spread over ranks cannot be continued")
            starts = place.starts[:, 0]
            return retention_slice(q, k, v, decay, place.documents, starts, self.link, self.config.chunk_size), None
        if state is None or q.shape[2] > 1:
            return retention_chunk(q, k, v, decay, place.documents, state, self.config.chunk_size)
        out, state = retention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], decay, state, place.starts[:, 0])
        return out[:, :, None], state
