"""The last word of a passage, which only the whole of it tells (LAMBADA: Paperno et al. 2016, arXiv:1606.06031)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kabrn_dist.evaluation.files import find_records
from kabrn_dist.evaluation.records import FileLayout, has_texts
from kabrn_dist.evaluation.requests import Answer, ContinuationRequest, ContinuationScore, Request
from kabrn_dist.evaluation.task import Example, Task

# So that exp of it is a number.
_MOST_NATS = 700.0


class LastWord(Task):
    """Passages whose last word, after the last blank, is asked for.

    `acc` is 1 if each token of the word is the likeliest one; `perplexity` is e to the mean of −log p(word).
    """

    name = "last_word"
    description = "the last word of passages, such as LAMBADA's; right if all its tokens are the likeliest"
    published = "https://zenodo.org/records/2630551 (LAMBADA, CC BY 4.0), or OpenAI's lambada_test.jsonl"
    layout = "lambada_test_plain_text.txt, a passage in each line, or .jsonl with 'text'; or your own like these"
    splits = ("test", "validation")
    main_metric = "acc"
    accuracies = ("acc",)

    def load(self, path: Path, split: str) -> list[Example]:
        """Read the passages, in the order of the file.

        Raises:
            UserError: if they are not there, or damaged.
        """
        layout = FileLayout(_is_passage, _find_problem, "lambada", "lambada", (".jsonl", ".txt"))
        records = find_records(self, path, split, layout)
        return [Example(f"{split}/{number}", record) for number, record in enumerate(records, 1)]

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """Return the word after all that is before it."""
        context, word = _divide(example.record)
        return [ContinuationRequest(context, f" {word}")]

    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        """Return whether the word would be generated, and −log p of it."""
        [answer] = answers
        if not isinstance(answer, ContinuationScore):
            raise TypeError(f"the score of a continuation was asked for, not a {type(answer).__name__}")
        return {"acc": float(answer.is_greedy), "nats": -answer.logprob}

    def combine(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the mean accuracy, and e to the mean of the nats."""
        count = max(1, len(scores))
        nats = math.fsum(each["nats"] for each in scores) / count
        return {
            "acc": math.fsum(each["acc"] for each in scores) / count,
            "perplexity": math.exp(min(nats, _MOST_NATS)),
        }

    def gold_answers(self, example: Example) -> list[Answer]:
        """Return the score of a model that is certain of the word."""
        return [ContinuationScore(0.0, 1, len(_divide(example.record)[1].encode()) + 1, True)]

    def empty_answers(self, example: Example) -> list[Answer]:
        """Return the score of a model that expects another word."""
        return [ContinuationScore(-20.0, 1, len(_divide(example.record)[1].encode()) + 1, False)]


def _divide(record: Mapping[str, Any]) -> tuple[str, str]:
    context, _, word = record["text"].strip().rpartition(" ")
    return context.rstrip(), word


def _is_passage(record: Mapping[str, Any]) -> bool:
    return has_texts(record, "text")


def _find_problem(record: Mapping[str, Any]) -> str:
    return "" if all(_divide(record)) else "a passage of fewer than 2 words"
