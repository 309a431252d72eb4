"""What tasks with generated answers share: prompts with few-shot examples, and answers for checks of the scoring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kabrn_dist.evaluation.requests import Answer, Continuation

BETWEEN_SHOTS = "\n\n"


def join_shots(shots: Iterable[str], question: str) -> str:
    """Return few-shot examples, with their answers, and the question, with an empty line between them."""
    return BETWEEN_SHOTS.join((*shots, question))


def one_continuation(text: str) -> list[Answer]:
    """Return the answers of a model that continues the only prompt with this text."""
    return [[Continuation(text, len(text.encode()), "stop")]]


def first_text(answers: Sequence[Answer]) -> str:
    """Return the text of the first continuation of the only request.

    Raises:
        TypeError: if the answer is no list of continuations.
    """
    [answer] = answers
    if not isinstance(answer, list):
        raise TypeError(f"a list of continuations was asked for, not a {type(answer).__name__}")
    return answer[0].text
