"""What a model knows of a shard set: bits per byte, tokens it finds likeliest, answers that it gives in full.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.forgetting_matrix import Measurement
from kabrn_dist.config import DataConfig
from kabrn_dist.data.corpus import open_corpus
from kabrn_dist.data.dataset import Batch, TokenDataset
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.model.mixkabrn import MixKABRN

ROWS_AT_ONCE = 8


class HeldOut:
    """The first held-out rows of a shard set.

    Args:
        folder: of the shard set.
        sequence_length: tokens of a row.
        rows: at most.
        answers: whether it holds exercises, so that answers are counted.
    """

    def __init__(self, folder: Path, sequence_length: int, rows: int, answers: bool) -> None:
        corpus = open_corpus(DataConfig(path=str(folder), sequence_length=sequence_length))
        data = TokenDataset(corpus, "validation", sequence_length, seed=0, ordered=False)
        positions = data.validation_positions(rows)
        self.batches = [
            data.get(positions[start : start + ROWS_AT_ONCE]) for start in range(0, len(positions), ROWS_AT_ONCE)
        ]
        self.answers = answers
        self.tokenizer: Tokenizer = corpus.sets[0].tokenizer()
        data.close()

    @torch.no_grad()
    def measure(self, model: MixKABRN) -> Measurement:
        """Return what a model knows of it."""
        byte_counts = torch.from_numpy(self.tokenizer.bytes_per_token())
        nats, text_bytes, hit, tokens, right, counted = 0.0, 0, 0, 0, 0, 0
        for batch in self.batches:
            hidden, _ = model.read(batch.tokens, batch.documents, batch.positions, None)
            logits = model.head(hidden).float()
            learned = batch.targets >= 0
            nats += float(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"))
            text_bytes += int(byte_counts[batch.targets[learned]].sum())
            hits = logits[..., : self.tokenizer.vocab_size].argmax(-1) == batch.targets
            hit, tokens = hit + int(hits[learned].sum()), tokens + int(learned.sum())
            found = count_right_answers(batch, hits) if self.answers else (0, 0)
            right, counted = right + found[0], counted + found[1]
        return Measurement(nats / math.log(2) / max(1, text_bytes), hit / max(1, tokens), right / max(1, counted))

    def exercises(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the tokens of each question, with the beginning of its answer, and those of the answer."""
        for batch in self.batches:
            for tokens, targets, documents in zip(batch.tokens, batch.targets, batch.documents, strict=True):
                for document in range(int(documents.max()) + 1):
                    places = (documents == document).nonzero()[:, 0]
                    answer = places[targets[places] >= 0]
                    if len(answer):
                        yield tokens[places[0] : answer[0] + 1].tolist(), targets[answer].tolist()


def count_right_answers(batch: Batch, hits: Tensor) -> tuple[int, int]:
    """Count the documents of which all learned tokens are found, and those with any.

    Args:
        batch: rows of documents.
        hits: [B,T] bool, the targets that a model finds likeliest.
    """
    rows, width = batch.tokens.shape
    # No row has more documents than tokens.
    numbers = (batch.documents + width * torch.arange(rows)[:, None]).flatten()
    learned = batch.targets.flatten() >= 0
    total = torch.zeros(rows * width, dtype=torch.int64).index_add_(0, numbers, learned.long())
    found = torch.zeros_like(total).index_add_(0, numbers, (hits.flatten() & learned).long())
    return int(((found == total) & (total > 0)).sum()), int((total > 0).sum())


def answer_greedily(model: MixKABRN, question: list[int], tokens: int) -> list[int]:
    """Return the likeliest next token, and so on.

    Args:
        model: reads with recurrent states.
        question: tokens of a document's beginning.
        tokens: how many to write.
    """
    ids = torch.tensor([question])
    zero, answer = torch.zeros_like(ids), list[int]()
    logits, states = model.decode(ids, zero, torch.arange(len(question))[None], None)
    for position in range(len(question), len(question) + tokens):
        answer.append(int(logits[0].argmax()))
        one = torch.tensor([[answer[-1]]])
        logits, states = model.decode(one, zero[:, :1], zero[:, :1] + position, states)
    return answer


def measure_greedy_accuracy(model: MixKABRN, held_out: HeldOut, exercises: int) -> float:
    """Return the share of answers that a model writes token by token as they are, of the first `exercises`."""
    asked = [pair for pair, _ in zip(held_out.exercises(), range(exercises), strict=False)]
    right = [answer_greedily(model, question, len(answer)) == answer for question, answer in asked]
    return sum(right) / max(1, len(right))
