"""The chunkwise form of retention, with its gradient, on one rank or on a slice of a sequence that many ranks share.

Only differences of positions inside a chunk are exponentiated, so no length overflows; memory grows linearly with it.

Shapes: B batch, H heads, T time, K key width of a head, V value width of a head, C chunk, N chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.parallel.sequence import SequenceLink

CACHED_SCORES = 1 << 16


def retention_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    documents: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The chunkwise form (eq. 7 of the paper): all chunks at once, then a short scan over their states.

    Args:
        q, k: [B,H,T,K]; v: [B,H,T,V], one dtype.
        log_decay: [H] log γ, fp32 (fp64 for fp64 inputs). Gets no gradient.
        documents: [B,T] int64, never falling along a row.
        state: [B,H,K,V] fp32, the state before the first token, of that token's document; None for zeros.
        chunk: tokens of a chunk; any number.

    Returns:
        out [B,H,T,V] in the dtype of v, and the state after the last token [B,H,K,V] in fp32 (fp64 for fp64).

    Raises:
        ValueError: naming the argument, for shapes that do not fit, documents that fall, or T = 0.
    """
    _check(q, k, v, log_decay, documents, state)
    if state is None:
        state = torch.zeros_like(q[:, :, 0, :, None] * v[:, :, 0, None, :], dtype=log_decay.dtype)
    return _Retention.apply(q, k, v, log_decay, documents, state, documents[:, 0], chunk, None)


def retention_slice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    documents: Tensor,
    starts: Tensor,
    link: SequenceLink,
    chunk: int = 64,
) -> Tensor:
    """This rank's slice of sequences that are spread over the ranks of `link` (design §3.3). Collective.

    Args:
        q, k, v, log_decay, chunk: as for `retention_chunk`; `T` is the length of a slice.
        documents: [B,T] int64 of this slice, numbered over the whole sequence.
        starts: [B] bool, true where the slice's first token begins a document.

    Returns:
        out [B,H,T,V]. Gradients of q, k and v are right on every rank.
    """
    _check(q, k, v, log_decay, documents, None)
    before = torch.where(starts, documents[:, 0] - 1, documents[:, 0])
    state = torch.zeros_like(q[:, :, 0, :, None] * v[:, :, 0, None, :], dtype=log_decay.dtype)
    return _Retention.apply(q, k, v, log_decay, documents, state, before, chunk, link)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, documents: Tensor, state: Tensor | None) -> None:
    batch, heads, time, key = q.shape
    wanted = {
        "k": (k, (batch, heads, time, key)),
        "v": (v, (batch, heads, time, v.shape[-1])),
        "log_decay": (log_decay, (heads,)),
        "documents": (documents, (batch, time)),
        "state": (state, (batch, heads, key, v.shape[-1])),
    }
    if time == 0:
        raise ValueError("q: there are no tokens (T = 0)")
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} does not fit q {tuple(q.shape)}; expected {shape}")
    # On a card the answer would have to be waited for.
    if not documents.is_cuda and bool((documents.diff() < 0).any()):
        raise ValueError("documents: their numbers fall along a row; number them in the order of the text")


class _Chunks(NamedTuple):
    """How a state decays and where it is cut, in chunks of C tokens.

    Attributes:
        within: [H,1,C,C] γ^(i−j) on and below the diagonal, in the compute dtype.
        same: [B,1,N,C,C] bool, true within a document; None where no document begins inside a chunk.
        cut: [B,N] bool, chunks that a document begins in; None where `same` is to be used for all.
        entering: [B,H,N,C,1] weight of the state before the chunk in each token.
        leaving: [B,H,N,C,1] weight of each token in the state after the chunk.
        kept: [B,H,N,1,1] weight of the state before the chunk in the state after it.
    """

    within: Tensor
    same: Tensor | None
    cut: Tensor | None
    entering: Tensor
    leaving: Tensor
    kept: Tensor


