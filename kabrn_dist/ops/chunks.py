"""Chunks of sequences for retention: how states decay over them, where documents cut them, products over all of them.

Shapes: B batch, H heads, T time, N chunks of C tokens, G = B·H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Of 2¹⁶ to 2¹⁸ scores at a time, 2¹⁸ was fastest on a core with 1 MiB of cache: 0.8 of the time of 2¹⁶ in bf16.
CACHED_SCORES = 1 << 18


class Chunks(NamedTuple):
    """How a state decays over chunks and where documents cut it. G = B·H rows, N chunks of C tokens.

    Attributes:
        num_heads: H.
        intra_mask: [G,1,C,C] γ^(i−j) on and below the diagonal, in the compute dtype.
        same_document: [B,N,C,C] 1 within a document, else 0, in the compute dtype; None where no document begins
            inside a chunk.
        has_boundary: for each row of the batch and each chunk, whether a document begins inside it; None on a GPU,
            where the answer would have to be waited for.
        decay_in: [G,N,C,1] weight of the state before the chunk in each token, in the compute dtype.
        decay_out: [G,N,C,1] weight of each token in the state after the chunk, in the compute dtype.
        chunk_decay: [G,N,1,1] weight of the state before the chunk in the state after it, fp32 or wider.
    """

    num_heads: int
    intra_mask: Tensor
    same_document: Tensor | None
    has_boundary: list[list[bool]] | None
    decay_in: Tensor
    decay_out: Tensor
    chunk_decay: Tensor


def make_chunks(log_decay: Tensor, documents: Tensor, before: Tensor, size: int, dtype: torch.dtype) -> Chunks:
    """Compute decays and masks for chunks of a sequence; the last chunk may be shorter.

    Args:
        log_decay: [H] log γ.
        documents: [B,T] int64.
        before: [B] the document of the token in front of the first.
        size: C.
        dtype: the compute dtype.
    """
    time, heads = documents.shape[1], len(log_decay)
    padding = -time % size
    ids = torch.cat([documents, documents[:, -1:].expand(-1, padding)], 1).unflatten(1, (-1, size))
    batch, chunks, _ = ids.shape
    last = ids[:, :, -1]
    previous = torch.cat([before[:, None], last[:, :-1]], 1)
    position = torch.arange(size, device=ids.device)
    lengths = (time - size * torch.arange(chunks, device=ids.device)).clamp(max=size)
    decay = log_decay[:, None, None]
    intra_mask = ((position[:, None] - position).clamp(min=0) * decay).exp().tril().to(dtype)
    decay_in = ((position + 1) * decay).exp() * (ids == previous[:, :, None])[:, None]
    decay_out = ((lengths[:, None] - 1 - position).clamp(min=0) * decay).exp() * (ids == last[:, :, None])[:, None]
    chunk_decay = (lengths * log_decay[:, None]).exp() * (last == previous)[:, None]
    has_boundary = None if ids.is_cuda else (ids[:, :, 0] != last).tolist()
    one_document = has_boundary is not None and not any(map(any, has_boundary))
    return Chunks(
        heads,
        intra_mask.repeat(batch, 1, 1)[:, None],
        None if one_document else (ids[:, :, :, None] == ids[:, :, None, :]).to(dtype),
        has_boundary,
        decay_in.to(dtype).view(batch * heads, chunks, size, 1),
        decay_out.to(dtype).view(batch * heads, chunks, size, 1),
        chunk_decay.view(batch * heads, chunks, 1, 1),
    )


def to_chunks(x: Tensor, size: int) -> Tensor:
    """Cut [B,H,T,…] into [G,N,C,…], contiguous, with zeros after the end."""
    padding = -x.shape[2] % size
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    return x.reshape(x.shape[0] * x.shape[1], -1, size, x.shape[-1]).contiguous()


def from_chunks(x: Tensor, like: Tensor) -> Tensor:
    """Join [G,N,C,…] to [B,H,T,…], the shape of `like`."""
    return x.view(*like.shape[:2], -1, x.shape[-1])[:, :, : like.shape[2]]


def merge_leading(out: Tensor) -> Tensor:
    """Return a view with the first two dimensions merged, to write into; never a copy, which would lose the result."""
    return out.view(-1, *out.shape[2:])


def chunk_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices over the first two dimensions."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def chunk_matmul_add(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add matrix products over the first two dimensions to `out`, in the same pass."""
    merge_leading(out).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))


def cache_blocks(x: Tensor, heads: int) -> list[tuple[slice, slice]]:
    """Return blocks of [G,N,C,…] whose scores stay in a core's cache between the products; one block on a GPU.

    A block is many short sequences, all heads of each, or some chunks of one head of a long one.
    """
    rows, chunks, size = x.shape[:3]
    if x.is_cuda:
        return [(slice(0, rows), slice(0, chunks))]
    max_chunks = max(1, CACHED_SCORES // size**2)
    step = max(1, max_chunks // (heads * chunks) * heads)
    chunk_slices = [slice(n, n + max_chunks) for n in range(0, chunks, max_chunks)]
    return [(slice(row, row + step), part) for row in range(0, rows, step) for part in chunk_slices]


def mask_scores(scores: Tensor, chunks: Chunks, block: tuple[slice, slice]) -> Tensor:
    """Apply decay and document boundaries to the [g,n,C,C] scores of a block, in place."""
    rows, parts = block
    scores.mul_(chunks.intra_mask[rows])
    if chunks.same_document is None:
        return scores
    sequences = slice(rows.start // chunks.num_heads, (rows.start + len(scores) - 1) // chunks.num_heads + 1)
    # Most chunks lie within a document; only the others need the second pass.
    if chunks.has_boundary is None or any(any(row[parts]) for row in chunks.has_boundary[sequences]):
        same = chunks.same_document[sequences, None, parts]
        scores.unflatten(0, (len(same), -1)).mul_(same)
    return scores
