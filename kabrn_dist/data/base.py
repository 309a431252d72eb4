"""What a fine-tuning takes from its base's configuration: the model, the tokenizer, and the data to replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kabrn_dist.config import Config, DataConfig, ModelConfig
from kabrn_dist.config.file import load_config
from kabrn_dist.config.model_changes import describe_other_model
from kabrn_dist.data.index import TOKENIZER_NAME
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.utils.errors import UserError


def read_base_config(base: Path) -> Config:
    """Return the configuration of the run or export in `finetune.base`.

    Raises:
        UserError: if the folder is neither, or holds the run of an adapter, which has no model of its own.
    """
    if base.is_file():
        raise UserError(f"finetune.base {base}: is a file; name the folder of a run or of an export")
    if not base.is_dir():
        place = "" if base.is_absolute() else f" (in {Path.cwd()}, where the command was started)"
        raise UserError(f"finetune.base {base}{place}: no such folder; name the folder of a run or of an export")
    if not (base / "config.yaml").exists():
        run = next((parent for parent in base.parents[:2] if (parent / "config.yaml").exists()), None)
        remedy = f"set it to the run's folder, {run}" if run else "name the folder of a run or of an export"
        raise UserError(f"finetune.base {base}: holds no config.yaml, so neither a run nor an export; {remedy}")
    config = load_config(base / "config.yaml")
    is_run = (base / "checkpoints").is_dir()
    if is_run and config.finetune is not None and config.finetune.trains_adapter:
        merge = (
            f"export it first: mixkabrn export {base} --out FOLDER"
            if config.finetune.method == "ternary_lora"
            else f"set it to that model, {config.finetune.base}"
        )
        raise UserError(
            f"finetune.base {base}: trained an adapter ({config.finetune.method}) of another model, and holds none of "
            f"its own; {merge}"
        )
    return config


def read_base_model(base: Path) -> dict[str, Any]:
    """Return the section `model` of a base, as a fine-tuning leaves it out: quantized from its first step on.

    Raises:
        UserError: as `read_base_config`.
    """
    model = read_base_config(base).model.model_dump(mode="json")
    return model | {"quantize_start_step": 0, "quantize_warmup_steps": 0}


def check_base_model(base: Path, trained: ModelConfig, given: ModelConfig) -> None:
    """Check that a configuration describes the model of its base.

    Raises:
        UserError: with the keys that differ.
    """
    if differences := describe_other_model(trained, given):
        raise UserError(f"finetune.base {base}: {differences}; leave these keys out, and they are those of the base")


def check_base_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Check that the data of a fine-tuning has the tokenizer of its base.

    Args:
        config: The configuration of the fine-tuning.
        tokenizer: That of its data.

    Raises:
        UserError: if it is another one, so that the embedding would not match.
    """
    assert config.finetune is not None
    file = config.finetune.base / TOKENIZER_NAME
    # Runs of earlier versions have none; their shards do.
    if file.exists() and Tokenizer.load(file).sha256 != tokenizer.sha256:
        raise UserError(
            f"data.path {config.data.path}: its tokenizer is not that of finetune.base {config.finetune.base}, so the "
            f"embedding would not match; prepare the data with it: mixkabrn prepare --tokenizer {file}"
        )


def base_data_config(config: Config) -> DataConfig:
    """Return the section `data` of what a base was trained on: `finetune.base_data`, or what the base names.

    Sources have no end there: what is replayed is not used up. The length of the sequences is that of the fine-tuning.

    Args:
        config: The configuration of the fine-tuning.

    Raises:
        UserError: as `read_base_config`.
    """
    assert config.finetune is not None
    kept = {"sequence_length": config.data.sequence_length}
    cache = {"cache_dir": config.data.cache_dir, "cache_size_gb": config.data.cache_size_gb}
    if config.finetune.base_data is not None:
        return DataConfig(path=config.finetune.base_data, **kept, **cache)
    return read_base_config(config.finetune.base).data.model_copy(update=kept | cache | {"epochs": {}})
