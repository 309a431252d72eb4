"""From positions to batches: what a training step or an evaluation reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kabrn_dist.data.index import SplitName, check_shards, read_index
from kabrn_dist.data.order import Order
from kabrn_dist.data.tokens import TokenStream
from kabrn_dist.errors import UserError


class Batch(NamedTuple):
    """Rows of tokens, all int64 [B, T].

    tokens     what the model reads
    targets    the token that follows each; −100 where there is no loss
    documents  number of document starts in columns 1 to t: starts at 0 and rises within a row
    positions  index within the document, counted from its start or the row's start, whichever is later
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor
    positions: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; from pinned memory the copy runs beside the computation."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class Batches:
    """The sequences of one split. Sequence i is stream[i·L : i·L + L + 1] with L = `sequence_length`.

    With `ordered` global positions go through the shuffled order and never end; without it position i is
    sequence i, once. Attributes: `index`, `sequences` (count), `sequence_length` (tokens), `seed`.

    Raises UserError when the index or a shard is missing or wrong, or the split is shorter than one sequence.
    """

    def __init__(self, folder: Path, split: SplitName, sequence_length: int, seed: int, ordered: bool = True) -> None:
        if sequence_length < 1:
            raise UserError(f"sequence_length: {sequence_length} is not a length; use at least 1.")
        self.index = read_index(folder)
        check_shards(folder, self.index)
        self.sequence_length = sequence_length
        self.seed = seed
        self._stream = TokenStream(folder, self.index, split)
        # The last sequence needs one token more, the target of its last column.
        self.sequences = (len(self._stream) - 1) // sequence_length
        if self.sequences < 1:
            raise UserError(
                f"{folder}: the {split} split has {len(self._stream)} tokens, one sequence of "
                f"sequence_length {sequence_length} needs {sequence_length + 1}. Shorten sequence_length or "
                "prepare more data."
            )
        self._order = Order(self.sequences, seed) if ordered else None

    def rows(self, positions: Sequence[int]) -> Batch:
        """Return the sequences at these global positions, one row each, in the order given.

        Raises UserError when a shard cannot be read, IndexError for a position outside an unordered split.
        """
        numbers = np.asarray(positions, np.int64)
        if self._order is not None:
            numbers = self._order(numbers)
        elif numbers.size and not 0 <= numbers.min() <= numbers.max() < self.sequences:
            raise IndexError(f"positions {numbers.min()} to {numbers.max()} of {self.sequences} sequences")
        length = self.sequence_length
        streams = np.empty((len(numbers), length + 1), np.int64)
        for row, number in enumerate(numbers.tolist()):
            streams[row] = self._stream.read(number * length, number * length + length + 1)
        return make_batch(streams, self.index.document_token)

    def cursor(self, consumed: int) -> Cursor:
        """Return what a checkpoint keeps of the data: all positions below `consumed` are done."""
        return Cursor(consumed, self.seed, self.sequence_length, self.index.fingerprint)

    def close(self) -> None:
        """Close the shard files."""
        self._stream.close()


@dataclass(frozen=True)
class Cursor:
    """Where a run stands in its data: `consumed` sequences over all ranks since its start, and of what."""

    consumed: int
    seed: int
    sequence_length: int
    fingerprint: str

    def check(self, batches: Batches) -> None:
        """Raise UserError when `batches` would not go on with the stream this cursor was taken from."""
        if self.fingerprint != batches.index.fingerprint:
            raise UserError(
                f"the checkpoint was trained on data {self.fingerprint[:12]}, the folder holds "
                f"{batches.index.fingerprint[:12]}. Resume with the old data, or start a new run."
            )
        for key, then, now in (
            ("seed", self.seed, batches.seed),
            ("sequence_length", self.sequence_length, batches.sequence_length),
        ):
            if then != now:
                raise UserError(f"{key}: the checkpoint has {then}, the run {now}. Set it back, or start a new run.")


def make_batch(streams: np.ndarray, document_token: int) -> Batch:
    """Turn rows of consecutive tokens, int64 [B, T + 1], into a Batch.

    No target is masked: a document's last token predicts the next document's start, its "end of document".
    """
    tokens, targets = streams[:, :-1], streams[:, 1:]
    starts = tokens == document_token
    # A row's first token opens document 0 whether or not a document starts there.
    starts[:, 0] = False
    documents = np.cumsum(starts, axis=1, dtype=np.int64)
    columns = np.arange(tokens.shape[1], dtype=np.int64)
    positions = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(part)) for part in (tokens, targets, documents, positions)))


def make_batch_naive(streams: np.ndarray, document_token: int) -> Batch:
    """`make_batch` one token at a time."""
    rows: tuple[list[list[int]], ...] = ([], [], [], [])
    for stream in streams.tolist():
        document, position, documents, positions = 0, 0, [0], [0]
        for token in stream[1:-1]:
            starts = token == document_token
            document, position = document + starts, 0 if starts else position + 1
            documents.append(document)
            positions.append(position)
        for part, row in zip(rows, (stream[:-1], stream[1:], documents, positions), strict=True):
            part.append(row)
    return Batch(*(torch.tensor(part, dtype=torch.int64) for part in rows))


def sequence_slice(batch: Batch, rank: int, degree: int) -> Batch:
    """Return the contiguous columns of sequence rank `rank` out of `degree`, [B, T / degree].

    Documents and positions stay those of the whole row. Raises UserError when `degree` does not divide T.
    """
    length = batch.tokens.shape[1]
    if length % degree:
        raise UserError(
            f"sequence_length: {length} columns do not split evenly over a sequence degree of {degree}. "
            "Use a sequence_length that the degree divides."
        )
    share = length // degree
    return Batch(*(part[:, rank * share : (rank + 1) * share].contiguous() for part in batch))
