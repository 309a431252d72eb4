"""Every task on small files in its published layout: what is read, asked, and scored."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from kabrn_dist.evaluation.missing import MissingSplit
from kabrn_dist.evaluation.registry import TASKS
from kabrn_dist.evaluation.requests import ContinuationRequest, GenerateRequest, TextRequest
from kabrn_dist.evaluation.task import Example, Task
from kabrn_dist.evaluation.tasks.generation import one_continuation
from kabrn_dist.utils.errors import UserError
from tests.evaluation.task_files import PUBLISHED, WRITERS, write_arc, write_gsm8k, write_lines, write_piqa


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with the data of all tasks."""
    folder = tmp_path_factory.mktemp("data")
    for write in dict.fromkeys(WRITERS.values()):
        write(folder)
    return folder


def load_own(name: str, everything: Path) -> tuple[Task, list[Example]]:
    task = TASKS[name]()
    return task, task.load(everything if name in PUBLISHED else everything / "notes", task.splits[0])


def test_tasks_are_named_as_they_are_registered() -> None:
    assert set(WRITERS) <= set(TASKS)
    for name, task in TASKS.items():
        assert task.name == name and task.description and task.published and task.layout and task.splits


@pytest.mark.parametrize("name", WRITERS)
def test_gold_answers_score_one_and_empty_ones_zero(name: str, everything: Path) -> None:
    task, examples = load_own(name, everything)
    gold = task.combine([task.score(each, task.gold_answers(each)) for each in examples])
    empty = task.combine([task.score(each, task.empty_answers(each)) for each in examples])
    assert task.main_metric in gold and gold.keys() == empty.keys() and set(task.accuracies) <= gold.keys()
    for metric in task.accuracies:
        assert (gold[metric], empty[metric]) == (1.0, 0.0), metric
    if not task.accuracies:
        assert gold["bits_per_byte"] == 0.0 and empty["bits_per_byte"] == pytest.approx(8.0)


@pytest.mark.parametrize("name", WRITERS)
def test_ids_are_unique_and_the_same_each_time(name: str, everything: Path) -> None:
    task, examples = load_own(name, everything)
    again = [each.id for each in load_own(name, everything)[1]]
    assert [each.id for each in examples] == again
    assert len(set(again)) == len(again) > 0
    for each in examples[:2]:
        requests = task.requests(each, ())
        assert len({type(request) for request in requests}) == 1 and len(requests) == len(task.gold_answers(each))
        assert requests == task.requests(each, ())


@pytest.mark.parametrize("name", PUBLISHED)
def test_data_is_found_below_any_folder_and_in_archives(name: str, tmp_path: Path) -> None:
    task = TASKS[name]()
    (tmp_path / "in").mkdir()
    WRITERS[name](tmp_path / "in")
    [folder] = (tmp_path / "in").iterdir()
    expected = [each.record for each in task.load(folder, task.splits[0])]
    with tarfile.open(tmp_path / "own.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    assert [each.record for each in task.load(tmp_path / "own.tar.gz", task.splits[0])] == expected
    shutil.make_archive(str(tmp_path / "own"), "zip", tmp_path / "in")
    assert [each.record for each in task.load(tmp_path / "own.zip", task.splits[0])] == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_missing_is_named_with_what_is_expected_and_where_it_is_published(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing of a task")
    write_lines(tmp_path / "other.jsonl", [{"review": "good"}])
    task = TASKS[name]()
    with pytest.raises(UserError) as caught:
        task.load(tmp_path, task.splits[0])
    message = str(caught.value)
    assert f"no data of task {name} there" in message and task.published in message and task.layout in message
    assert "\n" not in message and str(tmp_path) in message
    with pytest.raises(UserError, match="no such file or folder"):
        task.load(tmp_path / "absent", task.splits[0])
    with pytest.raises(UserError, match="no such split"):
        task.load(tmp_path, "tset")


def test_a_missing_split_is_answered_with_the_one_that_is_there(tmp_path: Path) -> None:
    write_gsm8k(tmp_path)
    (tmp_path / "gsm8k" / "test.jsonl").unlink()
    with pytest.raises(MissingSplit, match=r"no split test.*found train: .*train\.jsonl; use --split train") as caught:
        TASKS["gsm8k"]().load(tmp_path, "test")
    assert caught.value.found == ("train",)


def test_two_files_of_one_split_are_not_mixed(tmp_path: Path) -> None:
    write_gsm8k(tmp_path)
    shutil.copy(tmp_path / "gsm8k" / "test.jsonl", tmp_path / "gsm8k" / "old-test.jsonl")
    with pytest.raises(UserError, match=r"2 files of task gsm8k hold split test .*give --data one of them"):
        TASKS["gsm8k"]().load(tmp_path, "test")
    assert len(TASKS["gsm8k"]().load(tmp_path / "gsm8k" / "old-test.jsonl", "test")) == 7


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b'{"question": "q", "answer": "cut o', "line 8: no JSON"),
        (b'{"question": "q"}\n', "line 8: it has 'question'"),
        (b"\xff\xfe\n", "line 8: not UTF-8"),
        (b'{"question": "\\ud800", "answer": "#### 1"}\n', "line 8: half a surrogate pair"),
    ],
)
def test_a_damaged_line_is_an_error_and_not_left_out(tmp_path: Path, damage: bytes, message: str) -> None:
    write_gsm8k(tmp_path)
    file = tmp_path / "gsm8k" / "test.jsonl"
    file.write_bytes(file.read_bytes() + damage)
    for path in (file, tmp_path):
        with pytest.raises(UserError, match=f"{message}.*get it again: https"):
            TASKS["gsm8k"]().load(path, "test")


