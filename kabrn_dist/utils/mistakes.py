"""What is wrong in a configuration, in words: the key with its section, where it was given, and a remedy."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from kabrn_dist.utils.yaml_section import list_keys

# Least likeness of a key's last part to what was typed, in the same section and in others.
NEAR, NEAR_ELSEWHERE = 0.5, 0.65

# What values should be, for errors that pydantic words for programmers.
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "path": "a path",
    "tuple": "a list",
    "dict": "a mapping of names to values",
    "model": "a section with keys",
}


class Mistake(NamedTuple):
    """A mistake in a configuration.

    Attributes:
        location: Keys that lead to the value, entries of lists by their numbers.
        text: Key and remedy, or what the value must be.
    """

    location: tuple[str, ...]
    text: str


def explain_errors(error: ValidationError, model: type[BaseModel]) -> list[Mistake]:
    """Return the mistakes that validating `model` found."""
    return [_explain(detail, model) for detail in _innermost(error.errors(include_url=False))]


def join_mistakes(
    mistakes: Sequence[Mistake], source: str, overrides: Mapping[tuple[str, ...], str] | None = None
) -> str:
    """Return one message about all mistakes, each with the place where its value was given.

    Args:
        mistakes: The mistakes.
        source: Where the configuration comes from, such as its file.
        overrides: Each `--set` option by the location that it sets.
    """
    places: dict[str, list[str]] = {}
    for mistake in mistakes:
        given = (text for where, text in (overrides or {}).items() if _is_inside(mistake, where))
        text = next(given, None)
        place = source if text is None else f"--set {text[:200]!r}"
        places.setdefault(place, []).append(mistake.text)
    return "; ".join(f"{place}: {'; '.join(texts)}" for place, texts in places.items())


def find_nearest_key(name: str, keys: Iterable[str]) -> str | None:
    """Return the key that a name most likely means, by its last part; None if none is like it.

    >>> find_nearest_key("lr", ["training.steps", "optimizer.learning_rate"])
    'optimizer.learning_rate'

    Args:
        name: What was typed, with its section or without.
        keys: Dotted keys.
    """
    section, _, last = name.lower().replace("-", "_").rpartition(".")
    best, likeness = None, 0.0
    # Of equals, the key nearest to the top.
    for key in sorted(keys, key=lambda key: (key.count("."), key)):
        place, _, part = key.rpartition(".")
        initials = "".join(word[0] for word in part.split("_"))
        same = 1.0 if last == initials else difflib.SequenceMatcher(None, last, part).ratio()
        if same < (NEAR if place == section else NEAR_ELSEWHERE):
            continue
        same += place == section
        if same > likeness:
            best, likeness = key, same
    return best


def _is_inside(mistake: Mistake, where: tuple[str, ...]) -> bool:
    location = mistake.location
    # `modle.width=3` is told as an unknown `modle`.
    is_below = mistake.text.startswith("unknown key") and where[: len(location)] == location
    return is_below or location[: len(where)] == where


def _explain(detail: Any, model: type[BaseModel]) -> Mistake:
    location = _location(detail)
    return Mistake(location, _describe(detail, ".".join(location), location, model))


def _describe(detail: Any, key: str, location: tuple[str, ...], model: type[BaseModel]) -> str:
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_suggest(location, model)}"
    if detail["type"] == "missing":
        return f"{key} is missing; add it"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        # A rule between sections has no key of its own.
        return f"{key}: {message}" if key else message
    kind, _, problem = detail["type"].partition("_")
    if kind in KINDS and problem in ("type", "parsing", "from_float", "attributes_type"):
        message = f"must be {KINDS[kind]}"
    found = "null" if detail["input"] is None else reprlib.repr(detail["input"])
    return f"{key}: {message.replace('Input should', 'must')}, found {found}"


def _suggest(location: tuple[str, ...], model: type[BaseModel]) -> str:
    """The nearest key, in the same section or another, or all keys of the section."""
    # The keys of a list's entries, whatever the number of the entry.
    section = ".".join(part for part in location[:-1] if not part.isdigit())
    known = list_keys(model)
    near = find_nearest_key(f"{section}.{location[-1]}".lstrip("."), known)
    if near is None:
        here = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
        return f"known keys: {', '.join(here)}"
    place, _, last = near.rpartition(".")
    shown = ".".join((*location[:-1], last)) if place == section else near
    return f"did you mean {shown!r}?"


def _location(detail: Any) -> tuple[str, ...]:
    # Pydantic names the branches of a union too, by their types.
    return tuple(str(part) for part in detail["loc"] if not str(part).startswith(("tuple[", "literal[")))


def _innermost(details: Sequence[Any]) -> list[Any]:
    """Leave out errors that only say that a value with a mistake inside is not another branch of its union."""
    locations = [_location(detail) for detail in details]
    return [
        detail
        for detail, location in zip(details, locations, strict=True)
        if not any(len(location) < len(other) and other[: len(location)] == location for other in locations)
    ]
