"""Which files in an output folder a preparation has made, by its index or its record of work, never by their names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from kabrn_dist.data.index import CHAT_TEMPLATE_NAME, INDEX_NAME, TOKENIZER_NAME
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain

# The digest of what a finished folder was made from.
INPUTS_NAME = ".inputs"
REPORT_NAMES = ("report.json", "report.html")

_MAX_RECORD_BYTES = 1 << 30


def list_made_files(out: Path, work: Path) -> set[str]:
    """Return the names of the files in `out` that a preparation made.

    Args:
        out: the folder for the shards.
        work: its folder of unfinished work.

    Returns:
        The names, which need not all exist. Empty if there is neither an index of a shard set nor unfinished work.
    """
    names: set[str] = set()
    claimed = _read_json(work / "files.json")
    if isinstance(claimed, list):
        names |= {name for name in claimed if _is_plain(name)}
    index = _read_json(out / INDEX_NAME)
    shards = _list_indexed_shards(index)
    if shards is not None:
        names |= {INDEX_NAME, INPUTS_NAME, TOKENIZER_NAME, *REPORT_NAMES, *shards}
        if "chat_template_sha256" in index.get("tokenizer", ()):
            names.add(CHAT_TEMPLATE_NAME)
    return names | {f"{name}.tmp" for name in names}


def check_out_holds_no_input(out: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """Check that no input lies in the output folder, whose files may be replaced.

    Args:
        out: the folder for the shards.
        inputs: all inputs, each with a word for it.

    Raises:
        UserError: one of them is the folder or lies in it.
    """
    folder = out.resolve()
    for word, path in inputs:
        if path.resolve().is_relative_to(folder):
            raise UserError(
                f"--out {out}: holds the {word} {path}, which a preparation there could replace; choose another folder"
            )


def _list_indexed_shards(index: Any) -> set[str] | None:
    """Return the shards that an index of any version names; None if it is not the index of a shard set."""
    if not isinstance(index, dict) or not isinstance(index.get("fingerprint"), str):
        return None
    try:
        return {
            shard["name"]
            for source in index["sources"]
            for split in ("train", "validation")
            for shard in source[split]["shards"]
            if _is_plain(shard["name"])
        }
    except (KeyError, TypeError):
        return None


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and "\0" not in name and PurePath(name).name == name


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_plain(path, _MAX_RECORD_BYTES, follow_links=True))
    except (UserError, ValueError, RecursionError):
        return None
