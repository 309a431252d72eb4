"""Input and output of `index.json`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import ValidationError

from kabrn_dist.data.index import INDEX_NAME, Index
from kabrn_dist.data.index_checks import check_consistency
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain

# About ten million blocks, which are 40 trillion tokens.
SHARD_INDEX_BYTES_LIMIT = 1 << 29


def index_fingerprint(index: Index) -> str:
    """Return the sha256 of the index as canonical JSON, without its own fingerprint."""
    fields = index.model_dump(mode="json", exclude={"fingerprint"})
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_index(folder: Path, index: Index) -> Index:
    """Set the fingerprint of an index, write it in one step, and return it.

    Args:
        folder: Folder of the shards.
        index: Index without its fingerprint.

    Raises:
        UserError: if the index is inconsistent or the disk refuses.
    """
    sealed = index.model_copy(update={"fingerprint": index_fingerprint(index)})
    check_consistency(str(folder / INDEX_NAME), sealed)
    atomic_write(folder / INDEX_NAME, (sealed.model_dump_json() + "\n").encode())
    return sealed


def read_index(folder: Path) -> Index:
    """Read and check `folder/index.json`, without reading the shards.

    Raises:
        UserError: if it cannot be read, and as `parse_index`.
    """
    path = folder / INDEX_NAME
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give the folder that it lies in, {folder.parent}")
    remedy = "give a folder that `mixkabrn prepare` has finished: it writes the index last"
    return parse_index(read_plain(path, SHARD_INDEX_BYTES_LIMIT, follow_links=True, remedy=remedy), str(path))


def parse_index(content: bytes, origin: str) -> Index:
    """Parse and check an index.

    Args:
        content: Content of `index.json`.
        origin: Name of the index in messages.

    Raises:
        UserError: if it is not JSON, is of another format, has wrong fields, is inconsistent, names files outside the
            folder, points beyond a shard's end, or was changed after it was written.
    """
    try:
        index = Index.model_validate_json(content)
    except ValidationError as error:
        raise UserError(f"{origin}: {_first_problem(error)}; prepare the data again with this version") from error
    check_consistency(origin, index)
    if index.fingerprint != index_fingerprint(index):
        raise UserError(
            f"{origin}: fingerprint is {index.fingerprint[:12]!r}, its contents give "
            f"{index_fingerprint(index)[:12]!r}: the file was changed; copy it again, or prepare the data again"
        )
    return index


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # In another format every field is wrong; its number says why.
    problem = next((each for each in problems if each["loc"] == ("format",)), problems[0])
    if problem["type"] == "json_invalid":
        return f"not JSON ({problem['ctx']['error']})"
    key = ".".join(str(part) for part in problem["loc"])
    shown = "" if problem["type"] == "missing" else f", found {str(problem['input'])[:60]!r}"
    return f"{key}: {problem['msg']}{shown}"
