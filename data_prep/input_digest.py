"""Tell whether a preparation has the same inputs as an earlier one, without reading them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.clean.contamination import list_evaluation_files
from data_prep.documents import Unit
from data_prep.read import SourceReader
from data_prep.recipe import Recipe
from data_prep.sources import FileGroup
from data_prep.sources.files import walk_files


def digest_inputs(reader: SourceReader, recipe: Recipe) -> str:
    """Return a digest of the inputs: the recipe, and name, size and time of every file to read."""
    settings = json.dumps(recipe.model_dump(exclude={"out"}), default=str, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(_name_bytes(settings))
    for path in _other_files(recipe):
        digest.update(_name_bytes(f"{path.name} {_file_state(path)}"))
    for task in reader.tasks:
        unit = task.unit
        # Spelled out in this form, so that folders that earlier versions finished are still recognized.
        kind, fields = "Unit" if isinstance(unit, Unit) else "Group", unit._asdict() | {"path": None}
        described = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        digest.update(f"Item(number={task.number}, source={task.source}, unit={kind}({described}))".encode())
        for path in _unit_files(unit, recipe.out):
            digest.update(_name_bytes(f"{path.name} {_file_state(path)}"))
    return digest.hexdigest()


def _name_bytes(text: str) -> bytes:
    # Names of files are bytes, which need not be UTF-8.
    return text.encode("utf-8", "surrogateescape")


def _other_files(recipe: Recipe) -> Iterator[Path]:
    """Yield the files besides the sources: the tokenizer and the evaluation sets."""
    if recipe.tokenizer.file is not None:
        yield recipe.tokenizer.file
    for source in recipe.sources:
        for path in recipe.cleaning_config(source).contamination.paths:
            yield from list_evaluation_files(path, recipe.out)


def _unit_files(unit: Unit | FileGroup, out: Path) -> Iterator[Path]:
    if isinstance(unit, Unit):
        yield unit.path
    else:
        yield from (unit.path / name for name, _ in walk_files(unit.path, unit.first, unit.last, out=out))


def _file_state(path: Path) -> str:
    try:
        state = path.stat()
    except OSError as error:
        # Reading the file raises the same error.
        return str(error.strerror)
    return f"{state.st_size} {state.st_mtime_ns}"
