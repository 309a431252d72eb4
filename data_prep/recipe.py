"""The recipe: which data to make of which sources, from a YAML file or the flags of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, ValidationError, model_validator

from data_prep.clean.config import CleaningConfig
from data_prep.sources.conversations import CONVERSATION_KINDS
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.mistakes import explain_errors, join_mistakes
from kabrn_dist.utils.yaml_section import ConfigSection, read_mapping, set_value

# Names of shards begin with it, and a name of a file has 255 bytes at most.
SourceName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100)]
OptionValue = str | int | float | bool | tuple[str, ...]

_EXAMPLE_OVERRIDE = "key=value, e.g. sources.math.weight=2"


class TokenizerRecipe(ConfigSection):
    """Where the tokenizer comes from: exactly one of training, a file, or bytes."""

    train: PositiveInt | None = Field(None, description="Train a byte-level BPE tokenizer with this number of ids.")
    file: Path | None = Field(None, description="Use this tokenizer.json.")
    bytes: bool = Field(False, description="Use the bytes of the text as ids.")
    reserved: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] | None = Field(
        None,
        description="Special tokens to reserve when a tokenizer is trained, or to append to a file; null: those of the "
        "chat template when it is trained, none for a file.",
    )

    @model_validator(mode="after")
    def _check_exactly_one(self) -> TokenizerRecipe:
        if (self.train is not None) + (self.file is not None) + self.bytes != 1:
            raise ValueError("give exactly one of train: ids, file: tokenizer.json, bytes: true")
        if self.bytes and self.reserved:
            raise ValueError("bytes has no room for reserved tokens; drop one of them")
        return self


class SourceRecipe(ConfigSection):
    """One source: where its texts are, how they are read and cleaned, and its weight in the mix."""

    name: SourceName = Field(description="Name in the index, in the losses and in data.weights.")
    kind: str = Field(
        description="Layout: math, amps, m2d2, code, openqa, text, jsonl, parquet, python-stdlib, "
        "conversations, conversations-parquet."
    )
    input: tuple[Path, ...] = Field((), description="Files, folders or archives, relative to `root`.")
    options: dict[str, OptionValue] = Field(default_factory=dict, description="Options of the kind.")
    weight: float = Field(
        1.0,
        gt=0,
        le=1e9,
        description="Weight in the training mix, relative to the sum of all weights. A run leaves a source out with "
        "data.weights.",
    )
    epochs: float | None = Field(
        None, gt=0, le=1e6, description="Number of epochs after which training stops drawing from it; null: no limit."
    )
    interleave: SourceName | None = Field(
        None,
        description="Group of sources whose documents with the same key follow one another. A group is one source of "
        "the mix.",
    )
    clean: dict[str, Any] = Field(default_factory=dict, description="Changes to `clean` for this source.")
    whole: bool | None = Field(
        None,
        description="Whether training keeps a document whole in a sequence where it fits, and leaves the rest of the "
        "sequence unused; null: conversations only.",
    )

    @property
    def has_conversations(self) -> bool:
        """Whether its documents are conversations."""
        return self.kind in CONVERSATION_KINDS

    @property
    def keeps_whole(self) -> bool:
        """Whether training keeps its documents whole in a sequence."""
        return self.has_conversations if self.whole is None else self.whole

    @model_validator(mode="before")
    @classmethod
    def _wrap_single_input(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("input"), str):
            return {**fields, "input": [fields["input"]]}
        return fields


class Recipe(ConfigSection):
    """Everything that decides what a preparation makes."""

    out: Path = Field(description="Folder for the shards.")
    root: Path = Field(Path("."), description="Folder that relative inputs are relative to.")
    tokenizer: TokenizerRecipe = Field(description="Where the tokenizer comes from.")
    clean: CleaningConfig = Field(default_factory=CleaningConfig, description="How documents are cleaned.")
    sources: tuple[SourceRecipe, ...] = Field(min_length=1, description="Sources of the mix.")
    validation_share: float = Field(0.05, ge=0, lt=1, description="Fraction of each source's documents held out.")
    shard_mb: float = Field(64, ge=1e-3, le=1e6, description="Approximate size of a shard in MB of tokens.")
    chat_template: Path | None = Field(
        None,
        description="Chat template in Jinja that writes conversations, kept with the tokenizer; null: the "
        "chat_template.jinja beside `tokenizer.file`, or else ChatML.",
    )
    max_malformed: float = Field(
        0.05, ge=0, le=1, description="Fraction of a source's conversations that may be malformed."
    )
    max_unreadable: float = Field(
        0.01, ge=0, le=1, description="Fraction of a source's documents that may be unreadable."
    )

    @model_validator(mode="after")
    def _check_sources(self) -> Recipe:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called {name!r}; give each its own name")
        for source in self.sources:
            if source.interleave in names:
                raise ValueError(
                    f"interleave {source.interleave!r} of {source.name!r} is also the name of a source; rename one"
                )
        return self

    def cleaning_config(self, source: SourceRecipe) -> CleaningConfig:
        """Return how `source` is cleaned, with the paths of evaluation sets resolved against `root`.

        Raises:
            pydantic.ValidationError: the source's changes do not fit.
        """
        tree = self.clean.model_dump()
        if source.has_conversations:
            # Gopher's rules are made for prose, and of exercises with other numbers all are wanted.
            unsuited = {"quality": "off", "repetition": "off", "near": False}
            tree |= {key: value for key, value in unsuited.items() if key not in self.clean.model_fields_set}
        config = CleaningConfig.model_validate(_merge(tree, source.clean))
        paths = tuple(self.root / path for path in config.contamination.paths)
        contamination = config.contamination.model_copy(update={"paths": paths})
        return config.model_copy(update={"contamination": contamination})

    def input_paths(self, source: SourceRecipe) -> list[Path]:
        """Return the inputs of `source`, resolved against `root`."""
        return [self.root / path for path in source.input]

    def named_inputs(self) -> list[tuple[str, Path]]:
        """Return all files and folders that a preparation reads, each with a word for it in messages."""
        named = [("input", path) for source in self.sources for path in self.input_paths(source)]
        if self.tokenizer.file is not None:
            named.append(("tokenizer", self.tokenizer.file))
        if self.chat_template is not None:
            named.append(("chat template", self.chat_template))
        for source in self.sources:
            named += [("evaluation set", path) for path in self.cleaning_config(source).contamination.paths]
        return named


def load_recipe(path: Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> Recipe:
    """Read a YAML file, apply overrides and flags, and validate.

    Args:
        path: the file.
        overrides: `a.b=c`, where c is YAML; `sources.NAME.key=…` finds a source by its name.
        flags: values of keys at the top level as the command line gives them, not YAML.

    Raises:
        UserError: for a missing file, bad YAML, an unknown key or a wrong value.
    """
    tree = read_mapping(path, "give a recipe such as configs/data_mix.yaml", "a mapping with `sources:`")
    given = {set_value(tree, override, _EXAMPLE_OVERRIDE, Recipe): override for override in overrides}
    tree.update(flags or {})
    return parse_recipe(tree, str(path), given)


def parse_recipe(tree: dict[str, Any], origin: str, overrides: Mapping[tuple[str, ...], str] | None = None) -> Recipe:
    """Validate a recipe.

    Args:
        tree: the recipe as a mapping.
        origin: where it comes from; messages begin with it.
        overrides: each `--set` option by the location that it sets.

    Raises:
        UserError: for an unknown key or a wrong value.
    """
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(join_mistakes(explain_errors(error, Recipe), origin, overrides)) from error
    for source in recipe.sources:
        try:
            recipe.cleaning_config(source)
        except ValidationError as error:
            place = f"{origin}: clean of source {source.name!r}"
            raise UserError(join_mistakes(explain_errors(error, CleaningConfig), place)) from error
    return recipe


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = {
        key: _merge(tree[key], value) if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
        for key, value in changes.items()
    }
    return {**tree, **merged}
