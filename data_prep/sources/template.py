"""Render questions and answers as text.

    Problem: {question}
    Answer: {answer}

These are the words of the prompt in the `hendrycks_math` tasks of lm-eval, so that evaluation matches training. With
`loss: answer` the loss counts from the character after "Answer:": the space before the answer belongs to its first
token, and the end of the document is learned with the answer.
"""

from __future__ import annotations

from typing import Literal

from data_prep.documents import Document
from data_prep.sources.decode import make_document, make_spans

LossTarget = Literal["all", "answer"]


def render_question(
    name: str, question: str, answer: str, loss: LossTarget, *, gap: str = " ", key: str | None = None
) -> Document:
    """Return the document of one question, without whitespace around question and answer, or why there is none.

    Args:
        name: name of the document.
        question: the question.
        answer: the answer.
        loss: what carries loss.
        gap: text between "Answer:" and the answer; a newline before code.
        key: key of the document.
    """
    for part, words in (("question", question), ("answer", answer)):
        if not words.strip():
            return Document(name, None, problem=f"an empty {part}", key=key)
    prompt = f"Problem: {question.strip()}\nAnswer:"
    text = f"{prompt}{gap}{answer.strip()}"
    return make_document(name, text, spans=make_spans(len(prompt), text, loss == "answer"), key=key)
