"""Tokens drawn from logits by numbers that depend on a seed alone, and texts that end at stop strings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kabrn_dist.evaluation.requests import Continuation, GenerateRequest
from kabrn_dist.evaluation.tokens import TextEncoder
from kabrn_dist.inference.sampling import check_sampling
from kabrn_dist.utils.errors import UserError


def check_generate_request(request: GenerateRequest) -> None:
    """Check that what is asked for has a meaning.

    Raises:
        UserError: for the first value that has none.
    """
    check_sampling(request.prompt, request.max_tokens, request.temperature, 0, request.seed)
    if not 0 < request.top_p <= 1:
        raise UserError(f"top_p {request.top_p:g}: a probability; use 1 for all tokens, or less, such as 0.95")
    if request.num_samples < 1:
        raise UserError(f"num_samples {request.num_samples}: ask for at least one continuation")
    if "" in request.stop:
        raise UserError("stop: an empty string ends every text; leave it out")


def distinct_samples(request: GenerateRequest) -> int:
    """Return how many of a request's continuations can differ: the likeliest tokens are the same ones each time."""
    return request.num_samples if request.temperature else 1


def draw_one(logits: NDArray[np.float32], temperature: float, top_p: float, uniform: float) -> int:
    """Draw a token; see `draw_tokens` in torch, which is this for many rows.

    Args:
        logits: [C].
        temperature: 0 takes the likeliest token.
        top_p: Probability that the tokens to draw among, the likeliest ones, have together.
        uniform: In [0,1), decides the draw.
    """
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-weights, kind="stable") if top_p < 1 else np.arange(len(weights))
    sums = np.cumsum(weights[order])
    total = sums[-1]
    if top_p < 1:
        total = sums[min(int(np.searchsorted(sums, top_p * total)), len(sums) - 1)]
    place = int(np.searchsorted(sums, uniform * total, side="right"))
    return int(order[min(place, len(order) - 1)])


class SampledText:
    """One continuation that is being generated.

    Args:
        request: What is asked for.
        sample: Its number among the request's continuations; with the request's seed it decides all draws.
        tokenizer: Of the model.
    """

    def __init__(self, request: GenerateRequest, sample: int, tokenizer: TextEncoder) -> None:
        self.request, self._tokenizer = request, tokenizer
        self._random = np.random.default_rng([request.seed, sample])
        self._stops = [stop.encode() for stop in request.stop]
        self._text = bytearray()
        self.num_tokens = 0
        self.finish_reason = "" if request.max_tokens else "length"

    def uniform(self) -> float:
        """Return the number that decides the next draw; 0 where nothing is drawn."""
        return float(self._random.random()) if self.request.temperature else 0.0

    def push(self, token: int) -> bool:
        """Append a token; return whether the text has ended with it."""
        if token == self._tokenizer.document_token:
            self.finish_reason = "stop"
            return True
        self.num_tokens += 1
        piece = self._tokenizer.token_bytes(token)
        longest = max(map(len, self._stops), default=0)
        start = max(0, len(self._text) - longest + 1)
        self._text += piece
        ends = [place for stop in self._stops if (place := self._text.find(stop, start)) >= 0]
        if ends:
            del self._text[min(ends) :]
            self.finish_reason = "stop"
        elif self.num_tokens >= self.request.max_tokens:
            self.finish_reason = "length"
        return bool(self.finish_reason)

    def result(self) -> Continuation:
        """Return the continuation; bytes at its end that are no whole character are U+FFFD."""
        return Continuation(self._text.decode("utf-8", "replace"), self.num_tokens, self.finish_reason)
