"""Multi-scale retention (RetNet, arXiv 2307.08621) in three forms that agree, for packed documents.

S_n = γ·S_{n−1} + k_nᵀ v_n,  o_n = q_n S_n, with S = 0 where a document starts. Scores are not normalized: normalizers
do not compose across chunks.

Shapes: B batch, H heads, T time, K key width of a head, V value width of a head, C chunk, D model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kabrn_dist.ops.retention_chunkwise import check_retention_inputs, retention_torch
from kabrn_dist.ops.retention_fla import find_kernel, retention_fla

# Tokens whose states are in memory at a time.
RECURRENT_BLOCK = 16


def log_decays(schedule: str | tuple[float, float], heads: int) -> list[float]:
    """Return log γ of each head, evenly spaced in −log₂(1−γ).

    Args:
        schedule: "exponent" (γ = 1 − 2^(−5−h), eq. 8 of the paper), "linspace" (5…9, the authors' code) or
            [fastest, slowest] exponents.
        heads: H.
    """
    named = {"exponent": (5.0, 4.0 + heads), "linspace": (5.0, 9.0)}
    fastest, slowest = named[schedule] if isinstance(schedule, str) else schedule
    step = (slowest - fastest) / max(1, heads - 1)
    return [math.log1p(-(2.0 ** -(fastest + h * step))) for h in range(heads)]


def retention_naive(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, documents: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence by definition, one token at a time, with arguments and results of `retention_chunk`."""
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    starts: Tensor,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode one token.

    Args:
        q: [B,H,K].
        k: [B,H,K].
        v: [B,H,V].
        log_decay: [H] fp32.
        state: [B,H,K,V] fp32.
        starts: [B] bool, true where this token begins a document.
        initial: [H,K,V] fp32, the state that documents begin with; None for zeros.

    Returns:
        out [B,H,V] in the dtype of v, and the new state [B,H,K,V] fp32.
    """
    decayed = _at_starts(state, starts, initial) * log_decay.to(state.dtype).exp()[:, None, None]
    new = decayed + k.to(state.dtype)[..., :, None] * v.to(state.dtype)[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q.to(state.dtype), new).to(v.dtype), new


def retention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    starts: Tensor,
    state: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode tokens one after another, in fp32 and in an order of sums that runtime/csrc repeats bit for bit.

    Keys are summed in fours, the fours one after another; no result depends on how many tokens are read at once.

    Args:
        q: [B,H,T,K], K even.
        k: [B,H,T,K].
        v: [B,H,T,V].
        log_decay: [H] fp32.
        starts: [B,T] bool, true where a token begins a document.
        state: [B,H,K,V] fp32; None for zeros.
        initial: [H,K,V] fp32, the state that documents begin with; None for zeros.

    Returns:
        out [B,H,T,V] in the dtype of v, and the new state [B,H,K,V] fp32.
    """
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float32)
    # Rounded from fp64, so that no library's exponential shows.
    decay, outs = log_decay.double().exp().float()[:, None, None], []
    for part in range(0, q.shape[2], RECURRENT_BLOCK):
        states = []
        for t in range(part, min(part + RECURRENT_BLOCK, q.shape[2])):
            decayed = _at_starts(state, starts[:, t], initial) * decay
            state = decayed + k[:, :, t, :, None].float() * v[:, :, t, None, :].float()
            states.append(state)
        products = q[:, :, part : part + len(states), :, None].float() * torch.stack(states, 2)
        outs.append(_sum_in_fours(products))
    return torch.cat(outs, 2).to(v.dtype), state


def _at_starts(state: Tensor, starts: Tensor, initial: Tensor | None) -> Tensor:
    """The state [B,H,K,V] before a token, in whose place the initial one stands where it begins a document."""
    where = starts[:, None, None, None]
    return state * ~where if initial is None else torch.where(where, initial.to(state.dtype), state)


def _sum_in_fours(products: Tensor) -> Tensor:
    """[B,H,T,K,V] → [B,H,T,V]."""
    sums = []
    for each in products.split(4, 3):
        parts = each.unbind(3)
        sums.append(parts[0] + parts[1] if len(parts) == 2 else (parts[0] + parts[1]) + (parts[2] + parts[3]))
    total = sums[0]
    for each in sums[1:]:
        total = total + each
    return total


def retention_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    documents: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Compute the chunkwise form (eq. 7 of the paper): all chunks at once, then a short scan over their states.

    Args:
        q: [B,H,T,K].
        k: [B,H,T,K] in the dtype of q.
        v: [B,H,T,V] in the dtype of q.
        log_decay: [H] log γ, fp32 (fp64 for fp64 inputs). Gets no gradient.
        documents: [B,T] int64, never falling along a row.
        state: [B,H,K,V] fp32, the state before the first token, of that token's document; None for zeros.
        chunk: tokens of a chunk; any number.

    Returns:
        out [B,H,T,V] in the dtype of v, and the state after the last token [B,H,K,V] in fp32 (fp64 for fp64).

    Raises:
        ValueError: naming the argument, for shapes that do not fit, document numbers that fall, or T = 0.

    Example:
        >>> q = k = v = torch.ones(1, 1, 3, 2)  # one row, one head, three tokens
        >>> documents = torch.tensor([[0, 0, 1]])  # the third begins a new document
        >>> out, state = retention_chunk(q, k, v, torch.tensor([0.5]).log(), documents)
        >>> out[0, 0, :, 0]
        tensor([2., 3., 2.])
    """
    check_retention_inputs(q, k, v, log_decay, documents, state)
    if state is None:
        state = torch.zeros_like(q[:, :, 0, :, None] * v[:, :, 0, None, :], dtype=log_decay.dtype)
    kernel = find_kernel() if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) else None
    if kernel is not None:
        return retention_fla(kernel, q, k, v, log_decay, documents, state)
    return retention_torch(q, k, v, log_decay, documents, state, chunk)
