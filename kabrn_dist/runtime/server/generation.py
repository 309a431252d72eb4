"""One answer: the prompt is read on top of the best state that is kept, and continued token by token."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kabrn_dist.runtime.native import NativeContext, NativeModel
from kabrn_dist.runtime.server.adapters import BASE_NUMBER, ServedAdapter
from kabrn_dist.runtime.server.answer_text import AnswerText
from kabrn_dist.runtime.server.errors import RequestError
from kabrn_dist.runtime.server.plain_format import CHECKPOINT_MIN_TOKENS, Prompt
from kabrn_dist.runtime.server.request_fields import GenerationRequest
from kabrn_dist.runtime.server.state_cache import StateCache

# Between two pieces a client that has gone is noticed.
PREFILL_TOKENS = 256


class GenerationCancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Delta:
    """A piece of an answer; text is never "" ."""

    text: str


@dataclass(frozen=True)
class Finish:
    """The end of an answer.

    Attributes:
        reason: "stop" or "length".
        prompt_tokens: Number of tokens of the prompt.
        cached_tokens: Of these, the number that a kept state had read.
        completion_tokens: Number of tokens of the answer.
        prompt_seconds: Time that the prompt took.
        answer_seconds: Time that the answer took, from the prompt's end.
    """

    reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_seconds: float
    answer_seconds: float


@dataclass(eq=False)
class GenerationJob:
    """An answer that is wanted.

    Attributes:
        request: How to answer.
        make_prompt: Returns what to read; may raise RequestError.
        deliver: Gets each Delta, and then one Finish or RequestError; called by a worker.
        deadline: When it must be there, by time.monotonic().
        adapter: Who answers; None: the model without adapters.
        cancelled: Set when nobody waits any more.
    """

    request: GenerationRequest
    make_prompt: Callable[[], Prompt]
    deliver: Callable[[Delta | Finish | RequestError], None]
    deadline: float
    adapter: ServedAdapter | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Return if the work is still wanted.

        Raises:
            GenerationCancelled: if nobody waits for it.
            RequestError: if it has taken too long.
        """
        if self.cancelled.is_set():
            raise GenerationCancelled
        if time.monotonic() > self.deadline:
            raise timeout_error()


def timeout_error() -> RequestError:
    """Return the error of a request that has taken too long."""
    return RequestError("the answer took too long; ask for fewer tokens, or try again", status=504, code="timeout")


