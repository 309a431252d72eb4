"""Sample documents of masked sources as their shards hold them, for the report: what of them is learned."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from kabrn_dist.data.index import Index, Source
from kabrn_dist.data.shard_set import FolderSet
from kabrn_dist.data.token_stream import TokenStream
from kabrn_dist.data.tokenizer import Tokenizer

_DOCUMENTS = 3
_TOKENS = 400


class LearnedPiece(NamedTuple):
    """A stretch of tokens.

    Attributes:
        text: what they stand for.
        learned: whether they carry loss.
        special: whether it is one special token.
    """

    text: str
    learned: bool
    special: bool


def sample_learned(folder: Path, index: Index, tokenizer: Tokenizer) -> dict[str, list[list[LearnedPiece]]]:
    """Return the first training documents of each source with loss masks, as pieces.

    Args:
        folder: folder of the shards.
        index: their index.
        tokenizer: their tokenizer.

    Raises:
        UserError: a shard cannot be read.
    """
    return {source.name: _sample_source(folder, index, source, tokenizer) for source in index.sources if source.masked}


def _sample_source(folder: Path, index: Index, source: Source, tokenizer: Tokenizer) -> list[list[LearnedPiece]]:
    stream = TokenStream([(FolderSet(folder, index), source)], "train")
    tokens, mask = stream.read_rows(np.zeros(1, np.int64), min(len(stream), _DOCUMENTS * _TOKENS))
    stream.close()
    assert mask is not None, "only masked sources are sampled"
    firsts = np.flatnonzero(tokens[0] == index.document_token)[: _DOCUMENTS + 1]
    if len(firsts) <= _DOCUMENTS:
        firsts = np.append(firsts, tokens.shape[1])
    pairs = zip(firsts[:-1].tolist(), firsts[1:].tolist(), strict=True)
    return [_make_pieces(tokens[0, a:b][:_TOKENS], mask[0, a:b], tokenizer) for a, b in pairs]


def _make_pieces(tokens: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> list[LearnedPiece]:
    special = set(tokenizer.special_tokens.values())
    pieces: list[LearnedPiece] = []
    waiting: list[int] = []
    for number, id in enumerate(tokens.tolist()):
        waiting.append(id)
        kind = bool(mask[number]), id in special
        following = number + 1
        if (
            following < len(tokens)
            and not kind[1]
            and kind == (bool(mask[following]), int(tokens[following]) in special)
        ):
            continue
        pieces.append(LearnedPiece(tokenizer.decode(waiting), *kind))
        waiting = []
    return pieces
