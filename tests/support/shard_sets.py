"""Small shard sets of random documents, written by the real shard writer, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.shards import TokenizedDocument, write_tar_shard
from kabrn_dist.data.index import Index, Shard, Source, Split, SplitName, TokenizerInfo, dtype_for
from kabrn_dist.data.index_io import write_index
from kabrn_dist.data.tokenizer import Tokenizer

DOCUMENT = 256


class Texts(NamedTuple):
    """Random documents of one source: `train` and `validation` of them, each of `sizes` tokens.

    Of a masked one, the first token of a document and `targets` of the others carry loss.
    """

    name: str
    train: int = 30
    validation: int = 5
    sizes: tuple[int, int] = (1, 900)
    masked: bool = False
    targets: float = 0.3
    weight: float = 1.0
    epochs: float | None = None
    per_shard: int = 10


def make_set(folder: Path, *texts: Texts, vocabulary: int = 257, seed: int = 0) -> Index:
    """Write a shard set of bytes as tokens; a larger `vocabulary` has ids that stand for nothing."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.of_bytes()
    tokenizer.save(folder / "tokenizer.json")
    random = np.random.default_rng(seed)
    index = Index(
        dtype=dtype_for(vocabulary),
        vocabulary=vocabulary,
        document_token=DOCUMENT,
        tokenizer=TokenizerInfo(kind="bytes", sha256=tokenizer.sha256),
        recipe={"seed": seed},
        sources=tuple(
            Source(
                name=each.name,
                kind="random",
                options={},
                weight=each.weight,
                epochs=each.epochs,
                masked=each.masked,
                train=_split(folder, each, "train", vocabulary, random),
                validation=_split(folder, each, "validation", vocabulary, random),
            )
            for each in texts
        ),
    )
    return write_index(folder, index)


def _split(folder: Path, texts: Texts, split: SplitName, vocabulary: int, random: np.random.Generator) -> Split:
    documents = list(_documents(texts, getattr(texts, split), vocabulary, random))
    parts = [documents[at : at + texts.per_shard] for at in range(0, len(documents), texts.per_shard)]
    shards: list[Shard] = []
    for number, part in enumerate(parts):
        path = folder / f"{texts.name}-{split}-{number:05d}.tar"
        shards.append(write_tar_shard(path, part, dtype_for(vocabulary), texts.masked))
    return Split(
        shards=tuple(shards),
        documents=len(documents),
        tokens=sum(len(each.tokens) for each in documents),
        text_bytes=sum(len(each.tokens) - 1 for each in documents),
        loss_tokens=sum(
            len(each.tokens) if each.loss_mask is None else int(each.loss_mask.sum()) for each in documents
        ),
    )


def _documents(texts: Texts, count: int, vocabulary: int, random: np.random.Generator) -> Iterator[TokenizedDocument]:
    # Each source has letters of its own, so that a row shows where it is from and a model has something to learn.
    letters = random.choice(DOCUMENT if vocabulary == 257 else vocabulary, 20, replace=False)
    letters[letters == DOCUMENT] = 0
    for _ in range(count):
        tokens = random.choice(letters, random.integers(*texts.sizes))
        tokens[0] = DOCUMENT
        use = None
        if texts.masked:
            use = random.random(len(tokens)) < texts.targets
            use[0] = True
        yield TokenizedDocument(tokens, use)
