"""Trains a byte-level BPE tokenizer, the same one every time for the same texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, Tokenizer
from kabrn_dist.utils.errors import UserError

# Merges settle long before this; more text only costs time and memory.
TRAINING_CHARACTERS = 32 << 20

_SMALLEST = 256 + 1 + 1


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError when `vocabulary` leaves no room for the bytes, the document token and one merge."""
    if vocab_size < _SMALLEST:
        raise UserError(
            f"--vocabulary {vocab_size}: too small; 256 bytes, the document token and a merge need "
            f"{_SMALLEST}. Use --tokenizer bytes for a vocabulary of 257."
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on the first `SAMPLE_CHARACTERS` of `texts`, read once, in what should be a random but fixed order.

    The result has fewer than `vocabulary` ids when the texts hold too few different pairs. Raises UserError
    when `vocabulary` is too small.
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
    left = TRAINING_CHARACTERS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
