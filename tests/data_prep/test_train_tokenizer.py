"""Training a tokenizer on texts that come one by one."""

from __future__ import annotations

import itertools

import pytest

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


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(UserError, match="--vocabulary 257"):
        training.train_tokenizer(iter(["text"]), 257)