def test_a_damaged_archive_is_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "MATH.tar.gz", "w:gz") as archive:
        WRITERS["math"](tmp_path)
        archive.add(tmp_path / "MATH", "MATH")
    content = (tmp_path / "MATH.tar.gz").read_bytes()
    (tmp_path / "MATH.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"MATH\.tar\.gz: cannot be read"):
        TASKS["math"]().load(tmp_path / "MATH.tar.gz", "test")


def test_arc_needs_both_sets_and_reports_them_as_groups(tmp_path: Path) -> None:
    write_arc(tmp_path)
    examples = TASKS["arc"]().load(tmp_path, "validation")
    assert [each.groups["set"] for each in examples] == ["easy"] * 5 + ["challenge"] * 5
    shutil.rmtree(tmp_path / "ARC-V1-Feb2018-2" / "ARC-Easy")
    with pytest.raises(UserError, match=r"no easy set of split test there.*use --tasks arc_challenge"):
        TASKS["arc"]().load(tmp_path, "test")


def test_labels_of_piqa_belong_to_its_goals(tmp_path: Path) -> None:
    write_piqa(tmp_path)
    task, labels = TASKS["piqa"](), tmp_path / "piqa" / "valid-labels.lst"
    assert [each.record["label"] for each in task.load(tmp_path / "piqa" / "valid.jsonl", "validation")] == [*"01011"]
    labels.write_text("0\n1\n")
    with pytest.raises(UserError, match=r"5 goals in .*valid\.jsonl but 2 labels"):
        task.load(tmp_path, "validation")
    labels.unlink()
    with pytest.raises(UserError, match=r"valid-labels\.lst is missing"):
        task.load(tmp_path, "validation")


def test_prompts_are_those_of_the_literature(everything: Path) -> None:
    def prompt(name: str, shots: int = 1) -> str:
        task, examples = load_own(name, everything)
        request = task.requests(examples[2], examples[:shots])[0]
        assert not isinstance(request, TextRequest)
        return request.prompt if isinstance(request, GenerateRequest) else request.context

    question = "Question: A crate holds 5 apples. How many do 1,000 crates hold?\nAnswer:"
    assert prompt("gsm8k").endswith(f"#### 3,000\n\n{question}")
    assert prompt("nq_open") == "Q: who built bridge 0?\nA: Engineer 0\n\nQ: who built bridge 2?\nA:"
    assert prompt("arc_easy", 0) == "Question: How many legs have 2 stools?\nAnswer:"
    assert prompt("openbookqa") == "How many legs have 0 stools? 0 legs\n\nHow many legs have 2 stools?"
    assert prompt("hellaswag", 0) == "Baking bread: How to bake 2 loaves. Mix the dough. Wait. Then"
    assert prompt("piqa", 0) == "Question: Open jar 2\nAnswer:"
    assert prompt("last_word", 0) == "she looked for the boat number 2 , but nobody had seen the"
    assert prompt("math").startswith("Problem:\nWhat is $0 + 1/2$?\n\nSolution:\nWe add 0 and a half")
    assert prompt("math").endswith(
        "Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.\n\n"
        "Problem:\nWhat is $2 + 1/2$?\n\nSolution:"
    )


def test_marks_of_hellaswag_are_removed_from_texts_and_choices(everything: Path) -> None:
    task, examples = load_own("hellaswag", everything)
    first, second = task.requests(examples[0], ())[:2]
    assert isinstance(first, ContinuationRequest) and isinstance(second, ContinuationRequest)
    assert "[" not in first.context and first.context.endswith("Wait. Then")
    assert second.continuation == " paint it blue."


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" It is 5000.\n#### 5,000", 1, 1),
        (" #### $5000.00", 1, 1),
        (" 5 crates, so $5,000.", 0, 1),
        (" #### 5000\nNo, 5001", 1, 0),
        (" #### 500", 0, 0),
        (" five thousand", 0, 0),
        (" #### ,.,", 0, 0),
        (" -5000", 0, 0),
    ],
)
def test_numbers_of_gsm8k(everything: Path, text: str, strict: int, flexible: int) -> None:
    task, examples = load_own("gsm8k", everything)
    assert task.score(examples[2], one_continuation(text)) == {"strict": strict, "flexible": flexible}


def test_every_alias_of_nq_open_counts_and_no_other(everything: Path) -> None:
    task, examples = load_own("nq_open", everything)
    for text, right in (("Engineer 0", 1), (" the engineer, 0.\nQ: who", 1), ("firm 0", 1), ("Firm", 0), (".", 0)):
        assert task.score(examples[0], one_continuation(text))["exact_match"] == right, text


def test_records_that_hugging_face_publishes_are_read(tmp_path: Path) -> None:
    records = [
        {"problem": "p", "solution": r"\boxed{1}", "answer": "1", "subject": "Algebra", "level": 5, "unique_id": "t/1"}
    ]
    write_lines(tmp_path / "math500" / "test.jsonl", records)
    [example] = TASKS["math"]().load(tmp_path, "test")
    assert example.id == "t/1" and example.groups == {"level": "Level 5", "subject": "Algebra"}
