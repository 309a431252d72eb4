"""What to say when the files are not laid out as a source expects: what was found, and which source would fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class LayoutMismatch(NamedTuple):
    """A file or line `name` that can be read but has another layout; `found` says which."""

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
    ({"question", "answerKey"}, "openqa"),
    ({"question", "answer"}, "openqa"),
    ({"text"}, "jsonl"),
)


def guess_source(names: Sequence[str]) -> str:
    """Return the source (and option) whose layout has names like these, or ""."""
    for pattern, kind in _BY_NAME:
        if any(re.search(pattern, name, re.IGNORECASE) for name in names):
            return kind
    return ""


def describe_record(record: object) -> str:
    """Return what a JSON `record` holds, and "; it looks like …" for the source that reads such records."""
    if not isinstance(record, Mapping):
        return f"a {type(record).__name__}"
    keys = ", ".join(repr(key) for key in list(record)[:8]) or "no keys"
    for wanted, kind in _BY_KEYS:
        if wanted <= set(record):
            return f"{keys}; it looks like {kind}"
    return keys
