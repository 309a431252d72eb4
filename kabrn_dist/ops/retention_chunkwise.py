"""The chunkwise form of retention, with its gradient, on one rank or on a slice of a sequence that many ranks share.

Only differences of positions inside a chunk are exponentiated, so no length overflows; memory grows linearly with it.

Shapes: B batch, H heads, T time, K key width of a head, V value width of a head, N chunks of C tokens, G = B·H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kabrn_dist.distributed.state_scan import SequenceLink
from kabrn_dist.kernels.selection import matmul_dtype
from kabrn_dist.ops.chunks import (
    Chunks,
    cache_blocks,
    chunk_matmul,
    chunk_matmul_add,
    from_chunks,
    make_chunks,
    mask_scores,
    merge_leading,
    to_chunks,
)


def retention_torch(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, documents: Tensor, state: Tensor, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Compute `retention_chunk` in plain torch: on CPUs, on GPUs without Triton, and as the reference of kernels."""
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
    """Compute this rank's slice of sequences that are spread over the ranks of `link`. Collective.

    The algebra is in docs/math.md, "Sequence parallelism".

    Args:
        q: [B,H,T,K], T the length of a slice.
        k: [B,H,T,K].
        v: [B,H,T,V].
        log_decay: [H] log γ, fp32 (fp64 for fp64 inputs).
        documents: [B,T] int64 of this slice, numbered over the whole sequence.
        starts: [B] bool, true where the slice's first token begins a document.
        link: the exchange of states between the slices.
        chunk: tokens of a chunk.

    Returns:
        out [B,H,T,V]. Gradients of q, k and v are complete on every rank.
    """
    check_retention_inputs(q, k, v, log_decay, documents, None)
    before = torch.where(starts, documents[:, 0] - 1, documents[:, 0])
    state = torch.zeros_like(q[:, :, 0, :, None] * v[:, :, 0, None, :], dtype=log_decay.dtype)
    return _Retention.apply(q, k, v, log_decay, documents, state, before, chunk, link)[0]


def check_retention_inputs(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, documents: Tensor, state: Tensor | None
) -> None:
    """Raise ValueError, naming the argument, if shapes do not fit, document numbers fall, or T = 0."""
    batch, heads, time, key = q.shape
    expected = {
        "k": (k, (batch, heads, time, key)),
        "v": (v, (batch, heads, time, v.shape[-1])),
        "log_decay": (log_decay, (heads,)),
        "documents": (documents, (batch, time)),
        "state": (state, (batch, heads, key, v.shape[-1])),
    }
    if time == 0:
        raise ValueError("q: there are no tokens (T = 0)")
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} does not fit q {tuple(q.shape)}; expected {shape}")
    # On a GPU the answer would have to be waited for.
    if not documents.is_cuda and bool((documents.diff() < 0).any()):
        raise ValueError("documents: their numbers fall along a row; number them in the order of the text")


def _within_chunks(q: Tensor, k: Tensor, v: Tensor, chunks: Chunks) -> Tensor:
    """The part of the output from tokens of the same chunk: [G,N,C,V] from q, k, v in chunks."""
    out = torch.empty_like(v)
    for block in cache_blocks(q, chunks.num_heads):
        scores = mask_scores(chunk_matmul(q[block], k[block].transpose(-1, -2)), chunks, block)
        torch.bmm(scores.flatten(0, 1), v[block].flatten(0, 1), out=merge_leading(out[block]))
    return out


