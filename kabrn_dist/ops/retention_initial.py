"""Retention that begins each document with a state of its own instead of zeros.

What an initial state S₀ adds to the token at position p of a document is γ^(p+1)·q·S₀, whatever the document's other
tokens are, so it is added to the result of any form, in packed documents and in slices of a sequence alike.

Shapes: B batch, H heads, T time, K key width of a head, V value width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_initial_state(
    out: Tensor, q: Tensor, log_decay: Tensor, initial: Tensor, positions: Tensor, carried: Tensor | None = None
) -> Tensor:
    """Add to retention's output what the initial state of each token's document adds.

    Args:
        out: [B,H,T,V], of retention that begins with zeros.
        q: [B,H,T,K].
        log_decay: [H] log γ.
        initial: [H,K,V], S₀.
        positions: [B,T] int64, within documents.
        carried: [B,T] bool, true for tokens of documents whose state so far has S₀ in it; None for none.

    Returns:
        [B,H,T,V] in the dtype of `out`; the sum is taken in fp32 or wider.
    """
    dtype = torch.promote_types(q.dtype, initial.dtype)
    decay = decay_since_start(log_decay, positions).to(dtype)
    if carried is not None:
        decay = decay.masked_fill(carried[:, None, :], 0)
    added = (q.to(dtype) @ initial.to(dtype)) * decay[..., None]
    return (out.to(dtype) + added).to(out.dtype)


def decay_since_start(log_decay: Tensor, positions: Tensor) -> Tensor:
    """Return γ^(p+1) [B,H,T] fp64, how much is left of the initial state after positions [B,T]."""
    return (log_decay.double()[:, None] * (positions[:, None, :] + 1)).exp()


def retention_initial_naive(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute retention with an initial state by definition, one token at a time.

    Args:
        q: [B,H,T,K].
        k: [B,H,T,K].
        v: [B,H,T,V].
        log_decay: [H] log γ.
        starts: [B,T] bool, true where a token begins a document; so for the first tokens.
        initial: [H,K,V], S₀.

    Returns:
        [B,H,T,V], and the state after the last token [B,H,K,V].
    """
    decay, out = log_decay.to(q.dtype).exp()[:, None, None], []
    state = initial.expand(len(q), *initial.shape)
    for t in range(q.shape[2]):
        state = torch.where(starts[:, t, None, None, None], initial, state)
        state = decay * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ state)[:, :, 0])
    return torch.stack(out, 2), state
