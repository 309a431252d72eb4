"""Sampling in C: its filters are those of a twin in numpy, its draws as likely as they should be, and repeatable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.runtime.native import NativeContext, NativeModel
from kabrn_dist.utils.errors import UserError
from tests.support.text_models import write_text_model

# Tokens of the tokenizer, and rows of the head.
SIZE, ROWS = 257, 300


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeContext]:
    path = tmp_path_factory.mktemp("sampling") / "m.mkb"
    write_text_model(path, Tokenizer.of_bytes())
    with NativeModel(path) as model, model.context() as context:
        yield context


@pytest.fixture
def logits() -> np.ndarray:
    values = np.random.default_rng(3).normal(0, 2, ROWS).astype(np.float32)
    # No token has these.
    values[SIZE:] = 100
    return values


def sample_probabilities_naive(
    logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """The probability of each token, by sorting and cumulative sums."""
    order = np.argsort(-logits[:SIZE], kind="stable")
    scores = logits[order].astype(np.float64) / temperature
    weights = np.exp(scores - scores[0])
    weights[top_k or SIZE :] = 0
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    weights[before >= top_p] = 0
    weights[weights < min_p * weights[0]] = 0
    result = np.zeros(ROWS)
    result[order] = weights / weights.sum()
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 7},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 0.9, "min_p": 0.2},
        {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 3.0, "top_k": 1000, "top_p": 0.999},
        {"temperature": 1e-4},
        {"temperature": 1e4, "top_k": 3},
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_the_twin_says(
    context: NativeContext, logits: np.ndarray, settings: dict[str, Any]
) -> None:
    expected = sample_probabilities_naive(logits, **settings)
    context.reset()
    context.set_sampling(**{"top_k": 0, **settings}, seed=5)
    draws = 20000
    counts = np.bincount([context.sample(logits) for _ in range(draws)], minlength=ROWS)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    # All that is likely was drawn; no count is further than five standard deviations from its mean.
    assert set(np.flatnonzero(expected > 20 / draws)) <= set(np.flatnonzero(counts))
    deviation = np.sqrt(draws * expected * (1 - expected)) + 1
    assert (np.abs(counts - draws * expected) <= 5 * deviation).all()


def test_the_same_seed_draws_the_same_tokens(context: NativeContext, logits: np.ndarray) -> None:
    def draw(seed: int) -> list[int]:
        context.set_sampling(seed=seed)
        return [context.sample(logits) for _ in range(50)]

    first = draw(1)
    assert draw(1) == first and draw(2) != first and draw(2**63 - 1) != first
    # The random numbers of a state go on where they were.
    context.set_sampling(seed=1)
    assert [context.sample(logits) for _ in range(20)] == first[:20]
    state = context.state()
    assert [context.sample(logits) for _ in range(30)] == first[20:]
    context.set_sampling(temperature=3.0, seed=9)
    context.set_state(state)
    assert [context.sample(logits) for _ in range(30)] == first[20:]


def test_draws_are_the_same_on_every_machine(context: NativeContext) -> None:
    logits = ((np.arange(ROWS) * 37) % 101 / 16).astype(np.float32)
    context.reset()
    context.set_sampling(temperature=1.0, top_k=0, seed=42)
    assert [context.sample(logits) for _ in range(8)] == FIXED_DRAWS


# From the first machine that ran this test.
FIXED_DRAWS = [136, 234, 161, 60, 251, 90, 177, 19]


def test_the_likeliest_is_the_lowest_of_equal_ones(context: NativeContext) -> None:
    logits = np.zeros(ROWS, np.float32)
    context.reset()
    context.set_sampling(temperature=0)
    assert context.sample(logits) == 0
    logits[[17, 99, 280]] = [5, 5, 9]
    assert context.sample(logits) == 17
    context.set_sampling(temperature=1.0, top_k=1)
    assert {context.sample(logits) for _ in range(20)} == {17}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_number_is_never_drawn(context: NativeContext, temperature: float) -> None:
    context.reset()
    context.set_sampling(temperature=temperature, top_k=0, top_p=0.9, repetition_penalty=1.5)
    logits = np.full(ROWS, np.nan, np.float32)
    logits[5], logits[6], logits[SIZE:] = -np.inf, -3.0, 1.0
    assert {context.sample(logits) for _ in range(20)} == {6}
    logits[7] = np.inf
    assert {context.sample(logits) for _ in range(20)} == {7}
    logits[[6, 7]] = np.nan
    with pytest.raises(UserError, match="not finite"):
        context.sample(logits)


def test_recent_tokens_are_penalized_once(context: NativeContext) -> None:
    logits = np.full(ROWS, -1.0, np.float32)
    logits[[10, 11, 12]] = [4.0, 3.0, 2.5]
    context.reset()
    context.set_sampling(temperature=0, repetition_penalty=1.5, repetition_window=4)
    context.decode([10, 10, 10])
    # 4 / 1.5 once, not thrice.
    assert context.sample(logits) == 11
    context.decode([11, 50])
    # 10 is still within the window: 4 / 1.5 = 2.67 is more than 2.5.
    assert context.sample(logits) == 10
    context.decode([51, 52, 53])
    assert context.sample(logits) == 10
    context.decode([10, 12])
    assert context.sample(logits) == 11
    negative = np.full(ROWS, -1.0, np.float32)
    context.decode([0, 1, 2, 3])
    assert context.sample(negative) == 4
    context.reset()
    assert context.sample(negative) == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature -1: use 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"top_p": 0.0}, "top_p 0: use more than 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_window": 5000}, "repetition_window 5000: use 0 to 1024"),
    ],
)
def test_settings_without_meaning_are_refused(context: NativeContext, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        context.set_sampling(**setting)
