"""States of decoding as rows of a batch: chosen, repeated, and put together from batches that read different lengths.

Shapes:
    B: batch.
    H: heads.
    S: tokens that a cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.model.attention import KVCache
from kabrn_dist.model.mixer import MixerState

# Number of the document that everything read belongs to, and of the places in a cache that hold nothing: attention
# sees keys of a query's own document alone, and numbers never fall along a row.
DOCUMENT, NOTHING = 1, 0


def select_rows(states: list[Any], rows: Tensor) -> list[Any]:
    """Return the states of some rows, in any order and repeated where a row is named again.

    Caches keep no column in which all of these rows hold nothing.

    Args:
        states: One per layer, as `MixKABRN.decode` returns them.
        rows: [·] int64, on the device of the states.
    """
    chosen = [_apply(lambda part: part.index_select(0, rows), state) for state in states]
    return [_map_caches(_trim, state) for state in chosen]


def concatenate_rows(batches: Sequence[list[Any]]) -> list[Any]:
    """Return the states of the rows of several batches, one below the other.

    Caches of batches that have read less begin with places that hold nothing.
    """
    if len(batches) == 1:
        return batches[0]
    return [_concatenate(layer) for layer in zip(*batches, strict=True)]


def _concatenate(states: Sequence[Any]) -> Any:
    first = states[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(list(states))
    if isinstance(first, KVCache):
        longest = max(state.documents.shape[1] for state in states)
        states = [_lengthen(state, longest) for state in states]
    return type(first)(*(_concatenate(parts) for parts in zip(*states, strict=True)))


def _lengthen(cache: KVCache, length: int) -> KVCache:
    """The cache with places in front that hold nothing."""
    missing = length - cache.documents.shape[1]
    if not missing:
        return cache
    # Zeros, for what is masked is still multiplied.
    k, v = (F.pad(part, (0, 0, missing, 0)) for part in (cache.k, cache.v))
    return KVCache(k, v, F.pad(cache.documents, (missing, 0), value=NOTHING))


def _trim(cache: KVCache) -> KVCache:
    """The cache without the first places if they hold nothing in any row."""
    unused = int((cache.documents == NOTHING).sum(1).min()) if len(cache.documents) else 0
    if not unused:
        return cache
    return KVCache(cache.k[:, :, unused:], cache.v[:, :, unused:], cache.documents[:, unused:])


def _apply(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    if state is None:
        return None
    if isinstance(state, Tensor):
        return function(state)
    return type(state)(*(_apply(function, part) for part in state))


def _map_caches(function: Callable[[KVCache], KVCache], state: Any) -> Any:
    if isinstance(state, KVCache):
        return function(state)
    if isinstance(state, MixerState):
        return state._replace(mixer_state=_map_caches(function, state.mixer_state))
    return state
