"""Sequences cut into chunks: how states decay over them, where documents cut them, and products over all of them.

Shapes: B batch, H heads, T time, N chunks of C tokens, G = B·H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Of 2¹⁶ to 2¹⁸ scores at a time the last was fastest on a core with 1 MiB of cache: 0.8 of the first's time in bf16.
CACHED_SCORES = 1 << 18


class Chunks(NamedTuple):
    """How a state decays and where it is cut. G = B·H rows, N chunks of C tokens.

    Attributes:
        heads: H.
        within: [G,1,C,C] γ^(i−j) on and below the diagonal, in the compute dtype.
        same: [B,N,C,C] 1 within a document, else 0, in the compute dtype; None where no document begins in a chunk.
        cut: for each row of the batch and chunk, whether a document begins in it; None on a card, where asking waits.
        entering: [G,N,C,1] weight of the state before the chunk in each token, in the compute dtype.
        leaving: [G,N,C,1] weight of each token in the state after the chunk, in the compute dtype.
        kept: [G,N,1,1] weight of the state before the chunk in the state after it, fp32 or wider.
    """

    num_heads: int
    intra_mask: Tensor
    same_document: Tensor | None
    has_boundary: list[list[bool]] | None
    decay_in: Tensor
    decay_out: Tensor
    chunk_decay: Tensor


def make_chunks(log_decay: Tensor, documents: Tensor, before: Tensor, size: int, dtype: torch.dtype) -> Chunks:
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
    return Chunks(
        heads,
        within.repeat(batch, 1, 1)[:, None],
        None if whole else (ids[:, :, :, None] == ids[:, :, None, :]).to(dtype),
        cut,
        entering.to(dtype).view(batch * heads, chunks, size, 1),
        leaving.to(dtype).view(batch * heads, chunks, size, 1),
        kept.view(batch * heads, chunks, 1, 1),
    )


def to_chunks(x: Tensor, size: int) -> Tensor:
    """[B,H,T,…] → [G,N,C,…], contiguous, with zeros behind the end."""
    padding = -x.shape[2] % size
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    return x.reshape(x.shape[0] * x.shape[1], -1, size, x.shape[-1]).contiguous()


def from_chunks(x: Tensor, like: Tensor) -> Tensor:
    """[G,N,C,…] → [B,H,T,…] of `like`."""
    return x.view(*like.shape[:2], -1, x.shape[-1])[:, :, : like.shape[2]]


def merge_leading(out: Tensor) -> Tensor:
    """The first two dimensions as one, to write into: never a copy, in which the result would be lost."""
    return out.view(-1, *out.shape[2:])


def chunk_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Matrix products over the first two dimensions."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def chunk_matmul_add(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a·b over the first two dimensions, without a pass of its own."""
    merge_leading(out).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))


def cache_blocks(x: Tensor, heads: int) -> list[tuple[slice, slice]]:
    """Blocks of [G,N,C,…] whose scores stay in a core's cache between the products; all at once on a card.

    A block is many short sequences, all heads of each, or some chunks of one head of a long one.
    """
    rows, chunks, size = x.shape[:3]
    if x.is_cuda:
        return [(slice(0, rows), slice(0, chunks))]
    most = max(1, CACHED_SCORES // size**2)
    step = max(1, most // (heads * chunks) * heads)
    places = [slice(n, n + most) for n in range(0, chunks, most)]
    return [(slice(row, row + step), place) for row in range(0, rows, step) for place in places]


def mask_scores(scores: Tensor, chunks: Chunks, block: tuple[slice, slice]) -> Tensor:
    """Decay the [g,n,C,C] scores of a block and cut them at documents, in place."""
    rows, places = block
    scores.mul_(chunks.intra_mask[rows])
    if chunks.same_document is None:
        return scores
    sequences = slice(rows.start // chunks.num_heads, (rows.start + len(scores) - 1) // chunks.num_heads + 1)
    # Most chunks lie within a document; only the others need the second pass.
    if chunks.has_boundary is None or any(any(row[places]) for row in chunks.has_boundary[sequences]):
        same = chunks.same_document[sequences, None, places]
        scores.unflatten(0, (len(same), -1)).mul_(same)
    return scores
