"""Many texts generated together: a row of the batch that has ended gives its place to the next prompt.

A retention layer's state has a fixed size, so that rows of any length lie in one batch; caches of attention layers are
filled up in front.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.evaluation.draw import SampledText, check_generate_request, distinct_samples, draw_one
from kabrn_dist.evaluation.reading import ReadRows, RowReader, SharedBeginning, concatenate_read
from kabrn_dist.evaluation.requests import Continuation, GenerateRequest
from kabrn_dist.evaluation.tokens import prompt_tokens
from kabrn_dist.model.mixkabrn import MixKABRN

# Likeliest tokens that are sorted first; more of them only where these have not enough probability.
SORTED_TOKENS = 256
# Part of the batch that must be free before prompts are read: a call for one prompt costs as much as a step.
REFILL_PART = 8


@dataclass
class _Request:
    """A request whose continuations are being generated.

    Attributes:
        number: Of the request in the call.
        texts: Its continuations, but those that are the same as another one.
        copies: How often each of them is in the result.
        open: Continuations that have not ended.
    """

    number: int
    texts: list[SampledText]
    copies: int
    open: int

    @classmethod
    def make(cls, number: int, request: GenerateRequest, tokenizer: Tokenizer) -> _Request:
        distinct = distinct_samples(request)
        texts = [SampledText(request, sample, tokenizer) for sample in range(distinct)]
        return cls(number, texts, request.num_samples // distinct, distinct)


@dataclass
class _Row:
    """A text that has, or waits for, a row of the batch."""

    text: SampledText
    request: _Request


def generate_batched(
    reader: RowReader, tokenizer: Tokenizer, requests: Sequence[GenerateRequest], batch_size: int
) -> Iterator[tuple[int, list[Continuation]]]:
    """Yield (number of the request, its continuations), as they are finished.

    Args:
        reader: The model.
        tokenizer: The model's.
        requests: What to generate.
        batch_size: Rows that are decoded together.

    Raises:
        UserError: for a request without a meaning, or a model whose outputs are not finite.
    """
    for request in requests:
        check_generate_request(request)
    batch = _Batch(reader, tokenizer.vocab_size)
    prompts = _Prompts(reader, tokenizer, requests)
    while True:
        free = batch_size - len(batch.rows)
        if free and (not batch.rows or free * REFILL_PART >= batch_size):
            while free and (taken := prompts.take(free)):
                batch.add(*taken)
                free -= len(taken[0])
        if not batch.rows:
            return
        yield from batch.step()


@torch.no_grad()
def generate_naive(model: MixKABRN, tokenizer: Tokenizer, request: GenerateRequest) -> list[Continuation]:
    """Generate by definition: one continuation after another, everything read again for each token."""
    found = []
    for sample in range(request.num_samples):
        text, tokens = SampledText(request, sample, tokenizer), prompt_tokens(tokenizer, [request.prompt])[0]
        while not text.finish_reason:
            ids = torch.tensor([tokens], device=model.embedding.weight.device)
            positions = torch.arange(len(tokens), device=ids.device)[None]
            logits = model.decode(ids, torch.zeros_like(ids), positions, None)[0][0, : tokenizer.vocab_size]
            tokens.append(draw_one(logits.cpu().numpy(), request.temperature, request.top_p, text.uniform()))
            text.push(tokens[-1])
        found.append(text.result())
    return found


class _Prompts:
    """Prompts that wait for rows of the batch; those of like lengths are read together."""

    def __init__(self, reader: RowReader, tokenizer: Tokenizer, requests: Sequence[GenerateRequest]) -> None:
        self._tokenizer, self._requests = tokenizer, requests
        self._prompts = prompt_tokens(tokenizer, [request.prompt for request in requests])
        self._beginning = SharedBeginning(reader, self._prompts)
        self._queue = deque(sorted(range(len(requests)), key=lambda number: -len(self._prompts[number])))
        # Continuations for which there was no place beside others of their prompt, and what was read of it.
        self._left: list[_Row] = []
        self._left_read: ReadRows | None = None

    def take(self, most: int) -> tuple[list[_Row], ReadRows] | None:
        """Read as many prompts as have `most` continuations; return rows, and what was read before each."""
        if self._left_read is not None:
            rows, self._left = self._left[:most], self._left[most:]
            read = self._left_read.select([0] * len(rows))
            self._left_read = self._left_read if self._left else None
            return rows, read
        if not self._queue:
            return None
        rows, places, numbers = list[_Row](), list[int](), list[int]()
        while self._queue and len(rows) < most:
            number = self._queue.popleft()
            request = _Request.make(number, self._requests[number], self._tokenizer)
            rows += [_Row(text, request) for text in request.texts]
            places += [len(numbers)] * len(request.texts)
            numbers.append(number)
        read = self._beginning.read([self._prompts[number] for number in numbers])
        if len(rows) > most:
            self._left, self._left_read = rows[most:], read.select([places[-1]])
        return rows[:most], read.select(places[:most])


class _Batch:
    """The rows that are decoded together."""

    def __init__(self, reader: RowReader, choices: int) -> None:
        self._reader, self._choices = reader, choices
        self._read: ReadRows | None = None
        self.rows: list[_Row] = []

    def add(self, rows: list[_Row], read: ReadRows) -> None:
        """Add rows, and what the model has read before each of them."""
        self._read = read if self._read is None else concatenate_read([self._read, read])
        self.rows = self.rows + rows

    def step(self) -> Iterator[tuple[int, list[Continuation]]]:
        """Draw a token for each row, read it, and yield the requests that are finished."""
        assert self._read is not None
        staying, tokens = list[int](), list[list[int]]()
        logits = self._reader.logits(self._read.hidden)[:, : self._choices]
        for place, token in enumerate(draw_tokens(logits, [row.text for row in self.rows])):
            text, request = self.rows[place].text, self.rows[place].request
            # A text of no tokens has ended before.
            if not text.finish_reason and not text.push(token):
                staying.append(place)
                tokens.append([token])
                continue
            request.open -= 1
            if not request.open:
                yield request.number, [each.result() for each in request.texts] * request.copies
        if len(staying) < len(self.rows):
            self._read = self._read.select(staying) if staying else None
            self.rows = [self.rows[place] for place in staying]
        if self._read is not None:
            lengths = [length + 1 for length in self._read.lengths]
            hidden, states = self._reader.call(tokens, self._read.states, self._read.lengths, 1)
            self._read = ReadRows(hidden[:, -1], states, lengths)


@torch.no_grad()
def draw_tokens(logits: Tensor, texts: Sequence[SampledText]) -> list[int]:
    """Draw the next token of each text, by its temperature, top-p and random numbers.

    Args:
        logits: [B,C] fp32, of tokens that may be drawn.
        texts: Of the B rows.
    """
    found: list[int] = logits.argmax(1).tolist()
    rows = [row for row, text in enumerate(texts) if text.request.temperature]
    if not rows:
        return found
    requests = [texts[row].request for row in rows]
    columns = [[request.temperature for request in requests], [request.top_p for request in requests]]
    columns.append([texts[row].uniform() for row in rows])
    temperature, top_p, uniform = torch.tensor(columns, dtype=torch.float64, device=logits.device).unsqueeze(-1)
    drawn = _draw(logits[torch.tensor(rows, device=logits.device)], temperature, top_p, uniform)
    for row, token in zip(rows, drawn.tolist(), strict=True):
        found[row] = token
    return found


def _draw(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """`draw_one` for rows [B,C], with one value of each kind a row [B,1]: tokens [B]."""
    scaled = logits.double() / temperature
    weights = (scaled - scaled.amax(1, keepdim=True)).exp()
    sums = weights.cumsum(1)
    drawn = torch.searchsorted(sums, uniform * sums[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)
    some = (top_p < 1).flatten().nonzero().flatten()
    if len(some):
        drawn[some] = _draw_likeliest(weights[some], top_p[some] * sums[some, -1:], uniform[some])
    return drawn[:, 0]


def _draw_likeliest(weights: Tensor, needed: Tensor, uniform: Tensor) -> Tensor:
    """Draw by weights [B,C] among the likeliest tokens, of which as many as have the needed sum [B,1]: [B,1]."""
    ids = weights.topk(min(SORTED_TOKENS, weights.shape[1]), 1).indices.sort(1).values
    if bool((weights.gather(1, ids).sum(1, keepdim=True) <= needed).any()):
        ids = torch.arange(weights.shape[1], device=weights.device).expand_as(weights)
    # Of equal weights the lowest token comes first.
    ordered, order = weights.gather(1, ids).sort(dim=1, descending=True, stable=True)
    sums = ordered.cumsum(1)
    last = torch.searchsorted(sums, needed).clamp_(max=sums.shape[1] - 1)
    place = torch.searchsorted(sums, uniform * sums.gather(1, last), right=True).clamp_(max=sums.shape[1] - 1)
    return ids.gather(1, order).gather(1, place)
