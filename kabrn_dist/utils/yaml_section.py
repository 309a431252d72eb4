"""Configurations in YAML files: strict sections, `--set a.b=c` overrides.

Shared by the training configuration (kabrn_dist/config) and by the recipes of data_prep.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.strict_yaml import load_yaml, read_yaml
from kabrn_dist.utils.user_values import check_number, read_path


class ConfigSection(BaseModel):
    """A part of a configuration: immutable, and strict about its keys and about booleans."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _reject_bool_for_number(cls, values: Any) -> Any:
        """Pydantic would read `steps: true` as 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and bool not in _branches(field.annotation):
                raise ValueError(f"{name} is {str(value).lower()}, which is not one of its values")
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _read_paths_and_check_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Read paths as people write them, and refuse numbers that nothing can be computed with."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if section_type(annotation) is not None:
            return value
        # The keys of a mapping are names, whatever its values are.
        is_mapping = typing.get_origin(annotation) is dict
        kinds = _branches(typing.get_args(annotation)[1] if is_mapping else annotation)
        return _read_parts(value, Path in kinds, str in kinds)


def _read_parts(value: Any, is_path: bool, is_text: bool) -> Any:
    if isinstance(value, list | tuple):
        return [_read_parts(part, is_path, is_text) for part in value]
    if isinstance(value, dict):
        return {key: _read_parts(part, is_path, is_text) for key, part in value.items()}
    if isinstance(value, str) and (is_path or is_text):
        return value if is_text else read_path(value)
    check_number(value)
    return value


def read_mapping(path: Path, hint: str, expected: str) -> dict[str, Any]:
    """Return the mapping at the top of a YAML file.

    Args:
        path: the file.
        hint: remedy for a missing file.
        expected: what the top level should be, such as "a mapping of sections such as `model:`".

    Raises:
        UserError: for a missing file, a file that cannot be read, bad YAML, or another value than a mapping.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; {_near_file(path) or hint}")
    if path.is_dir():
        inside = path / "config.yaml"
        raise UserError(f"{path}: is a folder, not a file; {f'did you mean {inside}?' if inside.exists() else hint}")
    tree = read_yaml(path, remedy=hint)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected {expected}, found {type(tree).__name__}")
    return tree


def _near_file(path: Path) -> str:
    """The file beside a missing one that has nearly its name; empty without one."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f"did you mean {path.with_name(near[0])}?" if near else ""


def set_value(tree: dict[str, Any], override: str, example: str, model: type[BaseModel]) -> tuple[str, ...]:
    """Apply a `--set` option such as `training.steps=100` to `tree` in place, creating sections as needed.

    In a list of mappings, an entry is addressed by its `name`, as in `sources.math.weight=2`; in a mapping of names to
    values, all that follows is the name, as in `data.weights.math.2=1`. A text or a path is taken as it is written; any
    other value is YAML.

    Args:
        tree: the configuration as YAML has it.
        override: the option, `section.key=value`.
        example: how the message for a malformed option describes a good one.
        model: the type of the configuration.

    Returns:
        The keys that lead to the value, entries of lists by their numbers.

    Raises:
        UserError: for a malformed option, or a key below something that is not a section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: expected {example}")
    (*parents, last), annotation = _find_field(key.split("."), model)
    section: Any = tree
    location: list[str] = []
    for parent in parents:
        if isinstance(section, list):
            entries, section = section, _entry_called(section, parent, override)
            location.append(str(next(number for number, entry in enumerate(entries) if entry is section)))
            continue
        location.append(parent)
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict | list):
            raise UserError(f"--set {override!r}: {parent!r} is a value, not a section")
    if isinstance(section, list):
        raise UserError(f"--set {override!r}: name a key of {last!r} too, as in {key}.KEY=…")
    section[last] = _read_value(text, annotation, override)
    return *location, last


def _read_value(text: str, annotation: Any, override: str) -> Any:
    """The value that `text` means for a field; YAML would end a text at ` #`, and make a date or a number of it."""
    kinds = set(_alternatives(annotation))
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    is_null = types.NoneType in kinds and text in ("", "null", "~")
    if kinds and kinds <= {str, Path, types.NoneType} and not is_quoted and not is_null:
        return text
    try:
        value = load_yaml(text)
    except UserError as error:
        if not str(error).startswith("not valid YAML"):
            raise UserError(f"--set {override[:200]!r}: {error}") from None
        raise UserError(f"--set {override[:200]!r}: {text[:80]!r} is not a YAML value; quote it") from None
    if re.search(r"(^|\s)#", text) and "#" not in str(value):
        raise UserError(f"--set {override!r}: # begins a comment in YAML; put the value in quotes, or leave out the #")
    return value


def _find_field(parts: list[str], model: type[BaseModel]) -> tuple[list[str], Any]:
    """The keys that lead to a value, and the type of its field; None where the configuration has no such field."""
    section: Any = model
    entry: Any = None
    for number, part in enumerate(parts):
        if section is None:
            # The name of an entry of a list.
            section = entry
            continue
        field = section.model_fields.get(part)
        if field is None:
            return parts, None
        annotation, rest = field.annotation, parts[number + 1 :]
        origin = typing.get_origin(annotation)
        if not rest:
            return parts, annotation
        if origin is dict:
            value = typing.get_args(annotation)[1]
            return (parts, None) if value is Any else ([*parts[: number + 1], ".".join(rest)], value)
        inner = section_type(annotation)
        if inner is None:
            return parts, None
        section, entry = (None, inner) if origin is tuple else (inner, None)
    return parts, None


def _alternatives(annotation: Any) -> list[Any]:
    """The types that an annotation is a union of, without `Annotated`."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for argument in typing.get_args(annotation) for kind in _alternatives(argument)]
    return [] if annotation is None else [annotation]


def _entry_called(entries: list[Any], name: str, override: str) -> Any:
    named = {entry.get("name"): entry for entry in entries if isinstance(entry, dict)}
    if name not in named:
        raise UserError(f"--set {override!r}: nothing is called {name!r}; there are {', '.join(map(str, named))}")
    return named[name]


def list_sections(section: type[BaseModel], path: str = "") -> dict[str, type[BaseModel]]:
    """Return every section of a configuration by its dotted name, the whole one first with an empty name."""
    sections = {path: section}
    for key, field in section.model_fields.items():
        part = section_type(field.annotation)
        if part is not None:
            sections |= list_sections(part, f"{path}.{key}".lstrip("."))
    return sections


def list_keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the field of every key of a configuration by its dotted name, sections included."""
    return {
        f"{path}.{key}".lstrip("."): field
        for path, section in list_sections(model).items()
        for key, field in section.model_fields.items()
    }


def section_type(annotation: Any) -> type[BaseModel] | None:
    """Return the section class in a field's annotation: itself, the branch of a union or the items of a tuple."""
    return next(
        (part for part in _branches(annotation) if isinstance(part, type) and issubclass(part, BaseModel)), None
    )


def _branches(annotation: Any) -> list[Any]:
    """The types that an annotation is made of, without `Annotated`, unions and containers around them."""
    origin = typing.get_origin(annotation)
    if origin is None or origin is typing.Literal:
        return [annotation]
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        arguments = arguments[:1]
    return [branch for argument in arguments for branch in _branches(argument)]
