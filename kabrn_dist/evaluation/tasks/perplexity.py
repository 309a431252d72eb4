"""Bits per byte of any texts: how well a model predicts them, comparable between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kabrn_dist.evaluation.requests import Answer, Request, TextRequest, TextScore
from kabrn_dist.evaluation.task import Example, Task
from kabrn_dist.evaluation.texts import TEXT_LAYOUT, TEXT_SPLITS, describe_left_out, read_texts

_UNIFORM_NATS = math.log(256)


class Perplexity(Task):
    """Documents, each scored from its first to its last token with the model's state carried over all of it.

    `bits_per_byte` is the sum of −log₂ p over the tokens of all documents, over the sum of their UTF-8 bytes; special
    tokens are 0 bytes. `nats_per_token` depends on the model's tokenizer. Of a shard set the texts are decoded, and
    encoded again by the model's tokenizer; tokens that carry no loss in training are scored as well.

    A perfect model has 0 bits per byte (`gold_answers`), one that guesses bytes has 8 (`empty_answers`).
    """

    name = "perplexity"
    description = "bits per byte of texts, the state carried over each document's whole length; by source"
    published = "your own texts"
    layout = TEXT_LAYOUT
    splits = TEXT_SPLITS
    main_metric = "bits_per_byte"

    def load(self, path: Path, split: str) -> list[Example]:
        """Read the documents of a split, in the order of the files.

        Raises:
            UserError: if there are none, or a file is damaged.
        """
        texts = read_texts(path, split)
        return [Example(each.name, {"text": each.text}, {"source": each.source}) for each in texts]

    def describe_left_out(self, path: Path) -> str:
        """Return how many .jsonl files in a folder hold no texts."""
        return describe_left_out(path)

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """Return the document."""
        return [TextRequest(example.record["text"])]

    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        """Return the document's sums beside its quotients."""
        score = only_text_score(answers)
        nats, count, tokens = float(score.nats.sum()), float(score.num_bytes.sum()), float(len(score.nats))
        return {"nats": nats, "bytes": count, "tokens": tokens, **_quotients(nats, count, tokens)}

    def combine(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return quotients of sums over documents."""
        nats, count, tokens = (math.fsum(each[name] for each in scores) for name in ("nats", "bytes", "tokens"))
        return _quotients(nats, count, tokens)

    def gold_answers(self, example: Example) -> list[Answer]:
        """Return the losses of a model that is certain of each byte, and right."""
        return [uniform_losses(example.record["text"], 0.0)]

    def empty_answers(self, example: Example) -> list[Answer]:
        """Return the losses of a model that finds all bytes alike."""
        return [uniform_losses(example.record["text"], _UNIFORM_NATS)]


def only_text_score(answers: Sequence[Answer]) -> TextScore:
    """Return the losses of the only request.

    Raises:
        TypeError: if the answer is of another kind.
    """
    [answer] = answers
    if not isinstance(answer, TextScore):
        raise TypeError(f"the losses of a text were asked for, not a {type(answer).__name__}")
    return answer


def uniform_losses(text: str, nats: float) -> TextScore:
    """Return losses of a text of which each byte is a token and has the same loss."""
    count = len(text.encode())
    return TextScore(np.full(count, nats), np.ones(count, np.int64))


def _quotients(nats: float, count: float, tokens: float) -> dict[str, float]:
    return {
        "bits_per_byte": nats / math.log(2) / max(1.0, count),
        "nats_per_token": nats / max(1.0, tokens),
    }
