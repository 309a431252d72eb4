"""Quick checks of a shard set: a consistent index, and files of the right sizes."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path

from kabrn_dist.data.index import Index, Shard, Source, dtype_for
from kabrn_dist.utils.errors import UserError

# No slash, no leading dot: a name from the index can only be a plain file of the folder itself.
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SOURCE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")

# The largest weight and number of epochs, whose products with numbers of sequences stay exact.
_LIMITS = {"weight": 1e12, "epochs": 1e6}
_MOST = 1 << 50


def loss_mask_bytes(tokens: int) -> int:
    """Return the size in bytes of a loss mask of `tokens` tokens."""
    return (tokens + 7) // 8


def check_shard_files(folder: Path, index: Index) -> None:
    """Check that every shard exists and has the right size (one `stat` each).

    Raises:
        UserError: for the first shard that does not.
    """
    for shard in index.shards():
        path = folder / shard.name
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; copy this shard again, or prepare the data again") from error
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file; copy this shard again, or prepare the data again")
        if status.st_size != shard.bytes:
            raise UserError(
                f"{path}: {status.st_size} bytes, the index says {shard.bytes}; copy this shard again, or prepare the "
                "data again"
            )


def check_consistency(origin: str, index: Index) -> None:
    """Check that an index is consistent.

    Args:
        origin: Name of the index in messages.
        index: Index to check.

    Raises:
        UserError: for the first contradiction.
    """
    problem = next(_contradictions(index), None)
    if problem is not None:
        raise UserError(f"{origin}: {problem}, so the index is damaged; copy it again, or prepare the data again")


def _contradictions(index: Index) -> Iterator[str]:
    dtype = dtype_for(index.vocabulary)
    if index.dtype != dtype:
        yield f"dtype is {index.dtype!r}, a vocabulary of {index.vocabulary} needs {dtype!r}"
    if not 0 <= index.document_token < index.vocabulary:
        yield f"document_token is {index.document_token}, outside the vocabulary of {index.vocabulary}"
    if not index.sources:
        yield "sources is empty"
    for kind, names in (
        ("sources", [source.name for source in index.sources]),
        ("shards", [shard.name for shard in index.shards()]),
    ):
        if len(set(names)) != len(names):
            yield f"two {kind} have the same name"
    for source in index.sources:
        yield from _source_contradictions(index, source)


def _source_contradictions(index: Index, source: Source) -> Iterator[str]:
    if not _SOURCE_NAME.fullmatch(source.name):
        yield f"source name {source.name!r} is not made of a-z, 0-9, _ and -"
    for key, value in (("weight", source.weight), ("epochs", source.epochs)):
        if value is not None and not 0 < value <= _LIMITS[key]:
            yield f"{source.name}.{key} is {value}, not above 0 and at most {_LIMITS[key]:g}"
    for name, split in (("train", source.train), ("validation", source.validation)):
        for shard in split.shards:
            yield from _shard_contradictions(index, source, shard)
        if split.tokens != sum(shard.tokens for shard in split.shards):
            yield f"{source.name}.{name}.tokens is {split.tokens}, its shards do not add up to that"
        if split.documents != sum(shard.documents for shard in split.shards):
            yield f"{source.name}.{name}.documents is {split.documents}, its shards do not add up to that"
        if not 0 <= split.loss_tokens <= split.tokens or (not source.masked and split.loss_tokens != split.tokens):
            yield f"{source.name}.{name}.loss_tokens is {split.loss_tokens} of {split.tokens} tokens"
        for key, count in (("text_bytes", split.text_bytes), ("gzip9_bytes", split.gzip9_bytes or 0)):
            if not 0 <= count <= _MOST:
                yield f"{source.name}.{name}.{key} is {count}, which is no size"


def _shard_contradictions(index: Index, source: Source, shard: Shard) -> Iterator[str]:
    if not _SHARD_NAME.fullmatch(shard.name):
        yield f"shard name {shard.name!r} is not a plain file name that ends in .tar"
    for key, count in (("bytes", shard.bytes), ("tokens", shard.tokens), ("documents", shard.documents)):
        if not 0 <= count <= _MOST:
            yield f"{shard.name}: {key} is {count}, which is no size"
    if not _SHA256.fullmatch(shard.sha256):
        yield f"{shard.name}: sha256 {shard.sha256!r} is not a sha256"
    end = 0
    for number, (offset, tokens, mask) in enumerate(shard.blocks):
        start, end = end, offset + tokens * index.item_bytes
        if offset < start or tokens <= 0 or end > shard.bytes:
            yield (
                f"{shard.name} block {number} lies at bytes {offset} to {end}, which cannot be: the "
                f"block before ends at {start} and the shard has {shard.bytes}"
            )
        # The mask lies between the block before and the tokens.
        if source.masked and not start < mask <= mask + loss_mask_bytes(tokens) <= offset:
            yield f"{shard.name} block {number}: its loss mask at byte {mask} lies outside the block"
        if not source.masked and mask:
            yield f"{shard.name} block {number} has a loss mask, its source has none"
    if sum(tokens for _, tokens, _ in shard.blocks) != shard.tokens:
        yield f"{shard.name}: its blocks do not add up to its {shard.tokens} tokens"
