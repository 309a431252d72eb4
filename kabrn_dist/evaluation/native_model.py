"""A model file that answers the requests of tasks, by the runtime in C and without torch: one text after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from kabrn_dist.evaluation.draw import SampledText, check_generate_request, distinct_samples, draw_one
from kabrn_dist.evaluation.requests import (
    Continuation,
    ContinuationRequest,
    ContinuationScore,
    GenerateRequest,
    TextRequest,
    TextScore,
)
from kabrn_dist.evaluation.tokens import common_prefix, group_by_context, prompt_tokens, split_tokens
from kabrn_dist.runtime.native import NativeContext, NativeModel
from kabrn_dist.utils.errors import UserError


class NativeEncoder:
    """The tokenizer of a model file.

    Args:
        model: The file.
    """

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        self.document_token, self.vocab_size = model.info.document_token, model.info.tokenizer_size

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [self._model.tokenize(text) for text in texts]

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of one id."""
        return self._model.token_bytes(id)


class NativeEvaluatedModel:
    """An `EvaluatedModel` of a model file, which is to be closed at the end.

    Args:
        path: The file, whose hash is checked.
        name: See `EvaluatedModel`; None for that of the file.
        threads: Threads that work on a token.

    Raises:
        UserError: for a file that is missing, damaged, foreign or of a newer version.
    """

    def __init__(self, path: Path | str, name: str | None = None, threads: int = 1) -> None:
        self._model = NativeModel(path)
        self._threads, self._encoder = threads, NativeEncoder(self._model)
        self.name = Path(path).stem if name is None else name
        self.fingerprint = self._model.info.sha256

    def __enter__(self) -> NativeEvaluatedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file."""
        self._model.close()

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of an ordinary text."""
        return len(self._model.tokenize(text))

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[tuple[int, list[Continuation]]]:
        """Yield (number of the request, its continuations), in the order of the requests.

        Raises:
            UserError: for a request without a meaning, or a model whose outputs are not finite.
        """
        for request in requests:
            check_generate_request(request)
        prompts = prompt_tokens(self._encoder, [request.prompt for request in requests])
        room = max((len(p) + request.max_tokens for p, request in zip(prompts, requests, strict=True)), default=1)
        with self._open(room) as context:
            start = _Start(context, prompts)
            for number, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
                logits = start.read(prompt)
                distinct = distinct_samples(request)
                after = context.state() if distinct > 1 else b""
                found = []
                for sample in range(distinct):
                    if sample:
                        context.set_state(after)
                    found.append(self._continue(context, logits, SampledText(request, sample, self._encoder)))
                yield number, found * (request.num_samples // distinct)

    def _continue(self, context: NativeContext, logits: NDArray[np.float32], text: SampledText) -> Continuation:
        while not text.finish_reason:
            choices, request = logits[: self._encoder.vocab_size], text.request
            token = draw_one(choices, request.temperature, request.top_p, text.uniform())
            if not text.push(token):
                logits = _read(context, [token])
        return text.result()

    def score_continuations(self, requests: Sequence[ContinuationRequest]) -> Iterator[tuple[int, ContinuationScore]]:
        """Yield (number of the request, its score); a context that several continuations share is read once.

        Raises:
            UserError: for a continuation without text, or a model whose outputs are not finite.
        """
        split = split_tokens(self._encoder, requests)
        groups = group_by_context(split)
        with self._open(max((len(a) + len(b) for a, b in split), default=1)) as context:
            start = _Start(context, list(groups))
            for tokens, numbers in groups.items():
                logits = start.read(tokens)
                after = context.state() if len(numbers) > 1 else b""
                for place, number in enumerate(numbers):
                    if place:
                        context.set_state(after)
                    continuation = split[number].continuation
                    nats, is_greedy = self._score(context, logits, continuation)
                    num_bytes = len(requests[number].continuation.encode())
                    yield number, ContinuationScore(-float(nats.sum()), len(continuation), num_bytes, is_greedy)

    def score_texts(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, TextScore]]:
        """Yield (number of the request, its losses), in the order of the requests.

        Raises:
            UserError: for a model whose outputs are not finite.
        """
        documents = prompt_tokens(self._encoder, [request.text for request in requests])
        with self._open(max(map(len, documents), default=1)) as context:
            for number, (first, *rest) in enumerate(documents):
                context.reset()
                nats, _ = self._score(context, _read(context, [first]), rest)
                num_bytes = np.array([len(self._encoder.token_bytes(token)) for token in rest], np.int64)
                yield number, TextScore(nats, num_bytes)

    def _score(
        self, context: NativeContext, logits: NDArray[np.float32], tokens: Sequence[int]
    ) -> tuple[NDArray[np.float64], bool]:
        """−log p [T] of tokens that follow, and whether each was the likeliest; all but the last one are read."""
        nats, is_greedy = np.empty(len(tokens)), True
        for place, token in enumerate(tokens):
            wide = logits.astype(np.float64)
            most = wide.max()
            nats[place] = most + np.log(np.exp(wide - most).sum()) - wide[token]
            is_greedy &= int(logits[: self._encoder.vocab_size].argmax()) == token
            if place + 1 < len(tokens):
                logits = _read(context, [token])
        return nats, is_greedy

    def _open(self, max_tokens: int) -> NativeContext:
        return self._model.context(self._threads, max_tokens)


class _Start:
    """The tokens that all prompts begin with, read once."""

    def __init__(self, context: NativeContext, prompts: Sequence[Sequence[int]]) -> None:
        self._context, self._count, self._state = context, common_prefix(prompts), b""
        if self._count:
            context.decode(prompts[0][: self._count], logits=False)
            self._state = context.state()

    def read(self, prompt: Sequence[int]) -> NDArray[np.float32]:
        """Read a prompt from its beginning, whatever was read before, and return the logits after it."""
        if self._count:
            self._context.set_state(self._state)
        else:
            self._context.reset()
        return _read(self._context, prompt[self._count :])


def _read(context: NativeContext, tokens: Sequence[int]) -> NDArray[np.float32]:
    logits = context.decode(tokens)
    assert logits is not None
    if not np.isfinite(logits).all():
        raise UserError("the model's outputs are not finite: its training has diverged; use an earlier checkpoint")
    return logits
