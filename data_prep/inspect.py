"""Checks a finished shard folder and shows what is in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.progress import Meter
from kabrn_dist.data.index import Index, Split, read_index
from kabrn_dist.data.tokenizer import Tokenizer, load_tokenizer
from kabrn_dist.data.tokens import TokenStream
from kabrn_dist.data.verify import verify_shards

# A sample document is shown up to here.
_SHOWN_TOKENS = 120


def inspect(folder: Path, documents: int) -> None:
    """Verify every shard, print the totals and the beginnings of `documents` training documents.

    Raises UserError for whatever is missing or wrong.
    """
    index = read_index(folder)
    tokenizer = load_tokenizer(folder, index)
    total = sum(shard.bytes for shard in (*index.train.shards, *index.validation.shards))
    with Meter("verify", total) as meter:
        verify_shards(folder, index, lambda read: meter.advance(0, read))
    print(f"{index.source.name}, {index.tokenizer.kind} tokenizer, vocabulary {index.vocabulary:,}, {index.dtype}")
    print(_totals(index))
    for number, text in enumerate(sample_documents(folder, index, tokenizer, documents)):
        print(f"--- train document {number}\n{text.rstrip()}")
    print(f"all shards verified, fingerprint {index.fingerprint}")


def sample_documents(folder: Path, index: Index, tokenizer: Tokenizer, count: int) -> list[str]:
    """Return the beginnings of the first `count` training documents, decoded."""
    stream = TokenStream(folder, index, "train")
    texts: list[str] = []
    at = 0
    while len(texts) < count and at < len(stream):
        ids = stream.read(at + 1, min(at + 1 + _SHOWN_TOKENS, len(stream)))
        ends = np.flatnonzero(ids == index.document_token)
        texts.append(tokenizer.decode((ids[: ends[0]] if len(ends) else ids).tolist()))
        at = _next_document(stream, at + 1, index.document_token)
    stream.close()
    return texts


def _next_document(stream: TokenStream, at: int, document_token: int) -> int:
    while at < len(stream):
        stop = min(at + (1 << 16), len(stream))
        found = np.flatnonzero(stream.read(at, stop) == document_token)
        if len(found):
            return at + int(found[0])
        at = stop
    return at


def _totals(index: Index) -> str:
    rows: list[tuple[str, ...]] = [("", "train", "validation")]
    splits = (index.train, index.validation)
    rows += [
        ("shards", *(f"{len(split.shards):,}" for split in splits)),
        ("documents", *(f"{split.documents:,}" for split in splits)),
        ("tokens", *(f"{split.tokens:,}" for split in splits)),
        ("text bytes", *(f"{split.text_bytes:,}" for split in splits)),
        ("bytes a token", *(f"{split.text_bytes / max(split.tokens, 1):.3f}" for split in splits)),
        ("gzip -9 bits a byte", *(_gzip9_bits_per_byte(split) for split in splits)),
    ]
    return "\n".join(f"{name:<20}{train:>16}{validation:>16}" for name, train, validation in rows)


def _gzip9_bits_per_byte(split: Split) -> str:
    return f"{8 * split.gzip9_bytes / split.text_bytes:.4f}" if split.gzip9_bytes and split.text_bytes else "–"
