"""What tasks have in common whose answers are programs: samples, the sandbox, pass@k."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

from kabrn_dist.evaluation.pass_at_k import pass_metrics
from kabrn_dist.evaluation.requests import Answer, Continuation, GenerateRequest, Request
from kabrn_dist.evaluation.sandbox import Sandbox
from kabrn_dist.evaluation.sandbox_probe import open_sandbox
from kabrn_dist.evaluation.task import Example, Task

# Of a function, with room for those that explain themselves.
_MAX_TOKENS = 512


class CodeTask(Task):
    """A task whose answers are programs, which pass or fail its tests."""

    main_metric: ClassVar[str] = "pass@1"
    runs_code: ClassVar[bool] = True

    @cached_property
    def sandbox(self) -> Sandbox:
        """Where programs run, made when the first is scored.

        Raises:
            SandboxError: if programs cannot be run safely on this machine.
        """
        return open_sandbox()

    @abstractmethod
    def write_program(self, example: Example, text: str) -> str:
        """Return what is run: an answer with the tests of its example."""

    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        """Return pass@k, for each k up to the number of programs, by running them.

        Raises:
            SandboxError: if programs cannot be run safely on this machine.
        """
        return pass_metrics([outcome == "passed" for outcome in self._run(example, answers)])

    def explain(self, example: Example, answers: Sequence[Answer]) -> str:
        """Return how each program ended, such as "assertion: AssertionError".

        Raises:
            SandboxError: if programs cannot be run safely on this machine.
        """
        return "; ".join(self._run(example, answers))

    def empty_answers(self, example: Example) -> list[Answer]:
        """Return programs without a line."""
        return [[Continuation("", 0, "stop")]]

    def _ask(self, prompt: str, stop: tuple[str, ...]) -> list[Request]:
        return [GenerateRequest(prompt, _MAX_TOKENS, stop)]

    def _run(self, example: Example, answers: Sequence[Answer]) -> list[str]:
        (continuations,) = answers
        if not isinstance(continuations, list):
            raise TypeError(f"task {self.name} asks for continuations")
        programs = [self.write_program(example, continuation.text) for continuation in continuations]
        new = [program for program in dict.fromkeys(programs) if program not in self._known]
        for program, outcome in zip(new, self.sandbox.run_all(new), strict=True):
            self._known[program] = outcome.describe()
        return [self._known[program] for program in programs]

    @cached_property
    def _known(self) -> dict[str, str]:
        """How programs ended: many samples are the same, and what was scored may be explained."""
        return {}