def _chunks(log_decay: Tensor, ids: Tensor, before: Tensor, time: int, dtype: torch.dtype) -> _Chunks:
    """`ids` [B,N,C] documents, `before` [B] the document in front; the last chunk may end early, at `time`."""
    chunks, size = ids.shape[1:]
    last = ids[:, :, -1]
    previous = torch.cat([before[:, None], last[:, :-1]], 1)
    place = torch.arange(size, device=ids.device)
    lengths = (time - size * torch.arange(chunks, device=ids.device)).clamp(max=size)
    decay = log_decay[:, None, None]
    distance = (place[:, None] - place).clamp(min=0)
    within = (distance * decay).exp().tril().to(dtype)[:, None]
    entering = ((place + 1) * decay).exp() * (ids == previous[:, :, None])[:, None]
    to_end = (lengths[:, None] - 1 - place).clamp(min=0)
    leaving = (to_end * decay).exp() * (ids == last[:, :, None])[:, None]
    kept = (lengths * log_decay[:, None]).exp() * (last == previous)[:, None]
    cut = None if ids.is_cuda else ids[:, :, 0] != last
    if cut is not None and not bool(cut.any()):
        return _Chunks(within, None, cut, entering[..., None], leaving[..., None], kept[..., None, None])
    same = (ids[:, :, :, None] == ids[:, :, None, :])[:, None]
    return _Chunks(within, same, cut, entering[..., None], leaving[..., None], kept[..., None, None])


def _mask(scores: Tensor, chunks: _Chunks, block: slice) -> Tensor:
    """Decay the [B,H,n,C,C] scores of a block of chunks and cut them at documents, in place."""
    scores.mul_(chunks.within)
    if chunks.same is None:
        return scores
    if chunks.cut is None:
        return scores.mul_(chunks.same[:, :, block])
    # Most chunks lie within a document; only the others need the second pass.
    if bool(chunks.cut[:, block].any()):
        scores.mul_(chunks.same[:, :, block])
    return scores


