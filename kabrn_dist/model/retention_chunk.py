"""The chunkwise form of retention, with its gradient, on one rank or on a slice of a sequence that many ranks share.

Only differences of positions inside a chunk are exponentiated, so no length overflows; memory grows linearly with it.

Shapes: B batch, H heads, T time, K key width of a head, V value width of a head, N chunks of C tokens, G = B·H.
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
    """How a state decays and where it is cut. G = B·H rows, N chunks of C tokens.

    Attributes:
        within: [G,1,C,C] γ^(i−j) on and below the diagonal, in the compute dtype.
        same: [B,N,C,C] bool, true within a document; None where no document begins inside a chunk.
        cut: for each row of the batch and chunk, whether a document begins in it; None on a card, where asking waits.
        entering: [G,N,C,1] weight of the state before the chunk in each token, in the compute dtype.
        leaving: [G,N,C,1] weight of each token in the state after the chunk, in the compute dtype.
        kept: [G,N,1,1] weight of the state before the chunk in the state after it, fp32 or wider.
    """

    within: Tensor
    same: Tensor | None
    cut: list[list[bool]] | None
    entering: Tensor
    leaving: Tensor
    kept: Tensor


def _cut_chunks(log_decay: Tensor, documents: Tensor, before: Tensor, size: int, dtype: torch.dtype) -> _Chunks:
    """Chunks of `size` tokens of [B,T] documents; `before` [B] is the document in front. The last may end early."""
    time, heads = documents.shape[1], len(log_decay)
    padding = -time % size
    ids = torch.cat([documents, documents[:, -1:].expand(-1, padding)], 1).unflatten(1, (-1, size))
    batch, chunks, _ = ids.shape
    last = ids[:, :, -1]
    previous = torch.cat([before[:, None], last[:, :-1]], 1)
    place = torch.arange(size, device=ids.device)
    lengths = (time - size * torch.arange(chunks, device=ids.device)).clamp(max=size)
    decay = log_decay[:, None, None]
    within = ((place[:, None] - place).clamp(min=0) * decay).exp().tril().to(dtype)
    entering = ((place + 1) * decay).exp() * (ids == previous[:, :, None])[:, None]
    leaving = ((lengths[:, None] - 1 - place).clamp(min=0) * decay).exp() * (ids == last[:, :, None])[:, None]
    kept = (lengths * log_decay[:, None]).exp() * (last == previous)[:, None]
    cut = None if ids.is_cuda else (ids[:, :, 0] != last).tolist()
    whole = cut is not None and not any(map(any, cut))
    return _Chunks(
        within.repeat(batch, 1, 1)[:, None],
        None if whole else ids[:, :, :, None] == ids[:, :, None, :],
        cut,
        entering.to(dtype).view(batch * heads, chunks, size, 1),
        leaving.to(dtype).view(batch * heads, chunks, size, 1),
        kept.view(batch * heads, chunks, 1, 1),
    )


def _fold(x: Tensor, size: int) -> Tensor:
    """[B,H,T,…] → [G,N,C,…], contiguous, with zeros behind the end."""
    padding = -x.shape[2] % size
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    return x.reshape(x.shape[0] * x.shape[1], -1, size, x.shape[-1])


def _unfold(x: Tensor, like: Tensor) -> Tensor:
    """[G,N,C,…] → [B,H,T,…] of `like`."""
    return x.view(*like.shape[:2], -1, x.shape[-1])[:, :, : like.shape[2]]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix products over the first two dimensions."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a·b over the first two dimensions, without a pass of its own."""
    out.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))