def _within_chunks_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, chunks: Chunks
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in chunks from that of the result of `_within_chunks`."""
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    for block in cache_blocks(q, chunks.num_heads):
        qs, ks, gs = (x[block].flatten(0, 1) for x in (q, k, grad))
        outs = (merge_leading(x[block]) for x in (grad_q, grad_k, grad_v))
        out_q, out_k, out_v = outs
        scores = mask_scores(chunk_matmul(q[block], k[block].transpose(-1, -2)), chunks, block).flatten(0, 1)
        torch.bmm(scores.transpose(1, 2), gs, out=out_v)
        scores = mask_scores(chunk_matmul(grad[block], v[block].transpose(-1, -2)), chunks, block).flatten(0, 1)
        torch.bmm(scores, ks, out=out_q)
        torch.bmm(scores.transpose(1, 2), qs, out=out_k)
    return grad_q, grad_k, grad_v


def _scan_forward(added: Tensor, chunk_decay: Tensor, state: Tensor) -> Tensor:
    """States [G,N+1,K,V] before each chunk and after the last, from what chunks add [G,N,K,V] and the first state."""
    states = state.new_empty(added.shape[0], added.shape[1] + 1, *added.shape[2:])
    states[:, 0] = state
    for n in range(added.shape[1]):
        torch.addcmul(added[:, n], chunk_decay[:, n], states[:, n], out=states[:, n + 1])
    return states


def _scan_backward(added: Tensor, chunk_decay: Tensor, state: Tensor) -> Tensor:
    """The same in reverse: gradients [G,N+1,K,V] of the states before each chunk and, last, after the last chunk."""
    states = state.new_empty(added.shape[0], added.shape[1] + 1, *added.shape[2:])
    states[:, -1] = state
    for n in range(added.shape[1] - 1, -1, -1):
        torch.addcmul(added[:, n], chunk_decay[:, n], states[:, n + 1], out=states[:, n])
    return states


class _Retention(torch.autograd.Function):
    """Saves q, k, v and one state a chunk; scores are computed again in backward.

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
        compute_dtype = matmul_dtype(q.device.type, q.dtype)
        chunks = make_chunks(log_decay, documents, before, size, compute_dtype)
        qs, ks, vs = (to_chunks(x.to(compute_dtype), size) for x in (q, k, v))
        added = chunk_matmul((ks * chunks.decay_out).transpose(-1, -2), vs).to(state.dtype)
        states = _scan_forward(added, chunks.chunk_decay, state.flatten(0, 1))
        wait = None
        if link is not None:
            wait = link.start(states[:, -1].view_as(state), chunks.chunk_decay.prod(1).view(state.shape[:2]), time)
        out = _within_chunks(qs, ks, vs, chunks)
        if wait is not None:
            received = wait().flatten(0, 1)[:, None]
            states[:, :1] = received
            states[:, 1:].addcmul_(chunks.chunk_decay.cumprod(1), received)
        used = states[:, :-1].to(compute_dtype).contiguous()
        chunk_matmul_add(out, qs * chunks.decay_in, used)
        ctx.save_for_backward(q, k, v, log_decay, documents, before, used.to(q.dtype))
        ctx.size, ctx.link = size, link
        return from_chunks(out, v).to(v.dtype), states[:, -1].reshape(state.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, documents, before, states = ctx.saved_tensors
        size, link, time = ctx.size, ctx.link, q.shape[2]
        compute_dtype = matmul_dtype(q.device.type, q.dtype)
        chunks = make_chunks(log_decay, documents, before, size, compute_dtype)
        qs, ks, vs, gs = (to_chunks(x.to(compute_dtype), size) for x in (q, k, v, grad))
        after = grad_state if link is None else torch.zeros_like(grad_state)
        sent = chunk_matmul((qs * chunks.decay_in).transpose(-1, -2), gs).to(after.dtype)
        back = _scan_backward(sent, chunks.chunk_decay, after.flatten(0, 1))
        wait = None
        if link is not None:
            decay = chunks.chunk_decay.prod(1).view(after.shape[:2])
            wait = link.start(back[:, 0].reshape(after.shape), decay, time, reverse=True)
        grad_q, grad_k, grad_v = _within_chunks_backward(qs, ks, vs, gs, chunks)
        if wait is not None:
            received = wait().flatten(0, 1)[:, None]
            back[:, -1:] = received
            back[:, :-1].addcmul_(chunks.chunk_decay.flip(1).cumprod(1).flip(1), received)
        behind = back[:, 1:].to(compute_dtype).contiguous()
        grad_q.addcmul_(chunk_matmul(gs, states.to(compute_dtype).transpose(-1, -2)), chunks.decay_in)
        grad_k.addcmul_(chunk_matmul(vs, behind.transpose(-1, -2)), chunks.decay_out)
        chunk_matmul_add(grad_v, ks * chunks.decay_out, behind)
        grad_first = back[:, 0].reshape(after.shape) if link is None else None
        return (
            from_chunks(grad_q, q).to(q.dtype),
            from_chunks(grad_k, k).to(k.dtype),
            from_chunks(grad_v, v).to(v.dtype),
            None,
            None,
            grad_first,
            None,
            None,
            None,
        )
