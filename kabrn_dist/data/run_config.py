"""The configuration of a run, completed from its data and its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kabrn_dist.config import Config, DataConfig
from kabrn_dist.config.file import load_config
from kabrn_dist.data.base import check_base_model, read_base_config, read_base_model
from kabrn_dist.data.locations import check_locations
from kabrn_dist.data.remote import open_shard_set


def load_run_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=c` overrides and validate; what is left out and known from elsewhere is completed.

    That is the vocabulary, which is that of the shards, and in a fine-tuning the model, which is that of the base.

    Args:
        path: the file.
        overrides: values for keys, as `--set` gives them; the last one of a key counts.

    Raises:
        UserError: for a missing file, a wrong configuration, or shards or a base that cannot be read.
    """
    config = load_config(path, overrides, read_vocab_size, read_base_model)
    if config.finetune is not None:
        check_base_model(config.finetune.base, read_base_config(config.finetune.base).model, config.model)
    return config


def read_vocab_size(data: DataConfig) -> int:
    """Return the number of tokens of a configuration's shards, for a model whose `vocab_size` is left out.

    Raises:
        UserError: if the shard set cannot be read.
    """
    check_locations(data)
    shards = open_shard_set(data.path, data.cache_dir, data.cache_size_gb)
    return max(shards.index.vocabulary, shards.tokenizer().vocab_size)
