"""The interface of all tasks: examples from files, requests to the model, scores of its answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kabrn_dist.evaluation.requests import Answer, Request


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        id: Unique in its split, and the same in every run.
        record: Its fields, as they were published.
        groups: Kind of group → group, such as "level" → "Level 5", by which scores are also reported.
    """

    id: str
    record: Mapping[str, Any]
    groups: Mapping[str, str] = field(default_factory=dict)


class Task(ABC):
    """A task. Subclasses are immutable; everything is a function of the example.

    Attributes:
        name: As on the command line.
        description: One line: what is asked and how it is scored.
        published: Where its files are published, for messages.
        layout: Which files are expected, for messages.
        splits: Splits that exist, the one that is scored by default first.
        shots_split: Split that few-shot examples are drawn from; "" if there are none.
        default_shots: Few-shot examples in a prompt by default.
        main_metric: The metric that is shown first.
        accuracies: The metrics that are 1 for an example that is answered right and 0 for one that is not; others, such
            as bits per byte, have no upper limit, or say how often something happened.
        runs_code: Whether scoring executes what the model wrote, which needs an explicit permission.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    published: ClassVar[str]
    layout: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    shots_split: ClassVar[str] = ""
    default_shots: ClassVar[int] = 0
    main_metric: ClassVar[str]
    accuracies: ClassVar[tuple[str, ...]] = ()
    runs_code: ClassVar[bool] = False

    @abstractmethod
    def load(self, path: Path, split: str) -> list[Example]:
        """Read the examples of a split, in a fixed order.

        Args:
            path: A file or archive of the task, a folder that holds it in its published layout, or a folder of several
                tasks' data.
            split: One of `splits`.

        Raises:
            UserError: if nothing of this task is there (saying where it is published and what is expected), or the
                files are damaged.
        """

    @abstractmethod
    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """Return what the model is asked, all of one kind.

        Args:
            example: To be answered.
            shots: Few-shot examples with their answers, for the prompt.
        """

    @abstractmethod
    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        """Return metric → score of one example; the mean over examples is the task's score.

        Args:
            example: That was asked.
            answers: One for each of `requests`.
        """

    @abstractmethod
    def gold_answers(self, example: Example) -> list[Answer]:
        """Return answers that are right, for checks of the scoring."""

    @abstractmethod
    def empty_answers(self, example: Example) -> list[Answer]:
        """Return answers of a model that says nothing (or prefers every wrong choice), for checks of the scoring."""

    def explain(self, example: Example, answers: Sequence[Answer]) -> str:
        """Return in a line why answers were scored as they were, for the page of samples; "" if the scores say it.

        Args:
            example: That was asked.
            answers: As for `score`.
        """
        return ""

    def describe_left_out(self, path: Path) -> str:
        """Return in a line which files below a path are not the task's, where someone might think so; "" if none is.

        Args:
            path: As for `load`, which has read it.
        """
        return ""

    def combine(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return metric → score of a task from those of its examples; by default their means.

        Tasks whose score is no mean, such as bits per byte (a quotient of sums), override it.
        """
        names = scores[0].keys() if scores else ()
        return {name: sum(each[name] for each in scores) / len(scores) for name in names}
