"""What a task asks of a model, and what a model answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GenerateRequest:
    """A text to continue.

    Attributes:
        prompt: Text at the beginning of a document.
        max_tokens: Maximum number of tokens of a continuation.
        stop: Strings that end a continuation; they are not part of it.
        num_samples: Number of continuations, each drawn by its own seed.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_p: Probability that the tokens to draw among have together; 1 for all.
        seed: Of the draws.
    """

    prompt: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class ContinuationRequest:
    """A continuation whose probability is asked for.

    Attributes:
        context: Text before it, at the beginning of a document; "" for none.
        continuation: The text, not empty.
    """

    context: str
    continuation: str


@dataclass(frozen=True)
class TextRequest:
    """A document whose every token is scored, the model's state carried over its whole length.

    Attributes:
        text: The document.
    """

    text: str


Request = GenerateRequest | ContinuationRequest | TextRequest


class Continuation(NamedTuple):
    """One continuation that was generated.

    Attributes:
        text: Its text, without what ended it.
        num_tokens: Tokens that were generated.
        finish_reason: "stop" by a stop string or the document's end, "length" at `max_tokens`.
    """

    text: str
    num_tokens: int
    finish_reason: str


class ContinuationScore(NamedTuple):
    """Probability of a continuation.

    Attributes:
        logprob: log p(continuation | context), in nats.
        num_tokens: Tokens of the continuation.
        num_bytes: UTF-8 bytes of the continuation.
        is_greedy: Whether each of its tokens was the likeliest.
    """

    logprob: float
    num_tokens: int
    num_bytes: int
    is_greedy: bool


class TextScore(NamedTuple):
    """Losses along a document.

    Attributes:
        nats: [T] fp64, −log p of each token given all before it.
        num_bytes: [T] int64, UTF-8 bytes of text that each token stands for.
    """

    nats: NDArray[np.float64]
    num_bytes: NDArray[np.int64]


Answer = list[Continuation] | ContinuationScore | TextScore


class EvaluatedModel(Protocol):
    """A model that answers requests. Requests of a call are of one kind; answers come in the order they are ready.

    Attributes:
        name: Of the model, for tables.
        fingerprint: Hash of weights and tokenizer: results of another one are not continued.
    """

    name: str
    fingerprint: str

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of an ordinary text."""

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[tuple[int, list[Continuation]]]:
        """Yield (index of the request, its continuations), as they are finished."""

    def score_continuations(self, requests: Sequence[ContinuationRequest]) -> Iterator[tuple[int, ContinuationScore]]:
        """Yield (index of the request, its score)."""

    def score_texts(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, TextScore]]:
        """Yield (index of the request, its losses)."""
