"""The pipeline: documents → without duplicates, shuffled, split → tokens → shards → index."""

from __future__ import annotations

import hashlib
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.progress import Meter
from data_prep.shards import write_shards
from data_prep.sources import Document
from data_prep.train_tokenizer import check_vocabulary, train_tokenizer
from kabrn_dist.data.index import (
    INDEX_NAME,
    TOKENIZER_NAME,
    Index,
    Source,
    Split,
    SplitName,
    TokenizerInfo,
    dtype_for,
    write_index,
)
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.errors import UserError

# Characters handed to the tokenizer at once: enough to keep all processors busy.
_ENCODE_CHARACTERS = 4 << 20
_OWN_FILES = ("train-*.tar", "validation-*.tar", "*.tar.tmp", f"{TOKENIZER_NAME}*", f"{INDEX_NAME}.tmp")


@dataclass(frozen=True)
class Corpus:
    """Distinct texts in the order of their hashes, cut in two; and what was left out (counts, names)."""

    train: list[str]
    validation: list[str]
    duplicates: int
    empty: int
    not_utf8: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What to make. `tokenizer` None: train one of `vocabulary` ids. `shard_bytes`: size of a shard."""

    out: Path
    source: Source
    tokenizer: Tokenizer | None
    vocabulary: int
    validation_share: float
    shard_bytes: int
    force: bool


def check_plan(plan: Plan) -> None:
    """Raise UserError for anything wrong that shows before a document is read."""
    if plan.tokenizer is None:
        check_vocabulary(plan.vocabulary)
    if not 0 <= plan.validation_share < 1:
        raise UserError(f"--validation-share {plan.validation_share}: must be at least 0 and below 1.")
    if plan.shard_bytes < 1:
        raise UserError(f"--shard-mb {plan.shard_bytes / 1e6:g}: must be above 0.")
    if plan.out.exists() and not plan.out.is_dir():
        raise UserError(f"--out {plan.out}: is a file. Give a folder.")
    if plan.out.is_dir() and any(plan.out.iterdir()) and not plan.force:
        raise UserError(f"--out {plan.out}: is not empty. Choose another folder, or add --force to replace its data.")


def collect(documents: Iterable[Document], validation_share: float) -> Corpus:
    """Read all documents, drop duplicates and empty ones, shuffle and split.

    Sorting by sha256 does both: neighbours in the source part, and the texts with the smallest hashes are the
    validation split (at least one, if there is a share), whatever else the corpus holds. Raises UserError
    when nothing is left to train on.
    """
    texts: dict[bytes, str] = {}
    duplicates = empty = 0
    not_utf8: list[str] = []
    with Meter("read", None) as meter:
        for document in documents:
            content = _utf8(document.text)
            meter.advance(1, len(content or b""))
            digest = hashlib.sha256(content or b"").digest()
            if document.text is None or content is None:
                not_utf8.append(document.name)
            elif not content:
                empty += 1
            elif digest in texts:
                duplicates += 1
            else:
                texts[digest] = document.text
    digests = sorted(texts)
    limit = int(validation_share * 2**64).to_bytes(8, "big")
    cut = max(bisect_left(digests, limit), 1 if validation_share else 0)
    if len(digests) <= cut:
        raise UserError(
            f"corpus: {len(digests)} distinct documents ({duplicates} duplicates, {empty} empty, "
            f"{len(not_utf8)} not UTF-8) leave none to train on with a validation share of "
            f"{validation_share}. Give more documents."
        )
    train, validation = ([texts[digest] for digest in part] for part in (digests[cut:], digests[:cut]))
    return Corpus(train, validation, duplicates, empty, tuple(not_utf8))


def prepare(plan: Plan, corpus: Corpus) -> Index:
    """Tokenise and write `plan.out`; the index comes last, so a folder that has one is complete.

    Raises UserError when the disk refuses; the folder then has no index and counts as unfinished.
    """
    tokenizer = plan.tokenizer
    if tokenizer is None:
        print(f"training a tokenizer of {plan.vocabulary:,} ids …", flush=True)
        tokenizer = train_tokenizer(corpus.train, plan.vocabulary)
        if tokenizer.vocabulary < plan.vocabulary:
            print(f"the texts give no more than {tokenizer.vocabulary:,} ids")
    _clear(plan.out)
    tokenizer.save(plan.out / TOKENIZER_NAME)
    index = Index(
        dtype=dtype_for(tokenizer.vocabulary),
        vocabulary=tokenizer.vocabulary,
        document_token=tokenizer.document_token,
        tokenizer=TokenizerInfo(kind=tokenizer.kind, sha256=tokenizer.sha256),
        source=plan.source,
        validation=_write_split(plan, "validation", corpus.validation, tokenizer),
        train=_write_split(plan, "train", corpus.train, tokenizer),
    )
    return write_index(plan.out, index)


def _utf8(text: str | None) -> bytes | None:
    # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
    try:
        return None if text is None else text.encode()
    except UnicodeEncodeError:
        return None


def _clear(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        # The index first: from here on the old data does not look whole.
        (out / INDEX_NAME).unlink(missing_ok=True)
        for pattern in _OWN_FILES:
            for path in out.glob(pattern):
                path.unlink()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}. Choose a folder you can write to.") from error


def _write_split(plan: Plan, name: SplitName, texts: Sequence[str], tokenizer: Tokenizer) -> Split:
    text_bytes = sum(len(text.encode()) for text in texts)
    with Meter(f"tokenise {name}", text_bytes) as meter:
        documents = _encode(texts, tokenizer, meter)
        shards = write_shards(plan.out, name, documents, dtype_for(tokenizer.vocabulary), plan.shard_bytes)
    return Split(
        shards=shards,
        documents=len(texts),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=text_bytes,
        gzip9_bytes=_gzip9_bytes(texts) if name == "validation" else None,
    )


def _encode(texts: Sequence[str], tokenizer: Tokenizer, meter: Meter) -> Iterator[np.ndarray]:
    for batch in _batched(texts):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            meter.advance(1, len(text.encode()))
            yield np.array([tokenizer.document_token, *ids], dtype_for(tokenizer.vocabulary))


def _batched(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _ENCODE_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _gzip9_bytes(texts: Sequence[str]) -> int:
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits=31)
    return sum(len(packer.compress(text.encode())) for text in texts) + len(packer.flush())
