"""Multi-scale retention (RetNet, arXiv 2307.08621) in three forms that agree, for packed documents.

S_n = γ·S_{n−1} + k_nᵀ v_n,  o_n = q_n S_n, with S = 0 where a document starts. Scores are not normalised: normalisers
do not compose across chunks.

Shapes: B batch, H heads, T time, K key width of a head, V value width of a head, C chunk, D model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kabrn_dist.config import Retention as Settings
from kabrn_dist.model.mixer import Mixer, Place
from kabrn_dist.model.retention_chunk import retention_chunk, retention_slice
from kabrn_dist.model.ternary import Blend
from kabrn_dist.parallel.sequence import SequenceLink

# A document's first tokens can retain almost nothing (q·k ≈ 0); a usual epsilon would let the norm blow that up to
# unit size, and its gradient by a thousand: measured as spikes of the gradient's norm from 0.8 to 9.
HEAD_EPSILON = 1e-2


def log_decays(schedule: str | tuple[float, float], heads: int) -> list[float]:
    """log γ of each head, evenly spaced in −log₂(1−γ).

    Args:
        schedule: "exponent" (γ = 1 − 2^(−5−h), eq. 8 of the paper), "linspace" (5…9, the authors' code) or
            [fastest, slowest] exponents.
    """
    named = {"exponent": (5.0, 4.0 + heads), "linspace": (5.0, 9.0)}
    fastest, slowest = named[schedule] if isinstance(schedule, str) else schedule
    step = (slowest - fastest) / max(1, heads - 1)
    return [math.log1p(-(2.0 ** -(fastest + h * step))) for h in range(heads)]


def retention_naive(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, documents: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence by definition, one token at a time. Arguments and results as `retention_chunk`."""
    batch, heads, time, key = q.shape
    s = q.new_zeros(batch, heads, key, v.shape[-1]) if state is None else state.to(q.dtype)
    decay = log_decay.to(q.dtype).exp()[:, None, None]
    out = []
    for t in range(time):
        if t > 0:
            s = s * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        s = decay * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ s)[:, :, 0])
    return torch.stack(out, 2), s


def retention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of decoding.

    Args:
        q, k: [B,H,K]; v: [B,H,V].
        log_decay: [H] fp32.
        state: [B,H,K,V] fp32.
        starts: [B] bool, true where this token begins a document.

    Returns:
        out [B,H,V] in the dtype of v, and the new state [B,H,K,V] fp32.
    """
    kept = state * ~starts[:, None, None, None] * log_decay.to(state.dtype).exp()[:, None, None]
    new = kept + k.to(state.dtype)[..., :, None] * v.to(state.dtype)[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q.to(state.dtype), new).to(v.dtype), new


class Retention(Mixer):
    """The layer. Its state is [B,H,K,V] fp32, whatever the length."""

    def __init__(
        self,
        width: int,
        settings: Settings,
        quantised: bool | Blend,
        gain: float,
        link: SequenceLink | None = None,
        taps: int = 0,
    ) -> None:
        super().__init__(width, settings, quantised, gain, HEAD_EPSILON, taps, link.group if link else None)
        self.link = link

    def mix(self, q: Tensor, k: Tensor, v: Tensor, place: Place, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One token on top of a state takes the recurrent form, all else the chunkwise one."""
        # Made anew each time, so that no cast of the model can round it: γ is 1 in bf16 from the fourth head on.
        decay = torch.tensor(log_decays(self.settings.decay, self.settings.heads), device=q.device)
        q = q * self.settings.key_width**-0.5
        if self.link is not None:
            if state is not None:
                raise ValueError("state: a sequence that is spread over ranks cannot be continued")
            starts = place.starts[:, 0]
            return retention_slice(q, k, v, decay, place.documents, starts, self.link, self.settings.chunk), None
        if state is None or q.shape[2] > 1:
            return retention_chunk(q, k, v, decay, place.documents, state, self.settings.chunk)
        out, state = retention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], decay, state, place.starts[:, 0])
        return out[:, :, None], state
