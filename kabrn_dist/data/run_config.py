"""The configuration of a run, completed from its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kabrn_dist.config import Config, DataConfig
from kabrn_dist.config.file import load_config
from kabrn_dist.data.locations import check_locations
from kabrn_dist.data.remote import open_shard_set


def load_run_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=c` overrides and validate; a vocabulary that is left out is that of the shards.

    Args:
        path: the file.
        overrides: values for keys, as `--set` gives them; the last one of a key counts.

    Raises:
        UserError: for a missing file, a wrong configuration, or shards that cannot be read.
    """
    return load_config(path, overrides, read_vocab_size)


def read_vocab_size(data: DataConfig) -> int:
    """Return the number of tokens of a configuration's shards, for a model whose `vocab_size` is left out.

    Raises:
        UserError: if the shard set cannot be read.
    """
    check_locations(data)
    shards = open_shard_set(data.path, data.cache_dir, data.cache_size_gb)
    return max(shards.index.vocabulary, shards.tokenizer().vocab_size)
