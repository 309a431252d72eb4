"""Train a byte-level BPE tokenizer; the same texts always give the same tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, Tokenizer
from kabrn_dist.utils.errors import UserError

# The merges converge long before this; more text only costs time and memory.
TRAINING_CHARACTERS = 32 << 20

_MIN_VOCAB_SIZE = 256 + 1 + 1
# The trainer reserves memory for all ids at once. Published vocabularies have some hundred thousand.
_MAX_VOCAB_SIZE = 1 << 22
# The trainer takes time with the square of the length of a word. Words of languages are far shorter.
_MAX_WORD_CHARACTERS = 512
_LONG_RUN = re.compile(rf"\S{{{_MAX_WORD_CHARACTERS},}}|\s{{{_MAX_WORD_CHARACTERS},}}")


def check_vocab_size(vocab_size: int) -> None:
    """Check that there is room for the bytes, the document token and one merge, and no more than can be trained.

    Raises:
        UserError: `vocab_size` is too small or too large.
    """
    if vocab_size > _MAX_VOCAB_SIZE:
        raise UserError(f"--vocabulary {vocab_size}: too large; give at most {_MAX_VOCAB_SIZE}")
    if vocab_size < _MIN_VOCAB_SIZE:
        raise UserError(
            f"--vocabulary {vocab_size}: too small; 256 bytes, the token between documents and a merge need "
            f"{_MIN_VOCAB_SIZE}; use --tokenizer bytes for a vocabulary of 257"
        )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, show_progress: bool = False, reserved: Sequence[str] = ()
) -> Tokenizer:
    """Train on the first `TRAINING_CHARACTERS` of some texts.

    Args:
        texts: texts in a random but fixed order; read once.
        vocab_size: number of ids.
        show_progress: whether to show the library's bars on stderr, which must be a terminal.
        reserved: special tokens besides that of the document.

    Returns:
        The tokenizer. It has fewer ids if the texts hold too few different pairs.

    Raises:
        UserError: `vocab_size` is too small or too large.
    """
    check_vocab_size(vocab_size)
    if vocab_size < _MIN_VOCAB_SIZE + len(reserved):
        raise UserError(
            f"--vocabulary {vocab_size}: too small; with {', '.join(reserved)} reserved it needs "
            f"{_MIN_VOCAB_SIZE + len(reserved)}"
        )
    bpe = BpeTokenizer(models.BPE())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = splitter
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_TOKEN, *reserved],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    pieces = (piece for text in _sample(texts) for piece in divide_long_words(text, splitter))
    bpe.train_from_iterator(pieces, trainer)
    return Tokenizer(bpe.to_str(pretty=True).encode())


def divide_long_words(text: str, splitter: pre_tokenizers.PreTokenizer) -> Iterator[str]:
    """Yield `text` in pieces whose words have at most 512 characters.

    Texts without longer words come whole, so their tokenizer does not change.

    Args:
        text: the text.
        splitter: what divides texts into words.
    """
    start = 0
    for run in _LONG_RUN.finditer(text):
        for word, (first, last) in splitter.pre_tokenize_str(run[0]):
            if len(word) <= _MAX_WORD_CHARACTERS:
                continue
            for cut in range(run.start() + first, run.start() + last, _MAX_WORD_CHARACTERS):
                yield text[start:cut]
                start = cut
    yield text[start:]


def _sample(texts: Iterable[str]) -> Iterator[str]:
    remaining = TRAINING_CHARACTERS
    for text in texts:
        yield text[:remaining]
        remaining -= len(text)
        if remaining <= 0:
            return
