"""The data of a run: both splits, opened and checked before any process group forms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kabrn_dist.config import Config
from kabrn_dist.data.batches import Batches
from kabrn_dist.data.tokenizer import load_tokenizer
from kabrn_dist.errors import UserError


@dataclass(frozen=True)
class Splits:
    """Attributes:
    train, validation: the sequences.
    bytes_per_token: [vocabulary] int64, UTF-8 bytes that each token stands for.
    gzip_bits_per_byte: what `gzip -9` makes of the validation text: a yardstick.
    """

    train: Batches
    validation: Batches
    bytes_per_token: np.ndarray
    gzip_bits_per_byte: float


def open_splits(config: Config) -> Splits:
    """Open both splits and check them against the model.

    Raises:
        UserError: for missing or damaged shards, a wrong tokenizer, or a vocabulary larger than the model's.
    """
    data = config.data
    train = Batches(Path(data.path), "train", data.sequence_length, config.run.seed)
    validation = Batches(Path(data.path), "validation", data.sequence_length, config.run.seed, ordered=False)
    tokenizer = load_tokenizer(Path(data.path), train.index)
    if tokenizer.vocabulary > config.model.vocabulary:
        raise UserError(
            f"model.vocabulary {config.model.vocabulary} is smaller than the {tokenizer.vocabulary} tokens of "
            f"{data.path}/tokenizer.json; set model.vocabulary to at least {tokenizer.vocabulary}"
        )
    split = train.index.validation
    bits = 8 * (split.gzip9_bytes or 0) / max(1, split.text_bytes)
    return Splits(train, validation, tokenizer.bytes_per_token(), bits)
