"""Sequences of whole documents: a document begins a new sequence where it does not fit into the rest of the last one.

Retention starts anew in every sequence. A conversation that is divided between two would lose its beginning in the
second, so that its answer would be learned without the question. The rest of a sequence is left without targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kabrn_dist.data.corpus import Corpus, WeightedSource
from kabrn_dist.data.index import Shard, SplitName
from kabrn_dist.data.token_stream import TokenStream
from kabrn_dist.utils.errors import UserError

_CHUNK_TOKENS = 1 << 20
# Of at most this fraction of the documents all that is to be learned may lie beyond a sequence.
_MAX_LOST = 0.05
_SHOWN_DOCUMENTS = 3


class CutDocument(NamedTuple):
    """A document that is longer than a sequence, of which the rest is left out.

    Attributes:
        number: Its number in its source and split, from 0.
        start: Its first token in the stream.
        tokens: Its length.
        is_lost: Whether nothing that carries loss is left of it, so that training leaves all of it out.
    """

    number: int
    start: int
    tokens: int
    is_lost: bool


class WholeDocuments(NamedTuple):
    """Sequences of one source.

    Attributes:
        starts: First token of each sequence in the stream, int64 [N].
        targets: How many of the tokens after it may be targets, int64 [N].
        documents: Number of documents of the source.
        cut: Those that are longer than a sequence.
    """

    starts: np.ndarray
    targets: np.ndarray
    documents: int
    cut: tuple[CutDocument, ...]


def plan_whole_documents(
    stream: TokenStream, start: int, stop: int, document_token: int, sequence_length: int
) -> WholeDocuments:
    """Divide a source into sequences of whole documents, in order. Reads all of its tokens.

    Targets of a document are all its tokens but the first, and the first of the document after it. Sequences without
    any target are left out.

    Args:
        stream: Stream that holds the source.
        start: First token of the source.
        stop: End of the source.
        document_token: Id of the token that begins each document.
        sequence_length: Tokens of a sequence.

    Raises:
        UserError: if a shard cannot be read.
    """
    firsts, losses = _survey(stream, start, stop, document_token)
    ends = np.append(firsts[1:], stop)
    starts, lengths, has_loss, cut = list[int](), list[int](), list[bool](), list[CutDocument]()
    documents = zip(firsts.tolist(), ends.tolist(), losses.tolist(), strict=True)
    for number, (first, end, loss) in enumerate(documents):
        if end - first > sequence_length:
            _, mask = stream.read_rows(np.array([first + 1]), sequence_length)
            is_used = mask is None or bool(mask.any())
            cut.append(CutDocument(number, first, end - first, not is_used))
            starts.append(first)
            lengths.append(sequence_length)
            has_loss.append(is_used)
        elif starts and starts[-1] + lengths[-1] == first and lengths[-1] + end - first <= sequence_length:
            lengths[-1] += end - first
            has_loss[-1] = has_loss[-1] or loss > 0
        else:
            starts.append(first)
            lengths.append(end - first)
            has_loss.append(loss > 0)
    kept = np.array(has_loss, bool)
    first_tokens, sizes = np.array(starts, np.int64)[kept], np.array(lengths, np.int64)[kept]
    # What follows the last document is of another source.
    targets = np.where(first_tokens + sizes < stop, sizes, sizes - 1)
    return WholeDocuments(first_tokens, targets, len(firsts), tuple(cut))


def plan_sources(
    corpus: Corpus, split: SplitName, stream: TokenStream, sequence_length: int
) -> dict[int, WholeDocuments]:
    """Return the sequences of the sources that keep documents whole, by the number of the source.

    Args:
        corpus: All sources.
        split: "train" or "validation".
        stream: Stream of this split.
        sequence_length: Tokens of a sequence.

    Raises:
        UserError: if a shard cannot be read, or too many documents to train on are lost.
    """
    edges = stream.edges.tolist()
    plans: dict[int, WholeDocuments] = {}
    for number, source in enumerate(corpus.sources):
        if source.source.whole:
            ends = edges[number], edges[number + 1]
            plans[number] = plan_whole_documents(stream, *ends, corpus.document_token, sequence_length)
            if split == "train" and source.weight > 0:
                _check_lost(source, plans[number], sequence_length)
    return plans


def describe_documents(shards: Sequence[Shard], documents: Sequence[CutDocument]) -> str:
    """Return where some documents of a source lie: shard and number in it of the first ones, and their lengths."""
    ends = np.cumsum([shard.documents for shard in shards])
    places = []
    for document in documents[:_SHOWN_DOCUMENTS]:
        shard = int(np.searchsorted(ends, document.number, "right"))
        number = document.number - (int(ends[shard - 1]) if shard else 0)
        places.append(f"{shards[shard].name} document {number}: {document.tokens:,} tokens")
    more = f"; and {len(documents) - _SHOWN_DOCUMENTS:,} more" if len(documents) > _SHOWN_DOCUMENTS else ""
    return f"{'; '.join(places)}{more}"


def _check_lost(source: WeightedSource, plan: WholeDocuments, sequence_length: int) -> None:
    lost = [document for document in plan.cut if document.is_lost]
    if len(lost) > _MAX_LOST * plan.documents:
        raise UserError(
            f"data.sequence_length {sequence_length}: {len(lost):,} of {plan.documents:,} documents of source "
            f"{source.name} are longer, and nothing that carries loss is left of them "
            f"({describe_documents(source.source.train.shards, lost)}); raise it, or remove them from the data"
        )


def mask_rest(
    plans: Mapping[int, WholeDocuments],
    sources: np.ndarray,
    numbers: np.ndarray,
    starts: np.ndarray,
    sequence_length: int,
    loss_mask: np.ndarray | None,
) -> np.ndarray:
    """Return which targets carry loss, without those before and after the documents of a sequence.

    Args:
        plans: Sequences of the sources that keep documents whole.
        sources: Source of each row, int64 [N].
        numbers: Number of its sequence, int64 [N].
        starts: First token of each row in the stream, int64 [N].
        sequence_length: Columns of a row, L.
        loss_mask: Which targets carry loss, bool [N, L]; None for all.

    Returns:
        bool [N, L].
    """
    mask = np.ones((len(starts), sequence_length), bool) if loss_mask is None else loss_mask.copy()
    columns = np.arange(sequence_length)
    for source, plan in plans.items():
        rows = np.flatnonzero(sources == source)
        first = (plan.starts[numbers[rows]] - starts[rows])[:, None]
        mask[rows] &= (columns >= first) & (columns < first + plan.targets[numbers[rows]][:, None])
    return mask


def _survey(stream: TokenStream, start: int, stop: int, document_token: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first token of each document, and the number of its other tokens that carry loss; int64 [D] each."""
    firsts: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    for place in range(start, stop, _CHUNK_TOKENS):
        tokens, mask = stream.read_rows(np.array([place]), min(_CHUNK_TOKENS, stop - place))
        is_first = tokens[0] == document_token
        carries_loss = ~is_first if mask is None else mask[0] & ~is_first
        numbers = np.cumsum(is_first)
        counts = np.bincount(numbers[carries_loss], minlength=int(numbers[-1]) + 1)
        if losses:
            # The first tokens of a chunk belong to the last document of the one before.
            losses[-1][-1:] += counts[0]
        firsts.append(place + np.flatnonzero(is_first))
        losses.append(counts[1:].astype(np.int64))
    return np.concatenate([*firsts, np.empty(0, np.int64)]), np.concatenate([*losses, np.empty(0, np.int64)])


def plan_whole_documents_naive(
    documents: Sequence[tuple[int, Sequence[bool]]], start: int, sequence_length: int
) -> list[tuple[int, int]]:
    """Return (start, targets) of each sequence, one document at a time: the reference for `plan_whole_documents`.

    Args:
        documents: Of each its number of tokens, and whether each carries loss.
        start: First token of the source.
        sequence_length: Tokens of a sequence.
    """
    sequences: list[list[tuple[int, list[bool]]]] = []
    place, room = start, 0
    for tokens, mask in documents:
        used = list(mask[: sequence_length + 1])
        if tokens <= room:
            sequences[-1].append((place, used))
            room -= tokens
        else:
            sequences.append([(place, used)])
            room = max(0, sequence_length - tokens)
        place += tokens
    found = []
    for sequence in sequences:
        first = sequence[0][0]
        end = min(sequence[-1][0] + len(sequence[-1][1]), first + sequence_length)
        if any(any(mask[1:]) for _, mask in sequence):
            found.append((first, end - first - (end == place)))
    return found
