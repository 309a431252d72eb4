"""From positions to batches: what a training step or an evaluation reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from kabrn_dist.utils.errors import UserError


class Batch(NamedTuple):
    """Rows of tokens, int64 [B, T] but for the last.

    tokens     what the model reads
    targets    the token that follows each; −100 where there is no loss
    documents  number of document starts in columns 1 to t: starts at 0 and rises within a row
    positions  index within the document, counted from its start or the row's start, whichever is later
    sources    int64 [B], number of the source that the row is from
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor
    positions: torch.Tensor
    sources: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; from pinned memory the copy runs beside the computation."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class TokenDataset:
    """The sequences of one split of a corpus. Sequence i of a source is its tokens [i·L, i·L + L], L `sequence_length`.

    With `ordered` global positions go through the mixture of the sources and the shuffled order of each, until
    `length`; without it positions go through all sources one after another, once, whatever their weights.

    Attributes:
        corpus: what is read.
        counts: sequences of each source, 0 where it is left out.
        sequences: their sum.
        length: positions there are; None where they never end.
        sequence_length: tokens of a sequence. seed: of the order.

    Raises UserError when the split, or a source that is to be drawn from, is shorter than one sequence.
    """

    def __init__(self, corpus: Corpus, split: SplitName, sequence_length: int, seed: int, ordered: bool = True) -> None:
        if sequence_length < 1:
            raise UserError(f"sequence_length: {sequence_length} is not a length; use at least 1.")
        self.corpus, self.sequence_length, self.seed = corpus, sequence_length, seed
        self._streams = [TokenStream(drawn.shards, drawn.source, split) for drawn in corpus.sources]
        # The last sequence needs one token more, the target of its last column.
        there = [max(0, len(stream) - 1) // sequence_length for stream in self._streams]
        drawn_from = [drawn.weight > 0 or not ordered for drawn in corpus.sources]
        _check_lengths(corpus, split, sequence_length, there, drawn_from if ordered else [])
        self.sequences_per_source = [count if used else 0 for count, used in zip(there, drawn_from, strict=True)]
        self.num_sequences = sum(self.sequences_per_source)
        self._first_positions = np.cumsum([0, *self.sequences_per_source])
        self._sampler = MixtureSampler(corpus.sources, self.sequences_per_source, seed) if ordered else None
        self.num_positions = self.num_sequences if self._sampler is None else self._sampler.num_positions
        # Half of the cache for what comes leaves the other half for what is being read.
        self._prefetcher = (
            Prefetcher(self._upcoming_shards, corpus.cache_bytes / 2) if ordered and corpus.is_remote else None
        )

    def get(self, positions: Sequence[int]) -> Batch:
        """Return the sequences at these global positions, one row each, in the order given.

        Raises UserError when a shard cannot be read or an ordered split has come to its end, IndexError for a position
        that an unordered one does not have.
        """
        numbers = np.asarray(positions, np.int64)
        if self._sampler is not None and numbers.size:
            self.check_length(int(numbers.max()) + 1)
        if self._prefetcher is not None and numbers.size:
            self._prefetcher.advance(int(numbers.max()))
        sources, sequences = self._lookup(numbers)
        length = self.sequence_length
        streams = np.empty((len(numbers), length + 1), np.int64)
        masked = [drawn.source.masked for drawn in self.corpus.sources]
        used = np.ones((len(numbers), length), bool) if any(masked) else None
        for row, (source, number) in enumerate(zip(sources.tolist(), sequences.tolist(), strict=True)):
            stream, start = self._streams[source], number * length
            streams[row] = stream.read(start, start + length + 1)
            if used is not None and masked[source]:
                used[row] = stream.read_mask(start + 1, start + length + 1)
        return make_batch(streams, self.corpus.document_token, used, sources)

    def validation_positions(self, count: int) -> list[int]:
        """Choose `count` positions of an unordered split: as many of each source as of the others, its first ones.

        A source that has fewer gives all of its own; fewer than `count` come where there are no more.
        """
        wanted = [0] * len(self.sequences_per_source)
        left = min(count, self.num_sequences)
        while left:
            for source in (s for s, n in enumerate(self.sequences_per_source) if wanted[s] < n):
                if left:
                    wanted[source], left = wanted[source] + 1, left - 1
        firsts = self._first_positions[:-1].tolist()
        return [first + n for first, number in zip(firsts, wanted, strict=True) for n in range(number)]

    def sequences_drawn(self, consumed: int) -> list[int]:
        """Return how many sequences of each source lie below a global position of an ordered split."""
        assert self._sampler is not None, "only an ordered split is drawn from"
        return self._sampler.sequences_drawn(consumed)

    def check_length(self, sequences: int) -> None:
        """Raise UserError when the data ends before so many sequences have been drawn."""
        if self.num_positions is not None and sequences > self.num_positions:
            ends = ", ".join(f"{d.name} {d.epochs:g}" for d in self.corpus.sources if d.weight and d.epochs)
            raise UserError(
                f"training.steps × training.global_batch_size needs {sequences:,} sequences, the data has {self.num_positions:,} (epochs: "
                f"{ends}). Lower training.steps, or raise or leave out data.epochs for one of them."
            )

    def state(self, consumed: int) -> DataState:
        """Return what a checkpoint keeps of the data: all positions below `consumed` are done."""
        assert self._sampler is not None, "only an ordered split is gone on with"
        drawn = describe_sources(self.corpus, self._sampler.slots_per_period)
        fingerprint = data_fingerprint(self.corpus, drawn)
        return DataState(consumed, self.seed, self.sequence_length, fingerprint, drawn)

    def close(self) -> None:
        """Close the shard files, and fetch no more ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        for stream in self._streams:
            stream.close()

    def _lookup(self, positions: np.ndarray) -> np.ndarray:
        """Sources and sequence numbers of positions, int64 [2, N]."""
        if self._sampler is not None:
            return self._sampler.lookup_cached(positions)
        if positions.size and not 0 <= positions.min() <= positions.max() < self.num_sequences:
            raise IndexError(f"positions {positions.min()} to {positions.max()} of {self.num_sequences} sequences")
        sources = np.searchsorted(self._first_positions, positions, "right") - 1
        return np.stack([sources, positions - self._first_positions[sources]])

    def _upcoming_shards(self, position: int, count: int) -> Iterator[tuple[ShardSet, Shard]]:
        stop = position + count if self.num_positions is None else min(self.num_positions, position + count)
        assert self._sampler is not None
        sources, sequences = self._sampler.lookup(np.arange(position, stop))
        starts = sequences * self.sequence_length
        shards: list[list[Shard]] = [[] for _ in starts]
        for source in np.unique(sources).tolist():
            here = np.flatnonzero(sources == source)
            found = self._streams[source].list_shards(starts[here], starts[here] + self.sequence_length + 1)
            for place, each in zip(here.tolist(), found, strict=True):
                shards[place] = each
        for source, each in zip(sources.tolist(), shards, strict=True):
            yield from ((self.corpus.sources[source].shards, shard) for shard in each)


def make_batch(
    streams: np.ndarray, document_token: int, loss_mask: np.ndarray | None = None, sources: np.ndarray | None = None
) -> Batch:
    """Turn rows of consecutive tokens, int64 [B, T + 1], into a Batch.

    A document's last token predicts the next document's start, its "end of document". `used`, bool [B, T], says which
    targets count (None: all), `sources` [B] where rows are from (None: source 0).
    """
    tokens, targets = streams[:, :-1], streams[:, 1:]
    if loss_mask is not None:
        targets = np.where(loss_mask, targets, -100)
    starts = tokens == document_token
    # A row's first token opens document 0 whether or not a document starts there.
    starts[:, 0] = True
    # Documents are few against tokens: runs of equal values are faster than running sums.
    first = np.flatnonzero(starts)
    lengths = np.diff(first, append=starts.size)
    row = first // max(1, tokens.shape[1])
    opening = np.flatnonzero(np.diff(row, prepend=-1))
    documents = np.repeat(np.arange(len(first)) - opening[row], lengths).reshape(tokens.shape)
    positions = (np.arange(starts.size) - np.repeat(first, lengths)).reshape(tokens.shape)
    origins = np.zeros(len(streams), np.int64) if sources is None else sources
    parts = (tokens, targets, documents, positions, origins)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


def make_batch_naive(
    streams: np.ndarray, document_token: int, loss_mask: np.ndarray | None = None, sources: np.ndarray | None = None
) -> Batch:
    """`make_batch` one token at a time."""
    rows: tuple[list[list[int]], ...] = ([], [], [], [])
    for number, stream in enumerate(streams.tolist()):
        document, position, documents, positions = 0, 0, [0], [0]
        for token in stream[1:-1]:
            starts = token == document_token
            document, position = document + starts, 0 if starts else position + 1
            documents.append(document)
            positions.append(position)
        targets = [t if loss_mask is None or loss_mask[number][column] else -100 for column, t in enumerate(stream[1:])]
        for part, row in zip(rows, (stream[:-1], targets, documents, positions), strict=True):
            part.append(row)
    origins = [0] * len(streams) if sources is None else sources.tolist()
    return Batch(*(torch.tensor(part, dtype=torch.int64) for part in (*rows, origins)))


def sequence_slice(batch: Batch, rank: int, world_size: int) -> Batch:
    """Return the contiguous columns of sequence rank `rank` out of `degree`, [B, T / degree].

    Documents and positions stay those of the whole row. Raises UserError when `degree` does not divide T.
    """
    length = batch.tokens.shape[1]
    if length % world_size:
        raise UserError(
            f"sequence_length: {length} columns do not split evenly over a sequence degree of {world_size}. "
            "Use a sequence_length that the degree divides."
        )
    share = length // world_size
    columns = [part[:, rank * share : (rank + 1) * share].contiguous() for part in batch[:-1]]
    return Batch(*(*columns, batch.sources))


def _check_lengths(corpus: Corpus, split: SplitName, length: int, there: list[int], needed: list[bool]) -> None:
    """Refuse a source without a sequence where it is needed, and a split without any."""
    short = [drawn for drawn, count, need in zip(corpus.sources, there, needed, strict=False) if need and not count]
    if not any(there):
        short = [max(corpus.sources, key=lambda drawn: drawn.source.split(split).tokens)]
    if short:
        name, tokens = short[0].name, short[0].source.split(split).tokens
        alone = "" if len(corpus.sources) == 1 else f" of source {name}"
        other = "" if len(corpus.sources) == 1 else f", set data.weights.{name} to 0,"
        raise UserError(
            f"{short[0].shards.location}: the {split} split{alone} has {tokens} tokens, one sequence of "
            f"sequence_length {length} needs {length + 1}. Shorten sequence_length{other} or prepare more data."
        )
