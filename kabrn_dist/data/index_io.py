"""Read and write `index.json`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import ValidationError

from kabrn_dist.data.index import INDEX_NAME, Index
from kabrn_dist.data.index_checks import check_consistency
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError


def index_fingerprint(index: Index) -> str:
    """Return the sha256 of the index as canonical JSON, without its own fingerprint."""
    fields = index.model_dump(mode="json", exclude={"fingerprint"})
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_index(folder: Path, index: Index) -> Index:
    """Seal `index` with its fingerprint, write it in one step, and return the sealed one.

    Raises UserError when the index contradicts itself or the disk refuses.
    """
    sealed = index.model_copy(update={"fingerprint": index_fingerprint(index)})
    check_consistency(str(folder / INDEX_NAME), sealed)
    atomic_write(folder / INDEX_NAME, (sealed.model_dump_json() + "\n").encode())
    return sealed


def read_index(folder: Path) -> Index:
    """Read and check `folder/index.json`; the shards themselves are not touched.

    Raises UserError when it cannot be read, and as `parse_index` does.
    """
    path = folder / INDEX_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}. Give a folder that `python -m data_prep` finished: it writes the index last."
        ) from error
    return parse_index(content, str(path))


def parse_index(content: bytes, origin: str) -> Index:
    """Return the index that `content` spells; `origin` names it in errors.

    Raises UserError when it is not JSON, is of another format, has wrong fields, contradicts itself, names files
    outside the folder, points beyond a shard's end, or was changed after it was written.
    """
    try:
        index = Index.model_validate_json(content)
    except ValidationError as error:
        raise UserError(f"{origin}: {_first_problem(error)}. Prepare the data again with this version.") from error
    check_consistency(origin, index)
    if index.fingerprint != index_fingerprint(index):
        raise UserError(
            f"{origin}: fingerprint is {index.fingerprint[:12]!r}, its contents give "
            f"{index_fingerprint(index)[:12]!r}: the file was changed. Copy it again, or prepare the data again."
        )
    return index


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # Of another format every field is wrong; its number says why.
    problem = next((each for each in problems if each["loc"] == ("format",)), problems[0])
    if problem["type"] == "json_invalid":
        return f"not JSON ({problem['ctx']['error']})"
    key = ".".join(str(part) for part in problem["loc"])
    found = "" if problem["type"] == "missing" else f", found {str(problem['input'])[:60]!r}"
    return f"{key}: {problem['msg']}{found}"
