"""What to make of which sources: the recipe, a YAML file or the flags of the command line. Unknown keys are refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from data_prep.clean.config import CleaningConfig
from kabrn_dist.utils.errors import UserError

SourceName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
OptionValue = str | int | float | bool | tuple[str, ...]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenizerRecipe(_Section):
    """Exactly one of: train one, take one, or bytes."""

    train: PositiveInt | None = Field(None, description="Train a byte-level BPE of so many ids on the mix.")
    file: Path | None = Field(None, description="Take this tokenizer.json.")
    bytes: bool = Field(False, description="The ids are the bytes.")

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizerRecipe:
        if (self.train is not None) + (self.file is not None) + self.bytes != 1:
            raise ValueError("give exactly one of train: ids, file: tokenizer.json, bytes: true")
        return self


class SourceRecipe(_Section):
    """One source: where its texts are, how they are read and cleaned, and its share of the mix."""

    name: SourceName = Field(description="Its name in the index, in losses and in data.weights.")
    kind: str = Field(description="The layout: math, amps, m2d2, code, openqa, text, jsonl, parquet, python-stdlib.")
    input: tuple[Path, ...] = Field((), description="Files, folders or archives, seen from `root`.")
    options: dict[str, OptionValue] = Field(default_factory=dict, description="Options of the kind.")
    weight: float = Field(1.0, description="Share of the mix in training, over the sum of all weights.")
    epochs: Annotated[PositiveFloat, Field(allow_inf_nan=False)] | None = Field(
        None, description="How often training may pass over it; null: no limit."
    )
    interleave: SourceName | None = Field(
        None,
        description="Group of sources whose documents with the same key follow one another; one source of the mix.",
    )
    clean: dict[str, Any] = Field(default_factory=dict, description="Changes to the recipe's `clean`, for this source.")

    @model_validator(mode="before")
    @classmethod
    def _one_input(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("input"), str):
            return {**fields, "input": [fields["input"]]}
        return fields


class Recipe(_Section):
    """All that a preparation needs to know."""

    out: Path = Field(description="Folder for the shards.")
    root: Path = Field(Path("."), description="Folder from which relative inputs are seen.")
    tokenizer: TokenizerRecipe = Field(description="Where the tokenizer comes from.")
    clean: CleaningConfig = Field(default_factory=CleaningConfig, description="How documents are cleaned.")
    sources: tuple[SourceRecipe, ...] = Field(min_length=1, description="What the mix is made of.")
    validation_share: float = Field(0.05, ge=0, lt=1, description="Share of each source's documents held out.")
    shard_mb: PositiveFloat = Field(64, description="Size of a shard in MB of tokens, about.")
    max_unreadable: float = Field(0.01, ge=0, le=1, description="Share of a source's documents that may be unreadable.")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called {name!r}; give each its own name")
        for source in self.sources:
            if source.interleave in names:
                raise ValueError(f"interleave {source.interleave!r} of {source.name!r} is the name of a source too")
            if not 0 <= source.weight < math.inf:
                raise ValueError(f"weight {source.weight:g} of {source.name!r} is no share; give 0 or more")
        if not any(source.weight for source in self.sources):
            raise ValueError("the weights of the sources sum to 0; give at least one a weight above 0")
        return self

    def cleaning_config(self, source: SourceRecipe) -> CleaningConfig:
        """How `source` is cleaned; evaluation sets as seen from `root`.

        Raises pydantic's ValidationError for changes that cannot be.
        """
        settings = CleaningConfig.model_validate(_changed(self.clean.model_dump(), source.clean))
        paths = tuple(self.root / path for path in settings.contamination.paths)
        contamination = settings.contamination.model_copy(update={"paths": paths})
        return settings.model_copy(update={"contamination": contamination})

    def input_paths(self, source: SourceRecipe) -> list[Path]:
        """Where the texts of `source` are."""
        return [self.root / path for path in source.input]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML file, apply `a.b=c` overrides (`sources.NAME.key=…` finds a source by its name), validate.

    Raises UserError for a missing file, bad YAML, an unknown key or a wrong value.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}. Give a recipe such as configs/data_mix.yaml.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping with `sources:`, found {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], origin: str) -> Recipe:
    """Validate a recipe. Raises UserError, which begins with `origin`, for an unknown key or a wrong value."""
    try:
        recipe = Recipe.model_validate(tree)
        for source in recipe.sources:
            recipe.cleaning_config(source)
    except ValidationError as error:
        details = error.errors(include_url=False)
        # A list in which an entry is wrong is also called too short.
        deepest = [each for each in details if each["type"] != "too_short" or len(details) == 1]
        raise UserError(f"{origin}: " + "; ".join(map(_explain, deepest))) from error
    return recipe


def _override(tree: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: expected key=value, e.g. sources.math.weight=2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: {text!r} is not a YAML value; quote it") from None
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(tree, list):
            tree = _named(tree, parent, override)
            continue
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict | list):
            raise UserError(f"--set {override!r}: {parent!r} is a value, not a section")
    if isinstance(tree, list):
        raise UserError(f"--set {override!r}: say which key of {last!r}, e.g. sources.{last}.weight=2")
    tree[last] = value


def _named(entries: list[Any], name: str, override: str) -> Any:
    known = [entry.get("name") for entry in entries if isinstance(entry, dict)]
    if name not in known:
        raise UserError(f"--set {override!r}: no source is called {name!r}; there are {', '.join(map(str, known))}")
    return next(entry for entry in entries if isinstance(entry, dict) and entry.get("name") == name)


def _changed(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _changed(tree[key], value) if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
        for key, value in changes.items()
    }
    return {**tree, **both}


def _explain(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key!r}"
    if detail["type"] == "missing":
        return f"{key} is missing; add it"
    found = "" if detail["type"] == "value_error" else f", found {detail['input']!r}"
    return f"{key}: {message}{found}" if key else f"{message}{found}"