def _blocks(folded: Tensor) -> list[slice]:
    """Blocks of chunks whose scores stay in a core's cache between the products; all at once on a card."""
    batch, heads, chunks, size = folded.shape[:4]
    step = chunks if folded.is_cuda else max(1, CACHED_SCORES // (batch * heads * size * size))
    return [slice(start, start + step) for start in range(0, chunks, step)]


def _within_chunks(q: Tensor, k: Tensor, v: Tensor, chunks: _Chunks) -> Tensor:
    """What tokens see of their own chunk: [B,H,N,C,V] from folded q, k, v."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for block in _blocks(q):
        scores = _mask(q[:, :, block] @ k[:, :, block].transpose(-1, -2), chunks, block)
        out[:, :, block] = scores @ v[:, :, block]
    return out


def _within_chunks_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, chunks: _Chunks
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of folded q, k, v from that of `_within_chunks`'s result."""
    for_q, for_k, for_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for block in _blocks(q):
        qs, ks, vs, gs = (x[:, :, block] for x in (q, k, v, grad))
        scores = _mask(qs @ ks.transpose(-1, -2), chunks, block)
        for_v[:, :, block] = scores.transpose(-1, -2) @ gs
        scores = _mask(gs @ vs.transpose(-1, -2), chunks, block)
        for_q[:, :, block] = scores @ ks
        for_k[:, :, block] = scores.transpose(-1, -2) @ qs
    return for_q, for_k, for_v


def _fold(x: Tensor, size: int) -> Tensor:
    """[B,H,T,…] → [B,H,N,C,…], with zeros behind the end."""
    time = x.shape[2]
    padding = -time % size
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    return x.reshape(*x.shape[:2], -1, size, x.shape[-1])


def _fold_documents(documents: Tensor, size: int) -> Tensor:
    padding = -documents.shape[1] % size
    if padding:
        documents = torch.cat([documents, documents[:, -1:].expand(-1, padding)], 1)
    return documents.reshape(len(documents), -1, size)


def _run_up(added: Tensor, kept: Tensor, state: Tensor) -> Tensor:
    """States after each chunk [B,H,N,K,V], in place of what each adds, from the one before the first."""
    added[:, :, 0].addcmul_(kept[:, :, 0], state)
    for n in range(1, added.shape[2]):
        added[:, :, n].addcmul_(kept[:, :, n], added[:, :, n - 1])
    return added


def _run_down(added: Tensor, kept: Tensor, state: Tensor) -> Tensor:
    """The same from the last chunk to the first."""
    last = added.shape[2] - 1
    added[:, :, last].addcmul_(kept[:, :, last], state)
    for n in range(last - 1, -1, -1):
        added[:, :, n].addcmul_(kept[:, :, n], added[:, :, n + 1])
    return added


def _shifted(state: Tensor, states: Tensor) -> Tensor:
    """States before each chunk from the one before the first and those after each."""
    return torch.cat([state[:, :, None], states[:, :, :-1]], 2)


class _Retention(torch.autograd.Function):
    """Keeps q, k, v and one state a chunk; scores are computed again in backward.

    Without a link, `state` is known at the start. With one, the state before the slice (and in backward the gradient
    of the state after it) travels while the slice's own scores are computed, and is added when it has come.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        documents: Tensor,
        state: Tensor,
        before: Tensor,
        chunk: int,
        link: SequenceLink | None,
    ) -> tuple[Tensor, Tensor]:
        time, size = q.shape[2], min(chunk, q.shape[2])
        chunks = _chunks(log_decay, _fold_documents(documents, size), before, time, q.dtype)
        qs, ks, vs = (_fold(x, size) for x in (q, k, v))
        added = ((ks * chunks.leaving).to(k.dtype).transpose(-1, -2) @ vs).to(state.dtype)
        after = _run_up(added, chunks.kept, state)
        wait = None
        if link is not None:
            wait = link.begin(after[:, :, -1], chunks.kept.prod(2)[..., 0, 0], time)
        out = _within_chunks(qs, ks, vs, chunks)
        if wait is not None:
            state = wait()
            after = after + chunks.kept.cumprod(2) * state[:, :, None]
        states = _shifted(state, after).to(q.dtype)
        out += (qs * chunks.entering).to(q.dtype) @ states
        ctx.save_for_backward(q, k, v, log_decay, documents, before, states)
        ctx.size, ctx.link = size, link
        return out.flatten(2, 3)[:, :, :time], after[:, :, -1].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, documents, before, states = ctx.saved_tensors
        size, link, time = ctx.size, ctx.link, q.shape[2]
        chunks = _chunks(log_decay, _fold_documents(documents, size), before, time, q.dtype)
        qs, ks, vs, gs = (_fold(x, size) for x in (q, k, v, grad))
        entered = (qs * chunks.entering).to(q.dtype)
        after = grad_state if link is None else torch.zeros_like(grad_state)
        back = (entered.transpose(-1, -2) @ gs).to(after.dtype)
        back = _run_down(back, chunks.kept, after)
        wait = None
        if link is not None:
            wait = link.begin(back[:, :, 0], chunks.kept.prod(2)[..., 0, 0], time, reverse=True)
        for_q, for_k, for_v = _within_chunks_backward(qs, ks, vs, gs, chunks)
        if wait is not None:
            after = wait()
            back = back + chunks.kept.flip(2).cumprod(2).flip(2) * after[:, :, None]
        behind = torch.cat([back[:, :, 1:], after[:, :, None]], 2).to(q.dtype)
        for_q += ((gs @ states.transpose(-1, -2)) * chunks.entering).to(q.dtype)
        for_k += ((vs @ behind.transpose(-1, -2)) * chunks.leaving).to(k.dtype)
        for_v += (ks * chunks.leaving).to(k.dtype) @ behind
        unfolded = (x.flatten(2, 3)[:, :, :time] for x in (for_q, for_k, for_v))
        return (*unfolded, None, None, back[:, :, 0] if link is None else None, None, None, None)
