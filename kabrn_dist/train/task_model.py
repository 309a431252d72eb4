"""The model in training as one that answers the requests of tasks, in every parallel layout.

Every answer comes from forward passes over whole texts, one for each token that is written: they need no decoding
state, so they work wherever experts, weights and slices of sequences lie. The ranks share the texts: each sequence
group has its own rows, and all make the same passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kabrn_dist.backend.engine import Engine
from kabrn_dist.data.dataset import Batch, sequence_slice
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.evaluation.draw import SampledText, draw_one
from kabrn_dist.evaluation.requests import (
    Continuation,
    ContinuationRequest,
    ContinuationScore,
    GenerateRequest,
    TextRequest,
    TextScore,
)
from kabrn_dist.evaluation.tokens import prompt_tokens, split_tokens
from kabrn_dist.utils.errors import UserError


class ScoringStopped(Exception):
    """The ranks have agreed to stop."""


class _ScoredRow(NamedTuple):
    """Losses [T−1] fp64 of a row's tokens but the first, and whether each was the likeliest."""

    nats: np.ndarray
    is_greedy: np.ndarray


class CollectiveModel:
    """An `EvaluatedModel` whose methods all ranks call with the same requests.

    Args:
        engine: The model in training.
        tokenizer: Of its data.
        is_interrupted: Called before each forward pass; collective, the same on all ranks.

    Attributes:
        name: See `EvaluatedModel`.
        fingerprint: None: nothing is continued.
    """

    name, fingerprint = "the model in training", ""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, is_interrupted: Callable[[], bool]) -> None:
        self.engine, self.tokenizer, self.is_interrupted = engine, tokenizer, is_interrupted

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of an ordinary text."""
        return len(self.tokenizer.encode(text))

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[tuple[int, list[Continuation]]]:
        """Yield (index of the request, its continuations), as they are finished. Collective.

        Raises:
            UserError: on all ranks, if the model's outputs are not finite.
            ScoringStopped: on all ranks.
        """
        prompts = prompt_tokens(self.tokenizer, [request.prompt for request in requests])
        waiting = [(number, sample) for number, each in enumerate(requests) for sample in range(each.num_samples)]
        found: dict[int, dict[int, Continuation]] = {number: {} for number in range(len(requests))}
        while waiting:
            longest = max(len(prompts[number]) + requests[number].max_tokens for number, _ in waiting)
            size = self._rows_at_once(longest)
            rows, waiting = waiting[:size], waiting[size:]
            texts = [SampledText(requests[number], sample, self.tokenizer) for number, sample in rows]
            self._write(texts, [list(prompts[number]) for number, _ in rows])
            for (number, sample), text in zip(rows, texts, strict=True):
                found[number][sample] = text.result()
                if len(found[number]) == requests[number].num_samples:
                    yield number, [found[number][each] for each in range(requests[number].num_samples)]

    def score_continuations(self, requests: Sequence[ContinuationRequest]) -> Iterator[tuple[int, ContinuationScore]]:
        """Yield (index of the request, its score). Collective.

        Raises:
            UserError: on all ranks, for a continuation without text.
            ScoringStopped: on all ranks.
        """
        split = split_tokens(self.tokenizer, requests)
        rows = [[*each.context, *each.continuation] for each in split]
        for number, scored in self._score([(row, len(each.context)) for row, each in zip(rows, split, strict=True)]):
            count = len(split[number].continuation)
            num_bytes = len(requests[number].continuation.encode())
            logprob = -float(scored.nats[-count:].sum())
            yield number, ContinuationScore(logprob, count, num_bytes, bool(scored.is_greedy[-count:].all()))

    def score_texts(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, TextScore]]:
        """Yield (index of the request, its losses). Collective.

        A document is one forward pass, whatever its length.
        """
        rows = prompt_tokens(self.tokenizer, [request.text for request in requests])
        num_bytes = self.tokenizer.bytes_per_token()
        for number, scored in self._score([(row, 1) for row in rows]):
            yield number, TextScore(scored.nats, num_bytes[rows[number][1:]])

    def _rows_at_once(self, length: int) -> int:
        """Rows of one pass over all ranks: no more tokens than a rank's micro-batch in training, but at least a row."""
        config = self.engine.config
        tokens = config.training.micro_batch_size * config.data.sequence_length
        return max(1, tokens // length) * self.engine.mesh.data_world_size

    def _write(self, texts: list[SampledText], rows: list[list[int]]) -> None:
        """Write texts to their ends."""
        active = [number for number, text in enumerate(texts) if not text.finish_reason]
        while active:
            tokens = self._next_tokens([rows[number] for number in active], [texts[number] for number in active])
            for number, token in zip(active, tokens, strict=True):
                texts[number].push(token)
                rows[number].append(token)
            active = [number for number in active if not texts[number].finish_reason]

    def _next_tokens(self, rows: list[list[int]], texts: list[SampledText]) -> list[int]:
        """Draw a token for each row, on the rank that has its logits."""
        # All ranks count the draws of all texts.
        uniforms = [text.uniform() for text in texts]
        tokens = torch.zeros(len(rows), dtype=torch.int64)
        own, logits, first = self._forward(rows)
        for place, number in enumerate(own):
            column = len(rows[number]) - 1 - first
            if not 0 <= column < logits.shape[1]:
                continue
            values = logits[place, column, : self.tokenizer.vocab_size].cpu()
            request = texts[number].request
            is_finite = bool(values.isfinite().all())
            drawn = draw_one(values.numpy(), request.temperature, request.top_p, uniforms[number]) if is_finite else -1
            tokens[number] = drawn
        found: list[int] = self.engine.mesh.all_reduce_sum(tokens.to(self.engine.mesh.device)).tolist()
        if min(found) < 0:
            raise UserError("the model's outputs are not finite; lower optimizer.learning_rate")
        return found

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> Iterator[tuple[int, _ScoredRow]]:
        """Yield (number of the row, losses of its tokens from a place on); those before it are 0."""
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number][0]))
        while order:
            size = self._rows_at_once(len(rows[order[0]][0]))
            numbers, order = order[:size], order[size:]
            values = self._score_rows([rows[number] for number in numbers])
            for number, (nats, greedy) in zip(numbers, values.cpu().numpy(), strict=True):
                length = len(rows[number][0])
                yield number, _ScoredRow(nats[1:length].copy(), greedy[1:length] > 0)

    def _score_rows(self, rows: Sequence[tuple[list[int], int]]) -> Tensor:
        """Losses and whether each token is the likeliest [B,2,T] fp64 of all ranks' rows."""
        device = self.engine.mesh.device
        width = max(len(ids) for ids, _ in rows)
        values = torch.zeros(len(rows), 2, width, dtype=torch.float64)
        own, logits, first = self._forward([ids for ids, _ in rows])
        for place, number in enumerate(own):
            ids, start = rows[number]
            begin, end = max(first, start - 1), min(first + logits.shape[1], len(ids) - 1)
            if begin >= end:
                continue
            here = logits[place, begin - first : end - first]
            targets = torch.tensor(ids[begin + 1 : end + 1], device=here.device)
            chosen = here.gather(1, targets[:, None])[:, 0].double()
            values[number, 0, begin + 1 : end + 1] = (here.double().logsumexp(1) - chosen).cpu()
            likeliest = here[:, : self.tokenizer.vocab_size].argmax(1) == targets
            values[number, 1, begin + 1 : end + 1] = likeliest.double().cpu()
        return self.engine.mesh.all_reduce_sum(values.to(device))

    def _forward(self, rows: Sequence[list[int]]) -> tuple[list[int], Tensor, int]:
        """Run a forward pass over all ranks' rows; each sequence group has some of them.

        Returns:
            Numbers of this rank's rows, their logits [B,T,C] of its slice, and the first column of the slice.
        """
        if self.is_interrupted():
            raise ScoringStopped
        mesh = self.engine.mesh
        count = -(-len(rows) // mesh.data_world_size)
        own = list(range(mesh.data_rank, len(rows), mesh.data_world_size))
        # A group without enough rows of its own makes the same pass.
        here = [rows[number] for number in own] + [rows[0]] * (count - len(own))
        length = -(-max(map(len, rows)) // mesh.sequence_parallel) * mesh.sequence_parallel
        # The model is causal: what fills a row up changes nothing before it.
        tokens = torch.tensor([ids + [ids[0]] * (length - len(ids)) for ids in here])
        positions = torch.arange(length).expand_as(tokens)
        nothing = torch.zeros(len(here), dtype=torch.int64)
        batch = Batch(tokens, torch.full_like(tokens, -100), torch.zeros_like(tokens), positions, nothing)
        sliced = sequence_slice(batch, mesh.sequence_rank, mesh.sequence_parallel)
        return own, self.engine.logits(sliced.to(mesh.device)), mesh.sequence_rank * length // mesh.sequence_parallel
