"""The configuration as a YAML file: read it, override values, explain what is wrong with it, write it."""

from __future__ import annotations

import difflib
import reprlib
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kabrn_dist.config import Config
from kabrn_dist.utils.errors import UserError


def load_config(path: Path | str, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=c` overrides and validate.

    Raises:
        UserError: for a missing file, bad YAML, an unknown key (with the nearest known one) or a wrong value.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; configs/tiny.yaml is a place to start") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a configuration") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections such as `model:`, found {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(map(_explain, _innermost(error.errors())))) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the sections."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: expected section.key=value, e.g. training.steps=100")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise UserError(f"--set {override!r}: {text!r} is not a YAML value; quote it") from None
    *parents, last = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(f"--set {override!r}: {parent!r} is a value, not a section")
    tree[last] = value


def _place(detail: Any) -> list[str]:
    # Pydantic names the branches of a union too, by their types.
    return [str(part) for part in detail["loc"] if not str(part).startswith(("tuple[", "literal["))]


def _innermost(details: typing.Sequence[Any]) -> list[Any]:
    """Without those that only say that a value with a mistake inside is not another branch of its union."""
    places = [_place(detail) for detail in details]
    return [
        detail
        for detail, place in zip(details, places, strict=True)
        if not any(len(place) < len(other) and other[: len(place)] == place for other in places)
    ]


def _explain(detail: Any) -> str:
    place = _place(detail)
    key = ".".join(place)
    if detail["type"] == "extra_forbidden":
        known = _keys(place[:-1])
        close = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if detail["type"] == "missing":
        return f"{key} is missing; add it"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        # What is wrong between sections has no key of its own.
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, found {reprlib.repr(detail['input'])}"


def _keys(place: list[str]) -> list[str]:
    section: Any = Config
    for name in place:
        section = section.model_fields[name].annotation
        if isinstance(section, types.UnionType):
            section = next(part for part in typing.get_args(section) if isinstance(part, type))
    return list(section.model_fields)
