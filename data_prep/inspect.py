"""Verify a finished folder of shards and show its contents, source by source."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.progress import ProgressMeter
from kabrn_dist.data.index import Source, Split
from kabrn_dist.data.shard_set import FolderSet, open_shard_folder
from kabrn_dist.data.token_stream import TokenStream
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.data.verify import verify_shards
from kabrn_dist.utils.terminal import escape_controls

# Samples are shown up to this length.
_SHOWN_TOKENS = 120


def inspect_shards(folder: Path, documents: int) -> None:
    """Verify every shard and print totals and samples.

    Args:
        folder: a folder that data_prep wrote.
        documents: number of training documents of each source whose beginnings are printed.

    Raises:
        UserError: something is missing or damaged.
    """
    shards = open_shard_folder(folder)
    index, tokenizer = shards.index, shards.tokenizer()
    with ProgressMeter("verify", sum(shard.bytes for shard in index.shards())) as meter:
        verify_shards(folder, index, lambda read: meter.advance(0, read))
    print(f"{index.tokenizer.kind} tokenizer, vocabulary {index.vocabulary:,}, {index.dtype}")
    for source in index.sources:
        print(f"\n{_headline(source)}\n{_totals(source.train, source.validation)}")
        for number, text in enumerate(sample_documents(shards, source, tokenizer, documents)):
            print(f"--- train document {number} of {source.name}\n{escape_controls(text).rstrip()}")
    if len(index.sources) > 1:
        print(f"\nall sources: {index.tokens('train'):,} + {index.tokens('validation'):,} tokens")
    print(f"all shards verified, fingerprint {index.fingerprint}")


def sample_documents(shards: FolderSet, source: Source, tokenizer: Tokenizer, count: int) -> list[str]:
    """Return the decoded beginnings of the first `count` training documents of a source."""
    stream = TokenStream([(shards, source)], "train")
    texts: list[str] = []
    position, document_token = 0, shards.index.document_token
    while len(texts) < count and position < len(stream):
        ids = stream.read(position + 1, min(position + 1 + _SHOWN_TOKENS, len(stream)))
        ends = np.flatnonzero(ids == document_token)
        texts.append(tokenizer.decode((ids[: ends[0]] if len(ends) else ids).tolist()))
        position = _next_document(stream, position + 1, document_token)
    stream.close()
    return texts


def _next_document(stream: TokenStream, position: int, document_token: int) -> int:
    while position < len(stream):
        stop = min(position + (1 << 16), len(stream))
        found = np.flatnonzero(stream.read(position, stop) == document_token)
        if len(found):
            return position + int(found[0])
        position = stop
    return position


def _headline(source: Source) -> str:
    epochs = "" if source.epochs is None else f", {source.epochs:g} epochs"
    masked = ", loss on part of each document" if source.masked else ""
    return f"source {source.name} ({source.kind}), weight {source.weight:g}{epochs}{masked}"


def _totals(*splits: Split) -> str:
    rows: list[tuple[str, ...]] = [("", "train", "validation")]
    rows += [
        ("shards", *(f"{len(split.shards):,}" for split in splits)),
        ("documents", *(f"{split.documents:,}" for split in splits)),
        ("tokens", *(f"{split.tokens:,}" for split in splits)),
        ("tokens with loss", *(f"{split.loss_tokens:,}" for split in splits)),
        ("text bytes", *(f"{split.text_bytes:,}" for split in splits)),
        ("bytes per token", *(f"{split.text_bytes / max(split.tokens, 1):.3f}" for split in splits)),
        ("gzip -9 bits per byte", *(_gzip9_bits_per_byte(split) for split in splits)),
    ]
    return "\n".join(f"{name:<20}{train:>16}{validation:>16}" for name, train, validation in rows)


def _gzip9_bits_per_byte(split: Split) -> str:
    return f"{8 * split.gzip9_bytes / split.text_bytes:.4f}" if split.gzip9_bytes and split.text_bytes else "–"
