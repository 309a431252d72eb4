"""Describe files that do not have the layout of a source, and guess which source would fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class LayoutMismatch(NamedTuple):
    """A file or line that can be read but has another layout.

    Attributes:
        name: its name.
        description: what it contains.
    """

    name: str
    description: str


_BY_NAME = (
    (r"(^|/)(train|test)/[^/]+/\d+\.json$", "math"),
    (r"(^|/)(khan|mathematica)/", "amps"),
    (r"(^|/)(question\.txt|solutions\.json)$", "code with layout: apps"),
    (r"human.?eval.*\.jsonl", "code with layout: humaneval"),
    (r"mbpp.*\.jsonl", "code with layout: mbpp"),
    (r"(^|/)[^/]+/(train|valid|test)\.txt$", "m2d2"),
    (r"\.parquet$", "parquet"),
    (r"\.jsonl(\.gz|\.zst)?$", "jsonl or openqa"),
    (r"\.(py|c|h|cpp|rs|go|java|js|ts)$", "code"),
    (r"\.txt(\.gz|\.zst)?$", "text"),
)
_BY_KEYS = (
    ({"task_id", "prompt", "canonical_solution"}, "code with layout: humaneval"),
    ({"task_id", "code", "test_list"}, "code with layout: mbpp"),
    ({"problem", "solution"}, "math"),
    ({"hints"}, "amps"),
    ({"messages"}, "conversations"),
    ({"conversations"}, "conversations"),
    ({"prompt", "completion"}, "conversations"),
    ({"question", "answerKey"}, "openqa"),
    ({"question", "answer"}, "openqa"),
    ({"text"}, "jsonl"),
)


def guess_source(names: Sequence[str]) -> str:
    """Return the source, with its option, whose layout has names like these, or ""."""
    for pattern, kind in _BY_NAME:
        if any(re.search(pattern, name, re.IGNORECASE) for name in names):
            return kind
    return ""


def describe_kind(guess: str) -> str:
    """Return how a recipe reads what `guess_source` has guessed."""
    return f"give a recipe (mixkabrn prepare --recipe FILE) a source with kind: {guess}"


def describe_record(record: object) -> str:
    """Return the keys of a JSON record, and "; it looks like …" with the source that reads such records."""
    if not isinstance(record, Mapping):
        return f"a {type(record).__name__}"
    keys = ", ".join(repr(key) for key in list(record)[:8]) or "no keys"
    for required, kind in _BY_KEYS:
        if required <= set(record):
            return f"{keys}; it looks like {kind}"
    return keys