class Generator:
    """Answers with one context; belongs to one thread.

    Args:
        model: The model.
        context: A context of it.
        cache: States of conversations, which all generators share.
        context_tokens: Room in the context for models with attention layers; 0: any length.
    """

    def __init__(self, model: NativeModel, context: NativeContext, cache: StateCache, context_tokens: int) -> None:
        self._model, self._context, self._cache, self._room = model, context, cache, context_tokens
        self._ends: dict[int, bool] = {model.info.document_token: True}
        self._adapter: ServedAdapter | None = None

    def run(self, job: GenerationJob) -> None:
        """Answer, and keep the states that the next turn may begin with.

        Raises:
            GenerationCancelled: if nobody waits any more.
            RequestError: if it cannot be answered.
        """
        job.check()
        start = time.perf_counter()
        prompt = job.make_prompt()
        self._use(job.adapter)
        self._check_room(prompt, job.request.max_tokens)
        logits, cached = self._read_prompt(prompt, job)
        middle = time.perf_counter()
        answer = AnswerText((*prompt.stops, *job.request.stops), prompt.trim)
        drawn, read, reason = self._write(answer, logits, job)
        rest = answer.finish()
        if rest:
            job.deliver(Delta(rest))
        end = time.perf_counter()
        finish = Finish(reason, len(prompt.ids), cached, drawn, middle - start, end - middle)
        known = prompt.ids + read
        wanted = known if prompt.follow is None else prompt.follow(answer.text)
        # Before the end is told: the client may ask its next question at once, and another worker may answer it.
        with contextlib.suppress(RequestError):
            self._keep_follow(wanted, known, job)
        job.deliver(finish)

    def _use(self, adapter: ServedAdapter | None) -> None:
        """Have the context answer with an adapter. Its state is that of another until it is restored."""
        if adapter is not self._adapter:
            self._context.set_adapters([] if adapter is None else [(adapter.native, adapter.weight)])
            self._adapter = adapter

    def _check_room(self, prompt: Prompt, max_tokens: int) -> None:
        total = len(prompt.ids) + max_tokens
        if self._room and total > self._room:
            raise RequestError(
                f"the prompt has {len(prompt.ids)} tokens, which leaves no room for {max_tokens} more in "
                f"{self._room}; shorten it, lower max_tokens, or start the server with --context-tokens {total}",
                code="context_length_exceeded",
            )

    def _read_prompt(self, prompt: Prompt, job: GenerationJob) -> tuple[NDArray[np.float32], int]:
        """Read the prompt on top of a kept state; return the last token's logits, and how many were not read."""
        last = len(prompt.ids) - 1
        # The last token is always read: its logits are wanted.
        cached = self._restore(prompt.ids[:last])
        self._context.set_sampling(**job.request.sampling)
        place = cached
        for mark in sorted({*prompt.marks, last}):
            if place < mark <= last:
                self._read(prompt.ids[place:mark], job)
                self._keep(prompt.ids[:mark])
                place = mark
        logits = self._context.decode(prompt.ids[last:])
        assert logits is not None
        return logits, cached

    def _write(self, answer: AnswerText, logits: NDArray[np.float32], job: GenerationJob) -> tuple[int, list[int], str]:
        """Draw tokens until the answer ends; return their number, those that were read, and why it ends."""
        drawn, read = 0, list[int]()
        while True:
            job.check()
            token = self._context.sample(logits)
            if self._ends_answer(token):
                return drawn, read, "stop"
            drawn += 1
            shown = answer.add(self._model.token_bytes(token))
            if shown:
                job.deliver(Delta(shown))
            if answer.stopped:
                return drawn, read, "stop"
            if drawn == job.request.max_tokens:
                return drawn, read, "length"
            following = self._context.decode([token])
            assert following is not None
            logits = following
            read.append(token)

    def _ends_answer(self, token: int) -> bool:
        """Whether a token is that of the document, or another special one."""
        found = self._ends.get(token)
        if found is None:
            content = self._model.token_bytes(token)
            found = self._model.tokenize(content, special=True) == [token] != self._model.tokenize(content)
            self._ends[token] = found
        return found

    def _keep_follow(self, ids: list[int], known: list[int], job: GenerationJob) -> None:
        """Keep the state that has read `ids`, where `known` has been read.

        Raises:
            GenerationCancelled: if nobody waits any more.
            RequestError: if time is up.
        """
        if self._room and len(ids) > self._room:
            return
        place = len(known)
        if ids[:place] != known:
            # The drawn tokens are not those of the answer's text, which the next turn holds.
            place = self._restore(ids)
        self._read(ids[place:], job)
        self._keep(ids)

    def _restore(self, ids: Sequence[int]) -> int:
        """Go to the kept state that has read most of `ids`; return how many it has."""
        cached, state = self._cache.find(self._owner, ids)
        if state:
            self._context.set_state(state)
        else:
            self._context.reset()
        return cached

    @property
    def _owner(self) -> int:
        return BASE_NUMBER if self._adapter is None else self._adapter.number

    def _keep(self, ids: Sequence[int]) -> None:
        # Nobody can ask for the state of an adapter that has been unloaded.
        if len(ids) >= CHECKPOINT_MIN_TOKENS and (self._adapter is None or self._adapter.loaded):
            self._cache.store(self._owner, ids, self._context.state())

    def _read(self, ids: Sequence[int], job: GenerationJob) -> None:
        for start in range(0, len(ids), PREFILL_TOKENS):
            job.check()
            self._context.decode(ids[start : start + PREFILL_TOKENS], logits=False)
