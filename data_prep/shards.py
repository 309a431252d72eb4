"""Writes tokenised documents as shards and describes them for the index."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import webdataset

from kabrn_dist.data.files import sha256_of, whole_file
from kabrn_dist.data.index import Dtype, Shard, SplitName

BLOCK_TOKENS = 1 << 16


def write_shards(
    folder: Path, split: SplitName, documents: Iterable[np.ndarray], dtype: Dtype, shard_bytes: int
) -> tuple[Shard, ...]:
    """Write `documents`, int arrays [tokens] in stream order, as `split-00000.tar` and so on.

    A shard is closed by the block that takes it to `shard_bytes` of tokens. The same documents give the same
    bytes. Raises UserError when the disk refuses.
    """
    itemsize = np.dtype(dtype).itemsize
    shards: list[Shard] = []
    blocks: list[list[np.ndarray]] = []
    waiting = 0
    for block in _blocks(documents):
        blocks.append(block)
        waiting += sum(map(len, block)) * itemsize
        if waiting >= shard_bytes:
            shards.append(_write_shard(folder / f"{split}-{len(shards):05d}.tar", blocks, dtype))
            blocks, waiting = [], 0
    if blocks:
        shards.append(_write_shard(folder / f"{split}-{len(shards):05d}.tar", blocks, dtype))
    return tuple(shards)


def _blocks(documents: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    block: list[np.ndarray] = []
    tokens = 0
    for document in documents:
        block.append(document)
        tokens += len(document)
        if tokens >= BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _write_shard(path: Path, blocks: Sequence[list[np.ndarray]], dtype: Dtype) -> Shard:
    little_endian = np.dtype(dtype).newbyteorder("<")
    # Fixed time and owner: what is in the tar depends on the documents alone.
    with (
        whole_file(path) as file,
        webdataset.TarWriter(file, encoder=False, mtime=0, user="kabrn", group="kabrn") as tar,
    ):
        for number, block in enumerate(blocks):
            lengths = np.array([len(document) for document in block], "<u4")
            tokens = np.concatenate(block).astype(little_endian)
            tar.write({"__key__": f"{number:06d}", "len": lengths.tobytes(), "tok": tokens.tobytes()})
    return _describe(path, sum(map(len, blocks)), little_endian.itemsize)


def _describe(path: Path, documents: int, itemsize: int) -> Shard:
    with tarfile.open(path, "r:") as tar:
        blocks = tuple((member.offset_data, member.size // itemsize) for member in tar if member.name.endswith(".tok"))
    return Shard(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        tokens=sum(tokens for _, tokens in blocks),
        documents=documents,
        blocks=blocks,
    )
