"""Dataset of token sequences: from positions to the batches that a training step or an evaluation reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from kabrn_dist.data.corpus import Corpus
from kabrn_dist.data.index import Shard, SplitName
from kabrn_dist.data.prefetch import Prefetcher
from kabrn_dist.data.sampler import MixtureSampler
from kabrn_dist.data.shard_set import ShardSet
from kabrn_dist.data.state import DataState, data_fingerprint, describe_sources
from kabrn_dist.data.token_stream import TokenStream
from kabrn_dist.data.whole_documents import mask_rest, plan_sources
from kabrn_dist.utils.errors import UserError


class Batch(NamedTuple):
    """Rows of tokens.

    Attributes:
        tokens: Input of the model, int64 [B, T].
        targets: Token that follows each, int64 [B, T]; −100 where there is no loss.
        documents: Number of document starts in columns 1 to t, int64 [B, T]: starts at 0 and rises within a row.
        positions: Index within the document, int64 [B, T], counted from its start or the row's start, whichever is
            later.
        sources: Number of the source of each row, int64 [B].
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor
    positions: torch.Tensor
    sources: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; from pinned memory the copy overlaps with computation."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class TokenDataset:
    """Sequences of one split of a corpus.

    Sequence i of a source is its tokens [i·L, i·L + L], L `sequence_length`; of a source that keeps documents whole, as
    many of the next ones as fit, and what follows them in the row has no targets. If `ordered`, global positions go
    through the mixture of the sources and the shuffled order of each, until `num_positions`. Otherwise positions go
    through all sources one after another, once, whatever their weights.

    Args:
        corpus: Sources to read.
        split: "train" or "validation".
        sequence_length: Tokens of a sequence.
        seed: Seed of the order.
        ordered: Read the mixture in shuffled order instead of source by source.

    Attributes:
        corpus: Sources to read.
        sequence_length: Tokens of a sequence.
        seed: Seed of the order.
        sequences_per_source: Number of sequences of each source, 0 for one that is left out.
        num_sequences: Their sum.
        num_positions: Number of positions; None if they never end.
        whole: Sequences of the sources that keep documents whole, by the number of the source.

    Raises:
        UserError: if the split, or a source that is to be drawn from, is shorter than one sequence.
    """

    def __init__(self, corpus: Corpus, split: SplitName, sequence_length: int, seed: int, ordered: bool = True) -> None:
        if sequence_length < 1:
            raise UserError(f"sequence_length: {sequence_length} is not a length; use at least 1")
        self.corpus, self.sequence_length, self.seed = corpus, sequence_length, seed
        self._stream = TokenStream([source[1:3] for source in corpus.sources], split, corpus.files)
        # The last sequence needs one token more, the target of its last column.
        tokens = np.diff(self._stream.edges).tolist()
        available = [max(0, count - 1) // sequence_length for count in tokens]
        self.whole = plan_sources(corpus, split, self._stream, sequence_length)
        for number, plan in self.whole.items():
            available[number] = len(plan.starts)
        is_drawn = [source.weight > 0 or not ordered for source in corpus.sources]
        _check_lengths(corpus, split, sequence_length, available, is_drawn if ordered else [])
        self.sequences_per_source = [count if drawn else 0 for count, drawn in zip(available, is_drawn, strict=True)]
        self.num_sequences = sum(self.sequences_per_source)
        self._first_positions = np.cumsum([0, *self.sequences_per_source])
        self._sampler = MixtureSampler(corpus.sources, self.sequences_per_source, seed) if ordered else None
        self.num_positions = self.num_sequences if self._sampler is None else self._sampler.num_positions
        # Prefetching into half of the cache leaves the other half for what is being read.
        remote = ordered and corpus.is_remote
        self._prefetcher = Prefetcher(self._upcoming_shards, corpus.cache_bytes / 2) if remote else None

    def get(self, positions: Sequence[int]) -> Batch:
        """Return the sequences at global positions, one row each, in the order given.

        Raises:
            UserError: if a shard cannot be read or has turned out to be damaged, or an ordered split has ended.
            IndexError: for a position that an unordered split does not have.
        """
        self.corpus.files.check()
        position_array = np.asarray(positions, np.int64)
        if self._sampler is not None and position_array.size:
            self.check_length(int(position_array.max()) + 1)
        if self._prefetcher is not None and position_array.size:
            self._prefetcher.advance(int(position_array.max()))
        sources, numbers = self._lookup(position_array)
        starts = self._starts(sources, numbers)
        rows, loss_mask = self._read_rows(starts)
        # Targets are the tokens after the first.
        loss_mask = None if loss_mask is None else loss_mask[:, 1:]
        if self.whole:
            loss_mask = mask_rest(self.whole, sources, numbers, starts, self.sequence_length, loss_mask)
        return make_batch(rows, self.corpus.document_token, loss_mask, sources)

    def validation_positions(self, count: int) -> list[int]:
        """Return `count` positions of an unordered split: the same number of each source, its first ones.

        A source with fewer sequences gives all of its own; the result is shorter if there are fewer than `count`.
        """
        chosen = [0] * len(self.sequences_per_source)
        remaining = min(count, self.num_sequences)
        while remaining:
            for source in (s for s, n in enumerate(self.sequences_per_source) if chosen[s] < n):
                if remaining:
                    chosen[source], remaining = chosen[source] + 1, remaining - 1
        starts = self._first_positions[:-1].tolist()
        return [start + n for start, number in zip(starts, chosen, strict=True) for n in range(number)]

    def sequences_drawn(self, consumed: int) -> list[int]:
        """Return the number of sequences of each source before a global position of an ordered split."""
        assert self._sampler is not None, "only an ordered split is drawn from"
        return self._sampler.sequences_drawn(consumed)

    def check_length(self, sequences: int) -> None:
        """Check that the data has as many positions as a run needs.

        Raises:
            UserError: if the data ends before `sequences` sequences have been drawn.
        """
        if self.num_positions is not None and sequences > self.num_positions:
            limits = ", ".join(f"{s.name} {s.epochs:g}" for s in self.corpus.sources if s.weight and s.epochs)
            raise UserError(
                f"training.steps × training.global_batch_size needs {sequences:,} sequences, the data has "
                f"{self.num_positions:,} (epochs: {limits}); lower training.steps, or raise or leave out data.epochs "
                "for one of them"
            )

    def state(self, consumed: int) -> DataState:
        """Return the state to store in a checkpoint: all positions below `consumed` are done."""
        assert self._sampler is not None, "only an ordered split can be resumed"
        descriptions = describe_sources(self.corpus, self._sampler.slots_per_period)
        fingerprint = data_fingerprint(self.corpus, descriptions)
        return DataState(consumed, self.seed, self.sequence_length, fingerprint, descriptions)

    def close(self) -> None:
        """Close the shard files and stop prefetching."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self.corpus.files.close()

    def _lookup(self, positions: np.ndarray) -> np.ndarray:
        """Map positions to sources and sequence numbers, int64 [2, N]."""
        if self._sampler is not None:
            return self._sampler.lookup_cached(positions)
        if positions.size and not 0 <= positions.min() <= positions.max() < self.num_sequences:
            raise IndexError(f"positions {positions.min()} to {positions.max()} of {self.num_sequences} sequences")
        sources = np.searchsorted(self._first_positions, positions, "right") - 1
        return np.stack([sources, positions - self._first_positions[sources]])

    def _starts(self, sources: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return the first token of each row in the stream of all sources.

        That is the first of its sequence, unless the stream ends within the row: then the row begins earlier.
        """
        starts = np.asarray(self._stream.edges[sources] + numbers * self.sequence_length)
        for number, plan in self.whole.items():
            of_source = sources == number
            starts[of_source] = plan.starts[numbers[of_source]]
        return np.minimum(starts, max(0, len(self._stream) - self.sequence_length - 1)) if self.whole else starts

    def _read_rows(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Read rows; a stream that is shorter than one ends in documents without tokens."""
        width = self.sequence_length + 1
        rows, loss_mask = self._stream.read_rows(starts, min(width, len(self._stream)) if self.whole else width)
        padding = ((0, 0), (0, width - rows.shape[1]))
        if padding[1][1]:
            rows = np.pad(rows, padding, constant_values=self.corpus.document_token)
            loss_mask = None if loss_mask is None else np.pad(loss_mask, padding)
        return rows, loss_mask

    def _upcoming_shards(self, position: int, count: int) -> Iterator[tuple[ShardSet, Shard]]:
        stop = position + count if self.num_positions is None else min(self.num_positions, position + count)
        assert self._sampler is not None
        starts = self._starts(*self._sampler.lookup(np.arange(position, stop)))
        stops = np.minimum(starts + self.sequence_length + 1, len(self._stream))
        yield from chain.from_iterable(self._stream.list_shards(starts, stops))


def make_batch(
    rows: np.ndarray, document_token: int, loss_mask: np.ndarray | None = None, sources: np.ndarray | None = None
) -> Batch:
    """Turn rows of consecutive tokens into a batch.

    A document's last token predicts the document token of the next one: its "end of document".

    Args:
        rows: Tokens, integers of any type [B, T + 1].
        document_token: Id of the token that begins each document.
        loss_mask: Whether each target carries loss, bool [B, T]; None if all do.
        sources: Source of each row, int64 [B]; None for source 0.

    Example:
        >>> batch = make_batch(np.array([[5, 6, 9, 7, 8]]), document_token=9)
        >>> batch.targets.tolist(), batch.documents.tolist(), batch.positions.tolist()
        ([[6, 9, 7, 8]], [[0, 0, 1, 1]], [[0, 1, 0, 1]])
    """
    starts = rows[:, :-1] == document_token
    # A row's first token opens document 0 whether or not a document starts there.
    starts[:, :1] = True
    # There are few documents per token, so repeating values is faster than running sums.
    first = starts.reshape(-1).nonzero()[0]
    lengths = np.append(first[1:], starts.size) - first
    count, width = starts.shape
    first_of_row = np.searchsorted(first, np.arange(count) * width)
    documents = np.repeat(np.arange(len(first)) - first_of_row[first // max(1, width)], lengths)
    positions = np.arange(starts.size)
    positions -= np.repeat(first, lengths)
    tokens, targets = (np.array(part, np.int64, order="C") for part in (rows[:, :-1], rows[:, 1:]))
    if loss_mask is not None:
        # Choosing between two values is slow where the mask changes often; a product is not.
        targets += 100
        targets *= loss_mask
        targets -= 100
    row_sources = np.zeros(len(rows), np.int64) if sources is None else sources
    parts = (tokens, targets, documents.reshape(starts.shape), positions.reshape(starts.shape), row_sources)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


def make_batch_naive(
    rows: np.ndarray, document_token: int, loss_mask: np.ndarray | None = None, sources: np.ndarray | None = None
) -> Batch:
    """Return what `make_batch` does, one token at a time."""
    parts: tuple[list[list[int]], ...] = ([], [], [], [])
    for number, tokens in enumerate(rows.tolist()):
        document, position, documents, positions = 0, 0, [0], [0]
        for token in tokens[1:-1]:
            starts = token == document_token
            document, position = document + starts, 0 if starts else position + 1
            documents.append(document)
            positions.append(position)
        targets = [t if loss_mask is None or loss_mask[number][n] else -100 for n, t in enumerate(tokens[1:])]
        for part, row in zip(parts, (tokens[:-1], targets, documents, positions), strict=True):
            part.append(row)
    row_sources = [0] * len(rows) if sources is None else sources.tolist()
    return Batch(*(torch.tensor(part, dtype=torch.int64) for part in (*parts, row_sources)))


def sequence_slice(batch: Batch, rank: int, world_size: int) -> Batch:
    """Return the contiguous columns of one sequence-parallel rank, [B, T / world_size].

    Documents and positions stay those of the whole row.

    Raises:
        UserError: if `world_size` does not divide T.
    """
    length = batch.tokens.shape[1]
    if length % world_size:
        raise UserError(
            f"data.sequence_length: {length} columns do not split evenly over a sequence degree of {world_size}; "
            "set data.sequence_length to a multiple of parallel.sequence_parallel"
        )
    width = length // world_size
    columns = [part[:, rank * width : (rank + 1) * width].contiguous() for part in batch[:-1]]
    return Batch(*(*columns, batch.sources))


def _check_lengths(corpus: Corpus, split: SplitName, length: int, available: list[int], needed: list[bool]) -> None:
    """Refuse a source without a sequence where it is needed, and a split without any."""
    short = [
        source for source, count, need in zip(corpus.sources, available, needed, strict=False) if need and not count
    ]
    if not any(available):
        short = [max(corpus.sources, key=lambda source: source.source.split(split).tokens)]
    if short:
        name, tokens = short[0].name, short[0].source.split(split).tokens
        of_source = "" if len(corpus.sources) == 1 else f" of source {name}"
        remedy = "" if len(corpus.sources) == 1 else f", set data.weights.{name} to 0,"
        more = "prepare more data"
        if split == "validation":
            more = "hold out more text when it is prepared, or set validation.eval_interval to 0 to train without"
        raise UserError(
            f"{short[0].shards.location}: the {split} split{of_source} has {tokens} tokens, one sequence of "
            f"sequence_length {length} needs {length + 1}; shorten data.sequence_length{remedy} or {more}"
        )
