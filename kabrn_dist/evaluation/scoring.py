"""Probabilities of given texts: of continuations after their contexts, and of whole documents token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.evaluation.reading import CALL_TOKENS, ReadRows, RowReader, SharedBeginning
from kabrn_dist.evaluation.requests import ContinuationRequest, ContinuationScore, TextRequest, TextScore
from kabrn_dist.evaluation.tokens import group_by_context, prompt_tokens, split_tokens


def score_continuations_batched(
    reader: RowReader, tokenizer: Tokenizer, requests: Sequence[ContinuationRequest], batch_size: int
) -> Iterator[tuple[int, ContinuationScore]]:
    """Yield (number of the request, its score); a context that several continuations share is read once.

    Args:
        reader: The model.
        tokenizer: The model's.
        requests: What to score.
        batch_size: Rows that are read together.

    Raises:
        UserError: for a continuation without text, or a model whose outputs are not finite.
    """
    split = split_tokens(tokenizer, requests)
    by_context = group_by_context(split)
    contexts = list(by_context)
    beginning = SharedBeginning(reader, contexts)
    for start in range(0, len(contexts), batch_size):
        here = contexts[start : start + batch_size]
        read = beginning.read(here)
        pairs = [(row, number) for row, context in enumerate(here) for number in by_context[context]]
        pairs.sort(key=lambda pair: -len(split[pair[1]].continuation))
        for part in range(0, len(pairs), batch_size):
            rows, numbers = zip(*pairs[part : part + batch_size], strict=True)
            targets = [split[number].continuation for number in numbers]
            scores = _score_after(reader, tokenizer.vocab_size, read.select(rows), targets)
            for number, (logprob, is_greedy), target in zip(numbers, scores, targets, strict=True):
                num_bytes = len(requests[number].continuation.encode())
                yield number, ContinuationScore(logprob, len(target), num_bytes, is_greedy)


def _score_after(
    reader: RowReader, choices: int, read: ReadRows, continuations: Sequence[tuple[int, ...]]
) -> list[tuple[float, bool]]:
    """The log-probability of each row's continuation, the longest ones first, and whether each token was likeliest."""
    nothing, width = len(continuations), max(len(each) for each in continuations) - 1
    logprobs, greedy = [0.0] * nothing, [True] * nothing

    def add(hidden: torch.Tensor, places: list[tuple[int, int]]) -> None:
        targets = torch.tensor([continuations[row][place] for row, place in places], device=hidden.device)
        found, likeliest = reader.score(hidden, targets, choices)
        for (row, _), logprob, is_likeliest in zip(places, found.tolist(), likeliest.tolist(), strict=True):
            logprobs[row] += logprob
            greedy[row] &= is_likeliest

    add(read.hidden, [(row, 0) for row in range(nothing)])
    step = max(1, CALL_TOKENS // len(continuations))
    for begin in range(0, width, step):
        # Those that need a token of this slice to be read; they are the first ones.
        active = sum(len(each) - 1 > begin for each in continuations)
        size = min(step, width - begin)
        if active < len(read.lengths):
            read = read.select(range(active))
        parts = [each[begin : min(begin + size, len(each) - 1)] for each in continuations[:active]]
        hidden, states = reader.call(parts, read.states, read.lengths, size)
        places = [(row, begin + place + 1) for row, part in enumerate(parts) for place in range(len(part))]
        rows, columns = zip(*((row, place - begin - 1) for row, place in places), strict=True)
        add(hidden[list(rows), list(columns)], places)
        read = ReadRows(hidden[:, -1], states, [length + size for length in read.lengths])
    return list(zip(logprobs, greedy, strict=True))


def score_texts_batched(
    reader: RowReader, tokenizer: Tokenizer, requests: Sequence[TextRequest], batch_size: int
) -> Iterator[tuple[int, TextScore]]:
    """Yield (number of the request, its losses); states are carried over any length in slices of bounded memory.

    Args:
        reader: The model.
        tokenizer: The model's.
        requests: Documents to score.
        batch_size: Documents that are read together.

    Raises:
        UserError: for a model whose outputs are not finite.
    """
    documents = prompt_tokens(tokenizer, [request.text for request in requests])
    order = sorted(range(len(documents)), key=lambda number: -len(documents[number]))
    num_bytes = tokenizer.bytes_per_token()
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        found = _score_documents(reader, tokenizer.vocab_size, [documents[number] for number in numbers])
        for number, nats in zip(numbers, found, strict=True):
            yield number, TextScore(nats, num_bytes[documents[number][1:]])


def _score_documents(reader: RowReader, choices: int, documents: Sequence[list[int]]) -> list[np.ndarray]:
    """The losses of each document's tokens but the first, the longest documents first."""
    nats: list[list[torch.Tensor]] = [[torch.empty(0, dtype=torch.float64)] for _ in documents]
    read: ReadRows | None = None
    begin, active = 0, sum(len(each) > 1 for each in documents)
    while active:
        size = min(max(1, CALL_TOKENS // active), len(documents[0]) - 1 - begin)
        parts = [each[begin : min(begin + size, len(each) - 1)] for each in documents[:active]]
        starts = [begin] * active
        hidden, states = reader.call(parts, read.states if read else None, starts, size)
        read = ReadRows(hidden[:, -1], states, [begin + size] * active)
        lengths = [len(part) for part in parts]
        flat = torch.cat([row[:length] for row, length in zip(hidden, lengths, strict=True)])
        pairs = zip(documents, lengths, strict=False)
        targets = [token for each, length in pairs for token in each[begin + 1 : begin + 1 + length]]
        logprobs, _ = reader.score(flat, torch.tensor(targets, device=flat.device), choices)
        for row, part in enumerate(logprobs.split(lengths)):
            nats[row].append(-part)
        begin += size
        staying = sum(len(each) - 1 > begin for each in documents[:active])
        if staying < active and staying:
            read = read.select(range(staying))
        active = staying
    return [torch.cat(parts).numpy() for parts in nats]
