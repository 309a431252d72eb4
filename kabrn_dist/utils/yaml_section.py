"""Configurations in YAML files: strict sections, `--set a.b=c` overrides, and messages that name key and remedy.

Shared by the training configuration (kabrn_dist/config) and by the recipes of data_prep.
"""

from __future__ import annotations

import difflib
import os
import reprlib
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain

# No person writes more, and PyYAML would take minutes for it.
_FILE_BYTES_LIMIT = 4 << 20


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
        raise UserError(f"{path}: no such file; {hint}")
    try:
        tree = yaml.safe_load(read_plain(path, _FILE_BYTES_LIMIT, follow_links=True, remedy=hint).decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a configuration") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected {expected}, found {type(tree).__name__}")
    return tree


def split_override(override: str, example: str) -> tuple[str, Any]:
    """Return key and value of a `--set` option such as `training.steps=100`.

    Raises:
        UserError: for an option without `=`, or a value that is not YAML. The message gives `example`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: expected {example}")
    try:
        return key, yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise UserError(f"--set {override!r}: {text!r} is not a YAML value; quote it") from None


def set_value(tree: dict[str, Any], override: str, example: str) -> None:
    """Apply a `--set` option to `tree` in place, creating sections as needed.

    In a list of mappings, an entry is addressed by its `name`, as in `sources.math.weight=2`.

    Args:
        tree: the configuration as YAML has it.
        override: the option, `section.key=value`.
        example: how the message for a malformed option describes a good one.

    Raises:
        UserError: for a malformed option, or a key below something that is not a section.
    """
    key, value = split_override(override, example)
    *parents, last = key.split(".")
    section: Any = tree
    for parent in parents:
        if isinstance(section, list):
            section = _entry_called(section, parent, override)
            continue
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict | list):
            raise UserError(f"--set {override!r}: {parent!r} is a value, not a section")
    if isinstance(section, list):
        raise UserError(f"--set {override!r}: name a key of {last!r} too, as in {key}.KEY=…")
    section[last] = value


def explain_errors(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one line for each mistake that validating `model` found, with the key and a remedy or the value."""
    details = error.errors(include_url=False)
    return [_explain(detail, model) for detail in _innermost(details)]


def _entry_called(entries: list[Any], name: str, override: str) -> Any:
    named = {entry.get("name"): entry for entry in entries if isinstance(entry, dict)}
    if name not in named:
        raise UserError(f"--set {override!r}: nothing is called {name!r}; there are {', '.join(map(str, named))}")
    return named[name]


def _location(detail: Any) -> list[str]:
    # Pydantic names the branches of a union too, by their types.
    return [str(part) for part in detail["loc"] if not str(part).startswith(("tuple[", "literal["))]


def _innermost(details: typing.Sequence[Any]) -> list[Any]:
    """Leave out errors that only say that a value with a mistake inside is not another branch of its union."""
    locations = [_location(detail) for detail in details]
    return [
        detail
        for detail, location in zip(details, locations, strict=True)
        if not any(len(location) < len(other) and other[: len(location)] == location for other in locations)
    ]


def _explain(detail: Any, model: type[BaseModel]) -> str:
    location = _location(detail)
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], model)
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if detail["type"] == "missing":
        return f"{key} is missing; add it"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        # A rule between sections has no key of its own.
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, found {reprlib.repr(detail['input'])}"


def _known_keys(location: list[str], model: type[BaseModel]) -> list[str]:
    section: Any = model
    for name in location:
        if name.isdigit():
            continue
        section = section_type(section.model_fields[name].annotation)
    return list(section.model_fields)


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
