"""Questions and answers as text.

    Problem: {question}
    Answer: {answer}

The same words as the `hendrycks_math` tasks of lm-eval use as their prompt, so that what was trained is what is asked.
With `loss: answer` the loss counts from the character after "Answer:" on: the space before the answer belongs to its
first token, and the end of the document is learned with the answer.
"""

from __future__ import annotations

from typing import Literal

from data_prep.documents import Document
from data_prep.sources.decode import make_document, make_spans

LossTarget = Literal["all", "answer"]


def render_question(
    name: str, question: str, answer: str, loss: LossTarget, *, gap: str = " ", key: str | None = None
) -> Document:
    """Return the document of one question; `gap` stands between "Answer:" and the answer (a line end before code).

    Blank space around question and answer is dropped.
    """
    prompt = f"Problem: {question.strip()}\nAnswer:"
    text = f"{prompt}{gap}{answer.strip()}"
    return make_document(name, text, spans=make_spans(len(prompt), text, loss == "answer"), key=key)
