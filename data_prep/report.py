"""Report of a preparation: report.json, report.html, and a summary for the console."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.learned_samples import LearnedPiece
from data_prep.read import ReadRecord
from data_prep.recipe import Recipe
from data_prep.report_page import render_page
from data_prep.samples import DuplicateSummary
from kabrn_dist.data.index import Index
from kabrn_dist.data.index_io import index_fingerprint
from kabrn_dist.utils.atomic_io import atomic_write


def write_report(
    recipe: Recipe,
    records: Sequence[ReadRecord],
    duplicates: Sequence[DuplicateSummary],
    index: Index,
    licenses: Mapping[str, str],
    seconds: float,
    learned: Mapping[str, list[list[LearnedPiece]]],
) -> None:
    """Write report.json and report.html into `recipe.out`.

    Args:
        recipe: the recipe.
        records: one record per source.
        duplicates: dropped duplicates of each source.
        index: index of the shards.
        licenses: license of each source, by its name.
        seconds: duration of this run.
        learned: sample documents of each stream with loss masks, by its name.

    Raises:
        UserError: the disk refuses.
    """
    sources = [
        _source(recipe, number, record, duplicates[number]) | {"license": licenses[recipe.sources[number].name]}
        for number, record in enumerate(records)
    ]
    bytes_read = sum(record.bytes for record in records)
    report: dict[str, Any] = {
        "fingerprint": index_fingerprint(index),
        "seconds": round(seconds, 2),
        "mb_per_second": round(bytes_read / 1e6 / max(seconds, 1e-3), 2),
        "documents": {
            "read": sum(record.documents for record in records),
            "train": index.documents("train"),
            "validation": index.documents("validation"),
        },
        "vocabulary": index.vocabulary,
        "sources": sources,
        "streams": [_stream(index, number) for number in range(len(index.sources))],
        "learned_samples": learned,
    }
    atomic_write(recipe.out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    atomic_write(recipe.out / "report.html", render_page(report).encode("utf-8", "replace"))


def _source(recipe: Recipe, number: int, record: ReadRecord, duplicates: DuplicateSummary) -> dict[str, Any]:
    source = recipe.sources[number]
    return {
        "name": source.name,
        "kind": source.kind,
        "weight": source.weight,
        "epochs": source.epochs,
        "documents": record.documents,
        "bytes": record.bytes,
        "clean_documents": record.clean_documents,
        "clean_bytes": record.clean_bytes,
        "removed": dict(sorted(record.removed.items())),
        "removed_bytes": dict(sorted(record.removed_bytes.items())),
        "malformed": record.malformed,
        "malformed_names": record.malformed_names,
        "removed_samples": record.samples | duplicates.samples,
        "unreadable": record.unreadable,
        "unreadable_names": record.unreadable_names,
        "lost_bytes": record.lost_bytes,
        "left_out": dict(sorted(record.left_out.items())),
        "exact_duplicates": duplicates.exact,
        "near_duplicates": duplicates.near,
        "languages": dict(record.languages.most_common()),
        # Key n counts the documents of 2^(n−1) to 2^n − 1 bytes.
        "lengths": {str(size): record.lengths[size] for size in sorted(record.lengths)},
    }


def _stream(index: Index, number: int) -> dict[str, Any]:
    source = index.sources[number]
    tokens = source.train.tokens + source.validation.tokens
    text_bytes = source.train.text_bytes + source.validation.text_bytes
    return {
        "name": source.name,
        "share": source.weight / sum(each.weight for each in index.sources),
        "train_tokens": source.train.tokens,
        "validation_tokens": source.validation.tokens,
        "loss_tokens": source.train.loss_tokens + source.validation.loss_tokens,
        "tokens_per_byte": round(tokens / max(1, text_bytes), 4),
        "shards": len(source.train.shards) + len(source.validation.shards),
    }
