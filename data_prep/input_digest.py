"""Tell whether a preparation has the same inputs as an earlier one, without reading them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.chat import find_template_file
from data_prep.clean.contamination import list_evaluation_files
from data_prep.documents import Unit
from data_prep.read import SourceReader
from data_prep.recipe import Recipe
from data_prep.sources import FileGroup
from data_prep.sources.files import walk_files

# A message lists so many settings.
_SHOWN = 4
_LATER_KEYS = {"chat_template", "max_malformed", "reserved", "whole"}


class InputDigest(NamedTuple):
    """What a preparation reads, as it is recorded in the folder that is made from it.

    Attributes:
        digest: of the recipe, and of name, size and time of every file to read.
        settings: the recipe as JSON, to tell what another one has differently; empty if it is not known.
    """

    digest: str
    settings: str

    @classmethod
    def parse(cls, text: str) -> InputDigest:
        """Return what a record holds; earlier versions recorded the digest only."""
        digest, _, settings = text.partition("\n")
        return cls(digest, settings)

    def dump(self) -> bytes:
        """Return the record: the digest on the first line, the settings on the second."""
        return f"{self.digest}\n{self.settings}".encode("utf-8", "surrogateescape")

    def describe_change(self, new: InputDigest) -> str:
        """Return in words what `new` has differently: settings with both values, or else the sources' files."""
        old_values, new_values = (_read_settings(each.settings) for each in (self, new))
        if not old_values:
            return "another recipe, or sources that have changed since"
        keys = [key for key in {**old_values, **new_values} if old_values.get(key) != new_values.get(key)]
        if not keys:
            return "sources that have changed since"
        changes = [
            f"{key} {old_values.get(key, 'not set')} (now {new_values.get(key, 'not set')})" for key in keys[:_SHOWN]
        ]
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        return f"other settings: {', '.join(changes)}{more}"


def _read_settings(text: str) -> dict[str, str]:
    """Return the recorded settings by their dotted names; none from a record that was damaged."""
    try:
        return _list_values(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _list_values(tree: Any, name: str = "") -> dict[str, str]:
    """Return the values of nested dicts and lists by their dotted names, as JSON."""
    if not isinstance(tree, dict | list):
        return {name: json.dumps(tree, ensure_ascii=False)}
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    values: dict[str, str] = {}
    for key, value in entries:
        values |= _list_values(value, f"{name}.{key}" if name else str(key))
    return values


def digest_inputs(reader: SourceReader, recipe: Recipe) -> InputDigest:
    """Return what is to be read, without reading it."""
    settings = json.dumps(_describe_settings(recipe), default=str, ensure_ascii=False, separators=(",", ":"))
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
    return InputDigest(digest.hexdigest(), settings)


def _describe_settings(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe without newer keys that are not given, so that folders of earlier versions are recognized."""
    tree = recipe.model_dump(exclude={"out"})
    sections = [(recipe, tree), (recipe.tokenizer, tree["tokenizer"])]
    for section, fields in [*sections, *zip(recipe.sources, tree["sources"], strict=True)]:
        for key in _LATER_KEYS & (fields.keys() - section.model_fields_set):
            del fields[key]
    return tree


def _name_bytes(text: str) -> bytes:
    # Names of files are bytes, which need not be UTF-8.
    return text.encode("utf-8", "surrogateescape")


def _other_files(recipe: Recipe) -> Iterator[Path]:
    """Yield the files besides the sources: the tokenizer, its chat template, and the evaluation sets."""
    if recipe.tokenizer.file is not None:
        yield recipe.tokenizer.file
    template = find_template_file(recipe)
    if template is not None:
        yield template
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
