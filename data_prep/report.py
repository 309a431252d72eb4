"""What a preparation did, for machines (report.json), for readers (report.html) and for the console."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.read import ReadRecord
from data_prep.recipe import Recipe
from data_prep.report_page import render_page
from data_prep.samples import DuplicateSummary
from kabrn_dist.data.index import Index
from kabrn_dist.data.index_io import index_fingerprint
from kabrn_dist.utils.atomic_io import atomic_write


def write_report(
    out: Path,
    recipe: Recipe,
    records: Sequence[ReadRecord],
    dropped: Sequence[DuplicateSummary],
    index: Index,
    licenses: Mapping[str, str],
    seconds: float,
) -> None:
    """Write report.json and report.html into `out`.

    Args:
        records, dropped: one a source of the recipe. licences: by source. seconds: that this run took.

    Raises UserError when the disk refuses.
    """
    sources = [
        _source(recipe, number, record, dropped[number]) | {"licence": licenses[recipe.sources[number].name]}
        for number, record in enumerate(records)
    ]
    read = sum(record.bytes for record in records)
    report: dict[str, Any] = {
        "fingerprint": index_fingerprint(index),
        "seconds": round(seconds, 2),
        "mb_per_second": round(read / 1e6 / max(seconds, 1e-3), 2),
        "documents": {
            "read": sum(record.documents for record in records),
            "train": index.documents("train"),
            "validation": index.documents("validation"),
        },
        "vocabulary": index.vocabulary,
        "sources": sources,
        "streams": [_stream(index, number) for number in range(len(index.sources))],
    }
    atomic_write(out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    atomic_write(out / "report.html", render_page(report).encode("utf-8", "replace"))


def summarize_records(recipe: Recipe, records: Sequence[ReadRecord]) -> str:
    """A line a source: what was read, and what was left out for which reason."""
    lines = []
    for source, record in zip(recipe.sources, records, strict=True):
        reasons = [f"{count:,} {reason}" for reason, count in sorted(record.removed.items())]
        if record.unreadable:
            reasons.append(f"{record.unreadable:,} unreadable (first: {record.unreadable_names[0]})")
        left_out = f"; left out {', '.join(reasons)}" if reasons else ""
        read = f"{record.documents:,} documents, {record.bytes / 1e6:,.1f} MB"
        lines.append(f"{source.name}: {read}; kept {record.clean_documents:,}{left_out}")
    return "\n".join(lines)


def _source(recipe: Recipe, number: int, record: ReadRecord, dropped: DuplicateSummary) -> dict[str, Any]:
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
        "removed_samples": record.samples | dropped.samples,
        "unreadable": record.unreadable,
        "unreadable_names": record.unreadable_names,
        "exact_duplicates": dropped.exact,
        "near_duplicates": dropped.near,
        "languages": dict(record.languages.most_common()),
        # Documents by size: key n counts those of 2^(n−1) to 2^n − 1 bytes.
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
