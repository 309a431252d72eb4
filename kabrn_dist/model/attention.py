"""Causal softmax attention over packed documents: exact recall, at a cost that grows with a document's length.

Queries and keys are RMS-normalized per head before the scores, which bounds them by √K (query-key norm, arXiv
2010.04245; in large models arXiv 2302.05442). The norm has no gain, so it commutes with the rotary
embedding.

Shapes:
    B: batch.
    H: heads.
    S: tokens seen so far.
    T: queries, those of the last T of the S tokens.
    K: key size of a head.
    V: value size of a head.
    D: hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kabrn_dist.config import RetentionConfig
from kabrn_dist.distributed.kv_gather import gather_past, gather_past_ids
from kabrn_dist.model.mixer import Mixer, PositionInfo
from kabrn_dist.ops.activation_quant import rms_norm
from kabrn_dist.ops.weight_quant import QuantState

# Queries whose mask is in memory at a time. On a CPU, 4,096 tokens took 0.8 of the time of blocks of 2,048 as one
# document and 0.3 as documents of 512.
QUERY_BLOCK = 512
# A result is a mean of values. Over n unlike values it shrinks by √n, which is signal and not noise: unlike
# retention's first tokens it may be scaled up again.
ATTENTION_NORM_EPS = 1e-6


class KVCache(NamedTuple):
    """Keys and values of all tokens seen so far, for decoding.

    Attributes:
        k: [B,H,S,K], normalized and rotated.
        v: [B,H,S,V].
        documents: [B,S] int64, never falling along a row.
    """

    k: Tensor
    v: Tensor
    documents: Tensor


def attention_naive(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Compute `attention` by definition, with T×S scores in fp64. Same arguments; the result is fp64."""
    q, k, v = q.double(), k.double(), v.double()
    tokens, seen = q.shape[2], k.shape[2]
    rows = []
    for t in range(seen - tokens, seen):
        scores = q[:, :, t - seen, None, :] @ k[:, :, : t + 1].transpose(-1, -2) * q.shape[-1] ** -0.5
        other = documents[:, : t + 1] != documents[:, t, None]
        rows.append(scores.masked_fill(other[:, None, None], -torch.inf).softmax(-1) @ v[:, :, : t + 1])
    return torch.cat(rows, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, block_size: int = QUERY_BLOCK) -> Tensor:
    """Return each query's attention over the keys of its document up to its own position.

    Work grows with T × the longest documents, not with T × S: a block of queries leaves out the keys before its first
    document. Memory grows with T + S: backward computes a block's mask and scores again instead of keeping them.

    Args:
        q: [B,H,T,K]; the queries of the last T of the S tokens.
        k: [B,H,S,K], in the dtype of q.
        v: [B,H,S,V], in the dtype of q.
        documents: [B,S] int64, never falling along a row.
        block_size: queries whose mask is in memory at a time; changes speed and memory only.

    Returns:
        [B,H,T,V] in the dtype of v.
    """
    tokens, seen, keys, values = q.shape[2], k.shape[2], k.shape[-1], v.shape[-1]
    # torch's fused kernels want K = V, and without them keep all T×S scores; zeros change no score and no value.
    q, k, v = _pad(q, max(keys, values)), _pad(k, max(keys, values)), _pad(v, max(keys, values))
    firsts, one = _first_keys(documents, tokens, block_size)
    if one and tokens == seen:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=keys**-0.5)[..., :values]
    outs = []
    for first, start in zip(firsts, range(0, tokens, block_size), strict=True):
        stop = min(start + block_size, tokens)
        past = slice(first, seen - tokens + stop)
        part = (q[:, :, start:stop], k[:, :, past], v[:, :, past], documents[:, past], keys**-0.5)
        # One block's mask is small; kept for backward, those of all blocks would be T×S again.
        again = len(firsts) > 1 and torch.is_grad_enabled()
        outs.append(
            checkpoint(_block, *part, use_reentrant=False, preserve_rng_state=False) if again else _block(*part)
        )
    return (torch.cat(outs, 2) if len(outs) > 1 else outs[0])[..., :values]


def _pad(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def _first_keys(documents: Tensor, tokens: int, block: int) -> tuple[list[int], bool]:
    """The first key that any row's query of each block may see; and whether each row is one document.

    Shapes of kernels and slices hang on both, so on CUDA the host waits for them: once a layer, a few numbers, as
    the router of every layer does with its loads. Knowing them saves the scores between unlike documents.
    """
    offset = documents.shape[1] - tokens
    asked = torch.cat([documents[:, offset::block], documents[:, -1:]], 1)
    found = torch.searchsorted(documents.contiguous(), asked)
    *firsts, latest = torch.cat([found[:, :-1].amin(0), found[:, -1:].amax(0)]).tolist()
    return firsts, latest == 0


def _block(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, scale: float) -> Tensor:
    """`attention` with the whole mask [B,1,T,S] in memory."""
    tokens, seen = q.shape[2], k.shape[2]
    same = documents[:, seen - tokens :, None] == documents[:, None, :]
    mask = same.tril_(seen - tokens)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class Attention(Mixer):
    """The layer of attention. Under sequence parallelism each rank holds an equal, contiguous slice of all rows.

    Args:
        hidden_size: D.
        config: heads and their sizes, as retention's; decay and chunk size are not used.
        quant: see `BitLinear`.
        init_gain: see `Mixer`.
        group: see `Mixer`.
        kernel_size: see `Mixer`.
    """

    def __init__(
        self,
        hidden_size: int,
        config: RetentionConfig,
        quant: bool | QuantState,
        init_gain: float,
        group: dist.ProcessGroup | None = None,
        kernel_size: int = 0,
    ) -> None:
        super().__init__(hidden_size, config, quant, init_gain, ATTENTION_NORM_EPS, kernel_size, group)
        self.block_size = QUERY_BLOCK

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, position: PositionInfo, state: KVCache | None
    ) -> tuple[Tensor, KVCache | None]:
        """Attend; see `Mixer.mix`. The state is a `KVCache`, or None with a group. Collective over the group.

        Raises:
            ValueError: for a state with a group; decoding is for whole rows.
        """
        q, k, documents = rms_norm(q), rms_norm(k), position.documents
        if self.group is not None:
            if state is not None:
                raise ValueError(
                    f"attention: a cache (state) with a sequence group of {dist.get_world_size(self.group)} ranks; "
                    "decode with group=None, or read the rows from their start with state=None"
                )
            documents = gather_past_ids(documents, self.group)
            k, v = gather_past(k, v, self.group)
            return attention(q, k, v, documents, self.block_size), None
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
            documents = torch.cat([state.documents, documents], 1)
        return attention(q, k, v, documents, self.block_size), KVCache(k, v, documents)
