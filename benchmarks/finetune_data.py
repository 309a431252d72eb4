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
from data_prep.workspace import acquire_workspace, release_workspace
from kabrn_dist.data.chat_template import list_marks
from kabrn_dist.data.default_template import DEFAULT_TEMPLATE

VALIDATION_SHARE = 0.05


def prepare_documents(
    documents: Sequence[str | Exercise], name: str, out: Path, tokenizer: Path | int, held_out: float = VALIDATION_SHARE
) -> None:
    """Write documents as a shard set, unless the same one is there.

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
    text = "".join(f"{json.dumps(record)}\n" for record in _make_records(documents))
    changed = not file.exists() or file.read_text(encoding="utf-8") != text
    if changed:
        file.write_text(text, encoding="utf-8")
    if isinstance(tokenizer, int):
        chosen: dict[str, Any] = {"train": tokenizer, "reserved": list_marks(DEFAULT_TEMPLATE)}
    else:
        chosen, own = {"file": str(tokenizer)}, out / tokenizer.name
        changed |= own.exists() and own.read_bytes() != tokenizer.read_bytes()
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
    lock = acquire_workspace(out)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(parse_recipe(recipe, name), WorkerGroup(), force=changed)
    finally:
        release_workspace(out, lock)


def _make_records(documents: Iterable[str | Exercise]) -> Iterable[dict[str, Any]]:
    for document in documents:
        if isinstance(document, str):
            yield {"text": document}
        else:
            turns = ("user", document.question), ("assistant", document.answer)
            yield {"messages": [{"role": role, "content": content} for role, content in turns]}
