"""Stage 5: encode the runs in pieces, and join these to shards, each with a record of what the index needs to know."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.pieces import EncodedDocument, ShardPiece, read_piece, write_piece
from data_prep.progress import StageProgress
from data_prep.shards import TokenizedDocument, write_tar_shard
from data_prep.sorted_runs import RunReader, StoredDocument, merge_sorted
from data_prep.split import Stream
from data_prep.streams import ShardTask
from data_prep.tokens import DocumentEncoder
from data_prep.workspace import Workspace
from kabrn_dist.data.index import Shard, dtype_for
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.fault_injection import inject_fault


class ShardRecord(NamedTuple):
    """A finished shard and its part in the totals of its split.

    Attributes:
        shard: entry of the index.
        text_bytes: bytes of text in it.
        loss_tokens: tokens that carry loss.
    """

    shard: Shard
    text_bytes: int
    loss_tokens: int


class ShardBuilder:
    """Encodes pieces and builds shards of them.

    Args:
        workspace: the preparation's folders.
        streams: all streams; a task names one by its number.
        dropped: ids of documents to leave out, uint64, sorted.
        tokenizer: the tokenizer of the mix.
    """

    def __init__(
        self, workspace: Workspace, streams: Sequence[Stream], dropped: np.ndarray, tokenizer: Tokenizer
    ) -> None:
        self._workspace, self._streams, self._dropped = workspace, streams, dropped
        self._encoder = DocumentEncoder(tokenizer)
        self._dtype = dtype_for(tokenizer.vocab_size)
        self._reader = RunReader(workspace.runs)

    def is_finished(self, task: ShardTask) -> bool:
        """Return whether the shard has been built."""
        return shard_record_path(self._workspace, self._streams, task).exists()

    def is_encoded(self, piece: ShardPiece) -> bool:
        """Return whether a piece has been encoded, or its whole shard built."""
        return self._piece_path(piece).exists() or self.is_finished(piece.task)

    def encode(self, piece: ShardPiece, progress: StageProgress) -> None:
        """Write a piece.

        Raises:
            UserError: the disk refuses.
        """

        def encoded() -> Iterator[EncodedDocument]:
            sizes: list[int] = []
            documents = self._documents(piece.task, piece.low, piece.high)
            for document in self._encoder.encode(_record_sizes(documents, sizes)):
                size = sizes.pop(0)
                progress.advance(1, size, size)
                yield EncodedDocument(document, size)

        write_piece(self._piece_path(piece), encoded())
        inject_fault("data.piece")

    def build(self, pieces: Sequence[ShardPiece]) -> None:
        """Write the shard that has these pieces, and its record, unless that has been done.

        Raises:
            UserError: the disk refuses.
        """
        task = pieces[0].task
        if self.is_finished(task):
            return
        stream, dtype = self._streams[task.stream], np.dtype(self._dtype)
        text_bytes = loss_tokens = 0

        def tokenized() -> Iterator[TokenizedDocument]:
            nonlocal text_bytes, loss_tokens
            for piece in pieces:
                for document, size in read_piece(self._piece_path(piece), dtype):
                    text_bytes += size
                    loss_tokens += len(document.tokens) if document.loss_mask is None else int(document.loss_mask.sum())
                    yield document

        path = self._workspace.out / f"{shard_name(stream, task)}.tar"
        shard = write_tar_shard(path, tokenized(), self._dtype, stream.masked)
        inject_fault("data.shard")
        record = {"shard": shard.model_dump(), "text_bytes": text_bytes, "loss_tokens": loss_tokens}
        atomic_write(shard_record_path(self._workspace, self._streams, task), json.dumps(record).encode())
        for piece in pieces:
            self._piece_path(piece).unlink()

    def measure_gzip(self, number: int, tasks: Sequence[ShardTask]) -> None:
        """Write the number of bytes that gzip -9 needs for the validation texts of stream `number`."""
        path = gzip_record_path(self._workspace, self._streams[number])
        if path.exists():
            return
        packer = zlib.compressobj(9, zlib.DEFLATED, wbits=31)
        size = 0
        for task in tasks:
            if task.stream == number and task.split == "validation":
                size += sum(
                    len(packer.compress(document.text)) for document in self._documents(task, task.low, task.high)
                )
        atomic_write(path, json.dumps(size + len(packer.flush())).encode())

    def _documents(self, task: ShardTask, low: int, high: int) -> Iterator[StoredDocument]:
        """Yield the documents of a shard in a range of sort keys."""
        runs = self._streams[task.stream].runs
        for run, row in merge_sorted(self._workspace.runs, runs, low, high, self._dropped):
            yield task.part_of(row, self._reader.read(run, row))

    def _piece_path(self, piece: ShardPiece) -> Path:
        name = shard_name(self._streams[piece.task.stream], piece.task)
        return self._workspace.pieces / f"{name}-{piece.number:03d}"


def shard_name(stream: Stream, task: ShardTask) -> str:
    """Return the name of a shard without its suffix."""
    return f"{stream.name}-{task.split}-{task.number:05d}"


def shard_record_path(workspace: Workspace, streams: Sequence[Stream], task: ShardTask) -> Path:
    """Return the file of a shard's record."""
    return workspace.shards / f"{shard_name(streams[task.stream], task)}.json"


def gzip_record_path(workspace: Workspace, stream: Stream) -> Path:
    """Return the file that holds the size of a stream's validation texts under gzip -9."""
    return workspace.shards / f"{stream.name}.gzip.json"


def read_shard_record(path: Path) -> ShardRecord:
    """Read the record of a finished shard."""
    fields = json.loads(path.read_bytes())
    return ShardRecord(
        Shard.model_validate_json(json.dumps(fields["shard"])), fields["text_bytes"], fields["loss_tokens"]
    )


def _record_sizes(documents: Iterator[StoredDocument], sizes: list[int]) -> Iterator[StoredDocument]:
    # The encoder reads ahead by a batch, so sizes wait in a queue.
    for document in documents:
        sizes.append(len(document.text))
        yield document
