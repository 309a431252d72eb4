"""Shards of the domains of `benchmarks/finetune_domains.py`, made by the project's own preparation."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.finetune_domains import Exercise
from data_prep.prepare import prepare
from data_prep.recipe import parse_recipe
from data_prep.workers import WorkerGroup
from kabrn_dist.data.chat_template import DEFAULT_TEMPLATE, list_marks

VALIDATION_SHARE = 0.05


def prepare_documents(
    documents: Sequence[str | Exercise], name: str, out: Path, tokenizer: Path | int, held_out: float = VALIDATION_SHARE
) -> None:
    """Write documents as a shard set, unless it is there.

    Args:
        documents: all texts, or all exercises.
        name: of the source.
        out: folder of the shard set.
        tokenizer: a tokenizer.json, or the number of ids to train one with, which has the marks of conversations.
        held_out: share of the documents for validation.

    Raises:
        UserError: for documents or a tokenizer that cannot be used.
    """
    file = out.with_name(f"{out.name}.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    is_text = isinstance(documents[0], str)
    file.write_text("".join(f"{json.dumps(record)}\n" for record in _make_records(documents)), encoding="utf-8")
    chosen: dict[str, Any] = {"file": str(tokenizer)}
    if isinstance(tokenizer, int):
        chosen = {"train": tokenizer, "reserved": list_marks(DEFAULT_TEMPLATE)}
    # As they are: rules for prose would drop sums.
    clean = {"unicode": "off", "control": False, "quality": "off", "repetition": "off", "exact": True, "near": False}
    source = {"name": name, "kind": "jsonl" if is_text else "conversations", "input": str(file)}
    recipe = {
        "out": str(out),
        "tokenizer": chosen,
        "clean": clean,
        "sources": [source],
        "validation_share": held_out,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(parse_recipe(recipe, name), WorkerGroup())


def _make_records(documents: Iterable[str | Exercise]) -> Iterable[dict[str, Any]]:
    for document in documents:
        if isinstance(document, str):
            yield {"text": document}
        else:
            turns = ("user", document.question), ("assistant", document.answer)
            yield {"messages": [{"role": role, "content": content} for role, content in turns]}
