"""A tiny model that answers by rule, and two tiny tasks, for tests of what happens around them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kabrn_dist.evaluation.answering import answer_examples
from kabrn_dist.evaluation.requests import (
    Answer,
    Continuation,
    ContinuationRequest,
    ContinuationScore,
    GenerateRequest,
    Request,
    TextRequest,
    TextScore,
)
from kabrn_dist.evaluation.settings import TaskSettings
from kabrn_dist.evaluation.task import Example, Task
from kabrn_dist.evaluation.task_data import TaskData, load_task_data
from kabrn_dist.evaluation.workers import Answered, Events, ModelChoice, ModelInfo


class RuleModel:
    """Adds the two numbers of a question, wrongly where the first one is divisible by 3; answers come backwards."""

    name = "rule"

    def __init__(self, fingerprint: str = "f" * 64) -> None:
        self.fingerprint = fingerprint
        self.asked: list[Request] = []

    def count_tokens(self, text: str) -> int:
        return len(text)

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[tuple[int, list[Continuation]]]:
        self.asked += requests
        for number, request in reversed(list(enumerate(requests))):
            a, b = map(int, request.prompt.rsplit("Add ", 1)[1].split(":")[0].split("+"))
            text = f" {a + b + (a % 3 == 0)}"
            if a == 7:
                text = ""
            yield number, [Continuation(text, 2, "stop") for _ in range(request.num_samples)]

    def score_continuations(self, requests: Sequence[ContinuationRequest]) -> Iterator[tuple[int, ContinuationScore]]:
        self.asked += requests
        for number, request in reversed(list(enumerate(requests))):
            size = len(request.continuation.encode())
            yield number, ContinuationScore(-float(size), size, size, size < 5)

    def score_texts(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, TextScore]]:
        self.asked += requests
        for number, request in reversed(list(enumerate(requests))):
            size = len(request.text.encode())
            yield number, TextScore(np.full(size, 0.5), np.ones(size, np.int64))


def _load(path: Path, split: str) -> list[Example]:
    lines = (path / f"{split}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [
        Example(f"{split}/{number}", record, {"size": "large" if record["a"] > 9 else "small"})
        for number, record in enumerate(records)
    ]


class Adding(Task):
    """Sums of two numbers, written out."""

    name = "adding"
    description = "Sums, scored by exact match"
    published = "nowhere"
    layout = "test.jsonl and train.jsonl"
    splits = ("test", "train")
    shots_split = "train"
    default_shots = 2
    main_metric = "exact_match"
    accuracies = ("exact_match",)

    def load(self, path: Path, split: str) -> list[Example]:
        return _load(path, split)

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        done = "".join(f"Add {s.record['a']}+{s.record['b']}: {s.record['a'] + s.record['b']}\n" for s in shots)
        return [GenerateRequest(f"{done}Add {example.record['a']}+{example.record['b']}:", 5, ("\n",))]

    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        (texts,) = answers
        assert isinstance(texts, list)
        right = str(example.record["a"] + example.record["b"])
        return {"length": float(len(texts[0].text)), "exact_match": float(texts[0].text.strip() == right)}

    def gold_answers(self, example: Example) -> list[Answer]:
        return [[Continuation(f" {example.record['a'] + example.record['b']}", 2, "stop")]]

    def empty_answers(self, example: Example) -> list[Answer]:
        return [[Continuation("", 0, "stop")]]


class Compression(Task):
    """Bytes per token of sums written as text: a quotient of sums, and no mean."""

    name = "compression"
    description = "Nats per byte <of text>"
    published = "nowhere"
    layout = "test.jsonl"
    splits = ("test",)
    main_metric = "nats_per_byte"

    def load(self, path: Path, split: str) -> list[Example]:
        return _load(path, split)

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        return [TextRequest(f"{example.record['a']} <b>&{example.record['b']}" * example.record["a"] + ".")]

    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        (answer,) = answers
        assert isinstance(answer, TextScore)
        return {"nats": float(answer.nats.sum()) + example.record["b"], "bytes": float(answer.num_bytes.sum())}

    def combine(self, scores: Sequence[Any]) -> dict[str, float]:
        return {"nats_per_byte": sum(each["nats"] for each in scores) / sum(each["bytes"] for each in scores)}

    def gold_answers(self, example: Example) -> list[Answer]:
        return [TextScore(np.zeros(1), np.ones(1, np.int64))]

    def empty_answers(self, example: Example) -> list[Answer]:
        return [TextScore(np.full(1, 9.0), np.ones(1, np.int64))]


def write_sums(folder: Path, count: int = 12) -> Path:
    """Write `count` sums to be answered and four examples."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("test", range(1, count + 1)), ("train", range(21, 25))):
        lines = [json.dumps({"a": number, "b": number % 4}) for number in numbers]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def load_sums(folder: Path, task: type[Task] = Adding, **settings: Any) -> TaskData:
    """Load a tiny task from what `write_sums` wrote."""
    shots = {"shots": task.default_shots} | settings
    return load_task_data(task(), TaskSettings(name=task.name, data=folder, split="test", **shots))


def answer_by(model: RuleModel, stop_after: int = -1) -> Callable[..., Events]:
    """What `run_evaluation` takes to answer examples with a model that is there; it may break off."""

    def answer(choice: ModelChoice, tasks: list[TaskData], ids: list[list[str]]) -> Events:
        yield ModelInfo(model.name, model.fingerprint)
        count = 0
        for number, (data, chosen) in enumerate(zip(tasks, ids, strict=True)):
            examples = [example for example in data.examples if example.id in chosen]
            for result in answer_examples(model, data, examples):
                if count == stop_after:
                    raise KeyboardInterrupt
                count += 1
                yield Answered(number, result)

    return answer
