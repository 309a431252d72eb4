"""Train a byte-level BPE tokenizer; the same texts always give the same tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, Tokenizer
from kabrn_dist.utils.errors import UserError

# The merges converge long before this; more text only costs time and memory.
TRAINING_CHARACTERS = 32 << 20

_MIN_VOCAB_SIZE = 256 + 1 + 1


def check_vocab_size(vocab_size: int) -> None:
    """Check that there is room for the bytes, the document token and one merge.

    Raises:
        UserError: `vocab_size` is too small.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise UserError(
            f"--vocabulary {vocab_size}: too small; 256 bytes, the document token and a merge need "
            f"{_MIN_VOCAB_SIZE}; use --tokenizer bytes for a vocabulary of 257"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on the first `TRAINING_CHARACTERS` of some texts.

    Args:
        texts: texts in a random but fixed order; read once.
        vocab_size: number of ids.

    Returns:
        The tokenizer. It has fewer ids if the texts hold too few different pairs.

    Raises:
        UserError: `vocab_size` is too small.
    """
    check_vocab_size(vocab_size)
    bpe = BpeTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_sample(texts), trainer)
    return Tokenizer(bpe.to_str(pretty=True).encode())


def _sample(texts: Iterable[str]) -> Iterator[str]:
    remaining = TRAINING_CHARACTERS
    for text in texts:
        yield text[:remaining]
        remaining -= len(text)
        if remaining <= 0:
            return
