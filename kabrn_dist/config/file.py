"""The configuration as a YAML file: read it, override values, explain what is wrong with it, write it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kabrn_dist.config.data import DataConfig
from kabrn_dist.config.migrate import CURRENT_VERSION, RENAMED_KEYS, detect_version, migrate, rename_hint
from kabrn_dist.config.run import Config
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.mistakes import Mistake, explain_errors, join_mistakes
from kabrn_dist.utils.yaml_section import read_mapping, set_value

logger = logging.getLogger(__name__)

EXAMPLE_OVERRIDE = "section.key=value, e.g. training.steps=100"


def load_config(
    path: Path | str,
    overrides: Sequence[str] = (),
    find_vocab_size: Callable[[DataConfig], int] | None = None,
    find_base_model: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Config:
    """Read a YAML file, apply `a.b=c` overrides and validate.

    A file of an earlier version is converted, and a line is logged that names it.

    Args:
        path: the file.
        overrides: values for keys of the current version, as `--set` gives them; the last one of a key counts.
        find_vocab_size: where `model.vocab_size` is left out, gives its value, such as that of the shards' tokenizer.
        find_base_model: gives the section `model` of the run or export in a folder, `finetune.base`; what the file
            leaves out of its own section is taken from there.

    Returns:
        The configuration, complete with defaults.

    Raises:
        UserError: for a missing file, bad YAML, an unknown key (with the nearest known one) or a wrong value.
    """
    tree = read_mapping(Path(path), "configs/tiny.yaml is a place to start", "a mapping of sections such as `model:`")
    tree = _migrate(tree, str(path))
    given: dict[tuple[str, ...], str] = {}
    for override in overrides:
        _refuse_old_key(override)
        given[set_value(tree, override, EXAMPLE_OVERRIDE, Config)] = override
    if find_base_model is not None:
        _complete_model(tree, find_base_model)
    if find_vocab_size is not None:
        _complete_vocab_size(tree, find_vocab_size)
    return _validate(tree, str(path), given)


def parse_config(tree: Any, source: str) -> Config:
    """Validate a configuration of any version that was kept as JSON, such as the one in a checkpoint.

    Args:
        tree: the configuration's mapping.
        source: where it comes from; messages begin with it.

    Raises:
        UserError: for a tree that is no configuration, a version that is not known, or a wrong value.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{source}: not a mapping of sections; use a file that training wrote")
    return _validate(_migrate(tree, source), source, {})


def dump_config(config: Config) -> str:
    """Return the complete configuration as YAML, in the order of the sections."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _migrate(tree: dict[str, Any], source: str) -> dict[str, Any]:
    try:
        current = migrate(tree)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    version = detect_version(tree)
    # All ranks of a run read the same file.
    if version != CURRENT_VERSION and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "%s: the configuration is of version %s and was converted to version %s",
            source,
            version,
            CURRENT_VERSION,
        )
    return current


def _complete_model(tree: dict[str, Any], find_base_model: Callable[[Path], Mapping[str, Any]]) -> None:
    finetune, model = tree.get("finetune"), tree.get("model")
    base = finetune.get("base") if isinstance(finetune, dict) else None
    # What is wrong with either section is told with all other mistakes.
    if isinstance(base, str) and base and (model is None or isinstance(model, dict)):
        tree["model"] = _overlay(find_base_model(Path(base)), model or {})


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of both mappings, and of the mappings in them; those of `above` where both have one."""
    return {**below} | {
        key: _overlay(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }


def _complete_vocab_size(tree: dict[str, Any], find_vocab_size: Callable[[DataConfig], int]) -> None:
    model = tree.get("model")
    if not isinstance(model, dict) or model.get("vocab_size") is not None:
        return
    try:
        data = DataConfig.model_validate(tree.get("data"))
    except ValidationError:
        # Told with all other mistakes; that the vocabulary is left out is none.
        model["vocab_size"] = 1
        return
    model["vocab_size"] = find_vocab_size(data)


def _refuse_old_key(override: str) -> None:
    key, equals, value = override.partition("=")
    if hint := rename_hint(key, equals + value):
        raise UserError(f"--set {override!r}: {key} {hint}")


def _validate(tree: dict[str, Any], source: str, overrides: dict[tuple[str, ...], str]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        mistakes = [_name_new_key(mistake) for mistake in explain_errors(error, Config)]
        raise UserError(join_mistakes(mistakes, source, overrides)) from None


def _name_new_key(mistake: Mistake) -> Mistake:
    """An unknown key of version 1 in a file of the current version has a better remedy than the nearest key."""
    key = ".".join(mistake.location)
    if key in RENAMED_KEYS and mistake.text.startswith("unknown key"):
        return mistake._replace(text=f"unknown key {key!r}; it {rename_hint(key)}")
    return mistake
