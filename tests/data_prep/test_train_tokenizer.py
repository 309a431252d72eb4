"""Training a tokenizer on texts that come one by one."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from data_prep import train_tokenizer as training
from kabrn_dist.utils.errors import UserError


def test_an_iterator_is_read_once_and_no_further_than_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "TRAINING_CHARACTERS", 50_000)
    taken = itertools.count()

    def texts() -> itertools.chain[str]:
        words = ["river", "bread", "über", "漢字漢字", "bell "]
        return itertools.chain.from_iterable(
            [f"{words[n % 5]} {words[n % 3]} {n % 97} " * 10] for n in iter(lambda: next(taken), 1_000_000)
        )

    first = training.train_tokenizer(texts(), 400)
    assert next(taken) < 2_000
    taken = itertools.count()
    second = training.train_tokenizer(list(itertools.islice(texts(), 2_000)), 400)
    assert first.sha256 == second.sha256
    assert first.decode(first.encode("river über 漢 \x00")) == "river über 漢 \x00"


def test_ordinary_texts_are_not_divided() -> None:
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    minified = "function(a,b){return a+b};" * 400
    for text in ("a b  c\n" * 5000, "漢字、かな。" * 900, minified, "x" * 512, " " * 512, ""):
        assert list(training.divide_long_words(text, splitter)) == [text]


def test_long_words_are_divided_and_nothing_is_lost() -> None:
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in ("a " + "é" * 3000 + " z", "漢" * 2000, "\n" * 5000, "ab\t" + "=" * 1025 + "c,d " + "1" * 600):
        pieces = list(training.divide_long_words(text, splitter))
        assert "".join(pieces) == text and len(pieces) > 2
        words = [word for piece in pieces for word, _ in splitter.pre_tokenize_str(piece)]
        assert max(len(word.encode("utf-8")) for word in words) <= 6 * 512


@pytest.mark.slow
@pytest.mark.parametrize("letters", ["ACGT", "é漢"])
def test_training_takes_time_in_proportion_to_the_text(letters: str) -> None:
    random = np.random.default_rng(1)
    text = "".join(random.choice(list(letters), 100_000))
    start = time.process_time()
    training.train_tokenizer(iter([text, "word " * 1000]), 500)
    # By the square of the length it was more than ten seconds.
    assert time.process_time() - start < 4


def test_a_vocabulary_that_no_memory_holds_is_refused() -> None:
    for size in (99_999_999_999, 2**70, (1 << 22) + 1):
        with pytest.raises(UserError, match=f"--vocabulary {size}: too large"):
            training.train_tokenizer(iter(["text"]), size)


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(UserError, match="--vocabulary 257"):
        training.train_tokenizer(iter(["text"]), 257)
