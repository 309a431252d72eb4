"""Stage 6: what was made, as the index; and how many documents were duplicates."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.duplicates import ranges_of, read_pairs
from data_prep.encode import gzip_of, read_made, shard_record
from data_prep.read import ReadRecord, runs_of
from data_prep.recipe import Recipe, SourceRecipe
from data_prep.samples import Duplicates, sample_duplicates
from data_prep.streams import ShardTask, Stream, read_cut
from data_prep.workspace import Work
from kabrn_dist.data.index import Index, Source, Split, SplitName, TokenizerInfo, dtype_for
from kabrn_dist.data.tokenizer import Tokenizer

# What decides about the outcome of cleaning besides the recipe.
_PACKAGES = ("ftfy", "py3langid")


def make_index(work: Work, recipe: Recipe, streams: Sequence[Stream], records: Sequence[ReadRecord]) -> Index:
    """The index of all shards, not yet sealed."""
    tokenizer = Tokenizer.load(work.tokenizer)
    tasks = read_cut(work.cut)
    return Index(
        dtype=dtype_for(tokenizer.vocab_size),
        vocabulary=tokenizer.vocab_size,
        document_token=tokenizer.document_token,
        tokenizer=TokenizerInfo(kind=tokenizer.kind, sha256=tokenizer.sha256),
        recipe=_describe(recipe),
        sources=tuple(
            Source(
                name=stream.name,
                kind=stream.sources[0].kind if len(stream.sources) == 1 else "interleaved",
                options=_options(stream),
                weight=sum(source.weight for source in stream.sources),
                epochs=min((source.epochs for source in stream.sources if source.epochs is not None), default=None),
                masked=stream.masked,
                train=_split(work, streams, number, tasks, "train"),
                validation=_split(work, streams, number, tasks, "validation"),
            )
            for number, stream in enumerate(streams)
        ),
    )


def describe_dropped(work: Work, recipe: Recipe, records: Sequence[ReadRecord]) -> list[Duplicates]:
    """What was dropped of each source because another document has the same text, or nearly the same."""
    same, alike = (_pairs(work, recipe, records, stage) for stage in ("exact", "near"))
    exact = same[:, 1]
    near = np.setdiff1d(np.load(work.dropped), exact)
    first = np.cumsum([0, *(record.items for record in records)])
    counts = [np.histogram((ids >> np.uint64(32)).astype(np.int64), first)[0].tolist() for ids in (exact, near)]
    samples = sample_duplicates(work.runs, records, same, alike)
    return [Duplicates(*each) for each in zip(*counts, samples, strict=True)]


def _pairs(work: Work, recipe: Recipe, records: Sequence[ReadRecord], stage: str) -> np.ndarray:
    """All pairs (earlier, later) of ids that a stage has found, uint64 [n, 2]."""
    runs, documents = runs_of(recipe, records, stage)
    return read_pairs(work.pairs, stage, ranges_of(stage, documents) if runs else [])


def _split(work: Work, streams: Sequence[Stream], number: int, tasks: Sequence[ShardTask], name: SplitName) -> Split:
    made = [
        read_made(shard_record(work, streams, task)) for task in tasks if task.stream == number and task.split == name
    ]
    shards = tuple(each.shard for each in made)
    gzip9 = json.loads(gzip_of(work, streams[number]).read_bytes()) if name == "validation" and shards else None
    return Split(
        shards=shards,
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(each.text_bytes for each in made),
        gzip9_bytes=gzip9,
        loss_tokens=sum(each.loss_tokens for each in made),
    )


def _options(stream: Stream) -> dict[str, Any]:
    if len(stream.sources) > 1:
        return {"sources": tuple(source.name for source in stream.sources)}
    source = stream.sources[0]
    return {"input": tuple(path.name for path in source.input), **source.options}


def _describe(recipe: Recipe) -> dict[str, Any]:
    """All that decides about the bytes; names of files without their folders, so that the same data elsewhere agree."""
    return {
        "validation_share": recipe.validation_share,
        "shard_mb": recipe.shard_mb,
        "unicode": unicodedata.unidata_version,
        "packages": {name: version(name) for name in (*_PACKAGES, "tokenizers")},
        "cleaning": {source.name: _cleaning(recipe, source) for source in recipe.sources},
    }


def _cleaning(recipe: Recipe, source: SourceRecipe) -> dict[str, Any]:
    settings = recipe.cleaning(source).model_dump(mode="json")
    settings["contamination"]["paths"] = [Path(path).name for path in settings["contamination"]["paths"]]
    return settings