def _blocks(x: Tensor) -> list[tuple[slice, slice]]:
    """Blocks of [G,N,C,…] whose scores stay in a core's cache between the products; all at once on a card."""
    rows, chunks, size = x.shape[:3]
    if x.is_cuda:
        return [(slice(0, rows), slice(0, chunks))]
    step = max(1, CACHED_SCORES // size**2)
    return [(slice(row, row + 1), slice(n, n + step)) for row in range(rows) for n in range(0, chunks, step)]


def _mask(scores: Tensor, chunks: _Chunks, block: tuple[slice, slice]) -> Tensor:
    """Decay the [g,n,C,C] scores of a block and cut them at documents, in place."""
    rows, places = block
    scores.mul_(chunks.within[rows])
    if chunks.same is None:
        return scores
    batch = len(chunks.same)
    if chunks.cut is None:
        scores.unflatten(0, (batch, -1)).mul_(chunks.same[:, None])
        return scores
    # Most chunks lie within a document; only the others need the second pass.
    row = rows.start // (len(chunks.within) // batch)
    if any(chunks.cut[row][places]):
        scores.mul_(chunks.same[row, places])
    return scores


def _within_chunks(q: Tensor, k: Tensor, v: Tensor, chunks: _Chunks) -> Tensor:
    """What tokens see of their own chunk: [G,N,C,V] from folded q, k, v."""
    out = torch.empty_like(v)
    for block in _blocks(q):
        scores = _mask(_product(q[block], k[block].transpose(-1, -2)), chunks, block)
        torch.bmm(scores.flatten(0, 1), v[block].flatten(0, 1), out=out[block].flatten(0, 1))
    return out


def _within_chunks_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, chunks: _Chunks
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of folded q, k, v from that of `_within_chunks`'s result."""
    for_q, for_k, for_v = (torch.empty_like(x) for x in (q, k, v))
    for block in _blocks(q):
        qs, ks, gs = (x[block].flatten(0, 1) for x in (q, k, grad))
        outs = (x[block].flatten(0, 1) for x in (for_q, for_k, for_v))
        out_q, out_k, out_v = outs
        scores = _mask(_product(q[block], k[block].transpose(-1, -2)), chunks, block).flatten(0, 1)
        torch.bmm(scores.transpose(1, 2), gs, out=out_v)
        scores = _mask(_product(grad[block], v[block].transpose(-1, -2)), chunks, block).flatten(0, 1)
        torch.bmm(scores, ks, out=out_q)
        torch.bmm(scores.transpose(1, 2), qs, out=out_k)
    return for_q, for_k, for_v


def _run_up(added: Tensor, kept: Tensor, state: Tensor) -> Tensor:
    """States [G,N+1,K,V] before each chunk and after the last, from what each adds [G,N,K,V] and the first."""
    states = state.new_empty(added.shape[0], added.shape[1] + 1, *added.shape[2:])
    states[:, 0] = state
    for n in range(added.shape[1]):
        torch.addcmul(added[:, n], kept[:, n], states[:, n], out=states[:, n + 1])
    return states


def _run_down(added: Tensor, kept: Tensor, state: Tensor) -> Tensor:
    """The same from the end: what is before each chunk, from what is after the last, which comes last."""
    states = state.new_empty(added.shape[0], added.shape[1] + 1, *added.shape[2:])
    states[:, -1] = state
    for n in range(added.shape[1] - 1, -1, -1):
        torch.addcmul(added[:, n], kept[:, n], states[:, n + 1], out=states[:, n])
    return states


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
        chunks = _cut_chunks(log_decay, documents, before, size, q.dtype)
        qs, ks, vs = (_fold(x, size) for x in (q, k, v))
        added = _product((ks * chunks.leaving).transpose(-1, -2), vs).to(state.dtype)
        states = _run_up(added, chunks.kept, state.flatten(0, 1))
        wait = None
        if link is not None:
            wait = link.begin(states[:, -1].view_as(state), chunks.kept.prod(1).view(state.shape[:2]), time)
        out = _within_chunks(qs, ks, vs, chunks)
        if wait is not None:
            came = wait().flatten(0, 1)[:, None]
            states[:, :1] = came
            states[:, 1:].addcmul_(chunks.kept.cumprod(1), came)
        used = states[:, :-1].to(q.dtype).contiguous()
        _add_product(out, qs * chunks.entering, used)
        ctx.save_for_backward(q, k, v, log_decay, documents, before, used)
        ctx.size, ctx.link = size, link
        return _unfold(out, v), states[:, -1].reshape(state.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, documents, before, states = ctx.saved_tensors
        size, link, time = ctx.size, ctx.link, q.shape[2]
        chunks = _cut_chunks(log_decay, documents, before, size, q.dtype)
        qs, ks, vs, gs = (_fold(x, size) for x in (q, k, v, grad))
        after = grad_state if link is None else torch.zeros_like(grad_state)
        sent = _product((qs * chunks.entering).transpose(-1, -2), gs).to(after.dtype)
        back = _run_down(sent, chunks.kept, after.flatten(0, 1))
        wait = None
        if link is not None:
            kept = chunks.kept.prod(1).view(after.shape[:2])
            wait = link.begin(back[:, 0].reshape(after.shape), kept, time, reverse=True)
        for_q, for_k, for_v = _within_chunks_backward(qs, ks, vs, gs, chunks)
        if wait is not None:
            came = wait().flatten(0, 1)[:, None]
            back[:, -1:] = came
            back[:, :-1].addcmul_(chunks.kept.flip(1).cumprod(1).flip(1), came)
        behind = back[:, 1:].to(q.dtype).contiguous()
        for_q.addcmul_(_product(gs, states.transpose(-1, -2)), chunks.entering)
        for_k.addcmul_(_product(vs, behind.transpose(-1, -2)), chunks.leaving)
        _add_product(for_v, ks * chunks.leaving, behind)
        for_state = back[:, 0].reshape(after.shape) if link is None else None
        return (_unfold(for_q, q), _unfold(for_k, k), _unfold(for_v, v), None, None, for_state, None, None, None)
