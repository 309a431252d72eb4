"""Stage 6: build the index of the finished shards, and count the duplicates for the report."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.duplicates import make_hash_ranges, read_pairs
from data_prep.encode import gzip_record_path, read_shard_record, shard_record_path
from data_prep.read import ReadRecord, select_runs
from data_prep.recipe import Recipe, SourceRecipe
from data_prep.samples import DuplicateSummary, sample_duplicates
from data_prep.sources.decode import printable_name
from data_prep.split import Stream
from data_prep.streams import ShardTask, read_shard_plan
from data_prep.workspace import Workspace
from kabrn_dist.data.index import Index, Source, Split, SplitName, TokenizerInfo, dtype_for
from kabrn_dist.data.tokenizer import Tokenizer

# Packages that decide the outcome of cleaning besides the recipe.
_PACKAGES = ("ftfy", "py3langid")


def build_index(
    workspace: Workspace, recipe: Recipe, streams: Sequence[Stream], records: Sequence[ReadRecord]
) -> Index:
    """Return the index of all shards, without fingerprint and sizes that `write_index` adds."""
    tokenizer = Tokenizer.load(workspace.tokenizer)
    tasks = read_shard_plan(workspace.shard_plan)
    return Index(
        dtype=dtype_for(tokenizer.vocab_size),
        vocabulary=tokenizer.vocab_size,
        document_token=tokenizer.document_token,
        tokenizer=TokenizerInfo(
            kind=tokenizer.kind, sha256=tokenizer.sha256, chat_template_sha256=tokenizer.chat_template_sha256
        ),
        recipe=_describe_recipe(recipe),
        sources=tuple(
            Source(
                name=stream.name,
                kind=stream.sources[0].kind if len(stream.sources) == 1 else "interleaved",
                options=_source_options(stream),
                weight=sum(source.weight for source in stream.sources),
                epochs=min((source.epochs for source in stream.sources if source.epochs is not None), default=None),
                masked=stream.masked,
                whole=stream.keeps_whole,
                train=_build_split(workspace, streams, number, tasks, "train"),
                validation=_build_split(workspace, streams, number, tasks, "validation"),
            )
            for number, stream in enumerate(streams)
        ),
    )


def summarize_duplicates(workspace: Workspace, recipe: Recipe, records: Sequence[ReadRecord]) -> list[DuplicateSummary]:
    """Return, for each source, how many documents were dropped as duplicates, and samples of them."""
    exact_pairs, near_pairs = (_read_pairs(workspace, recipe, records, stage) for stage in ("exact", "near"))
    exact = exact_pairs[:, 1]
    near = np.setdiff1d(np.load(workspace.dropped), exact)
    task_edges = np.cumsum([0, *(record.tasks for record in records)])
    counts = [np.histogram((ids >> np.uint64(32)).astype(np.int64), task_edges)[0].tolist() for ids in (exact, near)]
    samples = sample_duplicates(workspace.runs, records, exact_pairs, near_pairs)
    return [DuplicateSummary(*each) for each in zip(*counts, samples, strict=True)]


def _read_pairs(workspace: Workspace, recipe: Recipe, records: Sequence[ReadRecord], stage: str) -> np.ndarray:
    """Read all pairs of ids (earlier, later) that a stage found, uint64 [n, 2]."""
    runs, documents = select_runs(recipe, records, stage)
    return read_pairs(workspace.pairs, stage, make_hash_ranges(stage, documents) if runs else [])


def _build_split(
    workspace: Workspace, streams: Sequence[Stream], number: int, tasks: Sequence[ShardTask], name: SplitName
) -> Split:
    records = [
        read_shard_record(shard_record_path(workspace, streams, task))
        for task in tasks
        if task.stream == number and task.split == name
    ]
    shards = tuple(record.shard for record in records)
    gzip9 = (
        json.loads(gzip_record_path(workspace, streams[number]).read_bytes())
        if name == "validation" and shards
        else None
    )
    return Split(
        shards=shards,
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(record.text_bytes for record in records),
        gzip9_bytes=gzip9,
        loss_tokens=sum(record.loss_tokens for record in records),
    )


def _source_options(stream: Stream) -> dict[str, Any]:
    if len(stream.sources) > 1:
        return {"sources": tuple(source.name for source in stream.sources)}
    source = stream.sources[0]
    return {"input": tuple(printable_name(path.name) for path in source.input), **source.options}


def _describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """Describe all that decides the bytes. Folders are left out, so that the same data elsewhere has the same index."""
    return {
        "validation_share": recipe.validation_share,
        "shard_mb": recipe.shard_mb,
        "unicode": unicodedata.unidata_version,
        "packages": {name: version(name) for name in (*_PACKAGES, "tokenizers")},
        "cleaning": {source.name: _describe_cleaning(recipe, source) for source in recipe.sources},
    }


def _describe_cleaning(recipe: Recipe, source: SourceRecipe) -> dict[str, Any]:
    config = recipe.cleaning_config(source).model_dump(mode="json")
    config["contamination"]["paths"] = [printable_name(Path(path).name) for path in config["contamination"]["paths"]]
    return config
