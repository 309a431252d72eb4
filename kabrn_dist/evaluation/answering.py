"""Examples asked and answers scored, as the model gives them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from kabrn_dist.evaluation.requests import (
    Answer,
    ContinuationRequest,
    ContinuationScore,
    EvaluatedModel,
    GenerateRequest,
    Request,
    TextRequest,
    TextScore,
)
from kabrn_dist.evaluation.task import Example
from kabrn_dist.evaluation.task_data import TaskData
from kabrn_dist.utils.errors import UserError

# Of a document, results show its beginning.
_SHOWN_CHARACTERS = 1000


@dataclass(frozen=True)
class ExampleResult:
    """One example with what was asked, answered, and how it was scored.

    Attributes:
        id: Of the example.
        prompts: What each request showed to the model; one if all showed the same.
        outputs: For each request, its continuations, or the continuation with its probability, or the sums of a
            document's losses.
        expected: Right answers, for readers.
        scores: Metric → score.
        groups: Kind of group → group.
        shots: Few-shot examples in the prompt.
        reason: Why it was scored so; "" if the scores say it.
    """

    id: str
    prompts: list[str]
    outputs: list[Any]
    expected: list[str]
    scores: dict[str, float]
    groups: dict[str, str]
    shots: int
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON has it."""
        return dict(vars(self))

    def count_tokens(self) -> int:
        """Return how many tokens the model wrote, or scored."""
        parts = [part for output in self.outputs for part in (output if isinstance(output, list) else [output])]
        return sum(part["num_tokens"] for part in parts)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ExampleResult:
        """Return the result that `to_json` returned.

        Raises:
            TypeError: for other fields, or values of other kinds.
        """
        result = cls(**values)
        kinds = isinstance(result.id, str) and isinstance(result.prompts, list) and isinstance(result.groups, dict)
        scores = result.scores if isinstance(result.scores, dict) else {}
        if not kinds or not scores or not all(isinstance(score, float | int) for score in scores.values()):
            raise TypeError("a value of another kind")
        if not all(map(math.isfinite, scores.values())):
            raise TypeError("a score that is no number")
        return result


class AskedExample(NamedTuple):
    """An example and what a model is asked about it.

    Attributes:
        example: The example.
        requests: What is asked.
        shots: Few-shot examples in the prompts.
    """

    example: Example
    requests: list[Request]
    shots: int


def answer_examples(model: EvaluatedModel, data: TaskData, examples: Sequence[Example]) -> Iterator[ExampleResult]:
    """Ask a model and yield the result of each example as soon as all its answers are there, in any order.

    Args:
        model: To be asked.
        data: The task.
        examples: Some of its examples.

    Raises:
        UserError: if a score is not finite.
    """
    for asked, answers in collect_answers(model, data, examples):
        yield score_answers(data, asked, answers)


def collect_answers(
    model: EvaluatedModel, data: TaskData, examples: Sequence[Example]
) -> Iterator[tuple[AskedExample, list[Answer]]]:
    """Ask a model and yield each example with its answers, as soon as all of them are there, in any order."""
    asked = [_ask(model, data, example) for example in examples]
    places = [(number, part) for number, each in enumerate(asked) for part in range(len(each.requests))]
    waiting: list[dict[int, Answer]] = [{} for _ in asked]
    requests = [asked[number].requests[part] for number, part in places]
    for index, answer in submit_requests(model, requests):
        number, part = places[index]
        waiting[number][part] = answer
        if len(waiting[number]) == len(asked[number].requests):
            yield asked[number], [waiting[number][part] for part in range(len(waiting[number]))]
            # Losses of long documents take room.
            waiting[number] = {}


def submit_requests(model: EvaluatedModel, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
    """Yield (index of the request, its answer) for requests of one kind, as the model answers them."""
    if not requests:
        return iter(())
    kinds = {type(request) for request in requests}
    if len(kinds) > 1:
        raise ValueError("the requests of a task are of one kind")
    kind = kinds.pop()
    if kind is GenerateRequest:
        return model.generate(cast("Sequence[GenerateRequest]", requests))
    if kind is ContinuationRequest:
        return model.score_continuations(cast("Sequence[ContinuationRequest]", requests))
    return model.score_texts(cast("Sequence[TextRequest]", requests))


def shown_prompt(request: Request) -> str:
    """Return what a request shows to the model before it answers."""
    if isinstance(request, GenerateRequest):
        return request.prompt
    return request.context if isinstance(request, ContinuationRequest) else request.text


def _ask(model: EvaluatedModel, data: TaskData, example: Example) -> AskedExample:
    """Make the requests of an example, with as many few-shot examples as the length of a prompt allows."""
    shots, limit = data.settings.shots, data.settings.prompt_tokens
    requests = data.make_requests(example, shots)
    while limit and shots and max(model.count_tokens(shown_prompt(request)) for request in requests) > limit:
        shots -= 1
        requests = data.make_requests(example, shots)
    return AskedExample(example, requests, shots)


def score_answers(data: TaskData, asked: AskedExample, answers: Sequence[Answer]) -> ExampleResult:
    """Return the result of an example.

    Raises:
        UserError: if a score is not finite.
    """
    task, example = data.task, asked.example
    scores = task.score(example, answers)
    for metric, score in scores.items():
        if not math.isfinite(score):
            raise UserError(
                f"{task.name}: {metric} of example {example.id} is {score}: the model's outputs are not finite; use "
                "an earlier checkpoint"
            )
    prompts = [shown_prompt(request) for request in asked.requests]
    if isinstance(asked.requests[0], TextRequest):
        prompts = [f"{text[:_SHOWN_CHARACTERS]}…" if len(text) > _SHOWN_CHARACTERS else text for text in prompts]
    return ExampleResult(
        id=example.id,
        prompts=prompts[:1] if len(set(prompts)) == 1 else prompts,
        outputs=[_show_answer(*pair) for pair in zip(asked.requests, answers, strict=True)],
        expected=_show_gold(asked.requests, task.gold_answers(example)),
        scores={metric: float(score) for metric, score in scores.items()},
        groups=dict(example.groups),
        shots=asked.shots,
        reason=task.explain(example, answers),
    )


def _show_answer(request: Request, answer: Answer) -> Any:
    if isinstance(answer, TextScore):
        nats, size = float(answer.nats.sum()), int(answer.num_bytes.sum())
        return {"nats": nats, "num_tokens": len(answer.nats), "num_bytes": size}
    if isinstance(answer, ContinuationScore):
        assert isinstance(request, ContinuationRequest)
        return {"continuation": request.continuation, **answer._asdict()}
    return [continuation._asdict() for continuation in answer]


def _show_gold(requests: Sequence[Request], gold: Sequence[Answer]) -> list[str]:
    """Texts of right answers: what should be written, or the continuation that should be the likeliest."""
    first = gold[0]
    if isinstance(first, ContinuationScore):
        scores = cast("Sequence[ContinuationScore]", gold)
        best = max(range(len(scores)), key=lambda number: scores[number].logprob)
        request = requests[best]
        return [request.continuation] if isinstance(request, ContinuationRequest) else []
    if isinstance(first, TextScore):
        return []
    return [continuation.text for answer in gold for continuation in cast("list[Any]", answer)[:1]]
