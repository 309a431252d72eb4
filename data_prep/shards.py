"""Write tokenized documents as shards, and describe them for the index."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kabrn_dist.data.index import Dtype, Shard
from kabrn_dist.utils.atomic_io import atomic_open, sha256_of

BLOCK_TOKENS = 1 << 16


class TokenizedDocument(NamedTuple):
    """The tokens of one document.

    Attributes:
        tokens: ids [tokens], the document token first.
        loss_mask: which of them carry loss as targets, bool [tokens]; None: all.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None = None


def write_tar_shard(path: Path, documents: Iterable[TokenizedDocument], dtype: Dtype, masked: bool) -> Shard:
    """Write documents as one shard. The same documents give the same bytes.

    Args:
        path: the file.
        documents: in stream order; at most one block and one document are in memory.
        dtype: dtype of the ids.
        masked: whether blocks hold a loss mask.

    Returns:
        The shard's entry in the index.

    Raises:
        UserError: the disk refuses.
    """
    little_endian = np.dtype(dtype).newbyteorder("<")
    count = 0
    # Imported here, where it is needed first: it brings torch, a second of each worker's start.
    from webdataset import TarWriter

    # Fixed time and owner: the tar depends only on the documents.
    with atomic_open(path) as file, TarWriter(file, encoder=False, mtime=0, user="kabrn", group="kabrn") as tar:
        for number, block in enumerate(_blocks(documents)):
            lengths = np.array([len(document.tokens) for document in block], "<u4")
            tokens = np.concatenate([document.tokens for document in block]).astype(little_endian)
            key = f"{number:06d}"
            # Two calls, because each sorts its members by name: the order must be len, use, tok.
            tar.write({"__key__": key, "len": lengths.tobytes(), **({"use": _pack_masks(block)} if masked else {})})
            tar.write({"__key__": key, "tok": tokens.tobytes()})
            count += len(block)
    return _describe_shard(path, count, little_endian.itemsize)


def write_shards(
    folder: Path, stem: str, documents: Iterable[np.ndarray], dtype: Dtype, shard_bytes: int
) -> tuple[Shard, ...]:
    """Write documents as the shards `stem-00000.tar`, `stem-00001.tar`, ….

    Args:
        folder: folder for the shards.
        stem: beginning of their names.
        documents: int arrays [tokens] in stream order.
        dtype: dtype of the ids.
        shard_bytes: the document that reaches this number of bytes of tokens ends a shard.

    Returns:
        The shards' entries in the index.

    Raises:
        UserError: the disk refuses.
    """
    itemsize = np.dtype(dtype).itemsize
    parts: list[list[TokenizedDocument]] = [[]]
    part_bytes = 0
    for document in documents:
        if part_bytes >= shard_bytes:
            parts.append([])
            part_bytes = 0
        parts[-1].append(TokenizedDocument(document))
        part_bytes += len(document) * itemsize
    numbered = enumerate(part for part in parts if part)
    return tuple(write_tar_shard(folder / f"{stem}-{n:05d}.tar", part, dtype, masked=False) for n, part in numbered)


def _blocks(documents: Iterable[TokenizedDocument]) -> Iterator[list[TokenizedDocument]]:
    block: list[TokenizedDocument] = []
    tokens = 0
    for document in documents:
        # A document that is larger than a block is a block of its own.
        if block and len(document.tokens) > BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
        block.append(document)
        tokens += len(document.tokens)
        if tokens >= BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _pack_masks(block: Sequence[TokenizedDocument]) -> bytes:
    masks = [np.ones(len(tokens), bool) if mask is None else mask for tokens, mask in block]
    return np.packbits(np.concatenate(masks), bitorder="little").tobytes()


def _describe_shard(path: Path, documents: int, itemsize: int) -> Shard:
    with tarfile.open(path, "r:") as tar:
        members = {member.name: member for member in tar}
    mask_offsets = {
        name.removesuffix(".use"): member.offset_data for name, member in members.items() if name.endswith(".use")
    }
    blocks = tuple(
        (member.offset_data, member.size // itemsize, mask_offsets.get(name.removesuffix(".tok"), 0))
        for name, member in members.items()
        if name.endswith(".tok")
    )
    return Shard(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        tokens=sum(tokens for _, tokens, _ in blocks),
        documents=documents,
        blocks=blocks,
    )
