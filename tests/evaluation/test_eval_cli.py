"""`mixkabrn eval` on a real run: several processes, kills, and mistakes in one line before any work begins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kabrn_dist.cli.eval_ import assign_values, choose_tasks
from kabrn_dist.cli.main import main
from kabrn_dist.evaluation.registry import TASKS
from kabrn_dist.utils.errors import UserError
from tests.support.benchmarks import write_benchmarks
from tests.support.runs import ROOT, run_sessions, write_small_config

BOTH = ("--tasks", "nq_open,openbookqa", "--shots", "2")


@pytest.fixture(scope="module")
def run_folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    write_benchmarks(folder / "data")
    # Of ternary models, another rounding of a sum may move a value across a threshold of the int8 quantizer.
    changes = {"training__steps": 2, "model__quantize": False}
    config = write_small_config(folder / "config.yaml", shards, folder / "run", **changes)
    run_sessions(1, [[str(config), "never", None]], folder)
    return folder


def evaluate(folder: Path, out: Path, *options: str) -> int:
    return main(["eval", str(folder / "run"), "--data", str(folder / "data"), "--out", str(out), *options])


def start(folder: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kabrn_dist", "eval", str(folder / "run"), "--data", str(folder / "data")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--out", str(out), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


def list_workers(process: subprocess.Popen[str]) -> list[int]:
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


@pytest.fixture(scope="module")
def whole(run_folder: Path) -> Path:
    assert evaluate(run_folder, run_folder / "whole", *BOTH) == 0
    return run_folder / "whole"


@pytest.mark.slow
def test_scores_are_those_of_the_answers_and_the_table_has_them(whole: Path, run_folder: Path) -> None:
    tasks = json.loads((whole / "results.json").read_text())["tasks"]
    assert tasks["openbookqa"]["n"] == tasks["nq_open"]["n"] == 8
    lines = [json.loads(line) for line in (whole / "openbookqa.jsonl").read_text().splitlines()[1:]]
    assert tasks["openbookqa"]["scores"]["acc"]["value"] == sum(line["scores"]["acc"] for line in lines) / 8
    for line in lines:
        best = max(line["outputs"], key=lambda output: output["logprob"])
        assert line["scores"]["acc"] == (best["continuation"] == line["expected"][0])
    assert (whole / "index.html").stat().st_size < 200_000


@pytest.mark.slow
def test_neither_processes_nor_batches_change_the_results(
    whole: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(run_folder, tmp_path / "two", *BOTH, "--processes", "2", "--batch-size", "3") == 0
    shown = capsys.readouterr().out
    assert "nq_open" in shown and "openbookqa" in shown and "run at step 2: scores" in shown
    for name in ("nq_open", "openbookqa"):
        pair = [(folder / f"{name}.jsonl").read_text().splitlines() for folder in (whole, tmp_path / "two")]
        assert pair[0][0] == pair[1][0]
        for one, two in zip(*(map(json.loads, lines[1:]) for lines in pair), strict=True):
            assert one["id"] == two["id"] and one["scores"] == two["scores"] and one["prompts"] == two["prompts"]
            for a, b in zip(one["outputs"], two["outputs"], strict=True):
                assert a == b or abs(a["logprob"] - b["logprob"]) < 1e-3


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_file(whole: Path, run_folder: Path, tmp_path: Path) -> None:
    process = start(run_folder, tmp_path / "out", *BOTH, "--batch-size", "1")
    wait_for_lines(tmp_path / "out" / "nq_open.jsonl", 4, process)
    process.kill()
    process.communicate()
    before = (tmp_path / "out" / "nq_open.jsonl").read_bytes()
    assert 4 <= before.count(b"\n") < 10
    assert evaluate(run_folder, tmp_path / "out", *BOTH) == 0
    after = (tmp_path / "out" / "nq_open.jsonl").read_bytes()
    assert after == (whole / "nq_open.jsonl").read_bytes()


@pytest.mark.slow
def test_a_killed_worker_ends_the_evaluation_with_a_message(run_folder: Path, tmp_path: Path) -> None:
    process = start(run_folder, tmp_path / "out", *BOTH, "--processes", "2", "--batch-size", "1")
    wait_for_lines(tmp_path / "out" / "nq_open.jsonl", 3, process)
    workers = list_workers(process)
    os.kill(workers[1], signal.SIGKILL)
    shown = process.communicate(timeout=300)[0]
    assert process.returncode == 2, shown
    assert "error: worker 2 was killed by SIGKILL; if memory ran out" in shown and "the same command goes on" in shown
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert evaluate(run_folder, tmp_path / "out", *BOTH) == 0


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(run_folder: Path, tmp_path: Path) -> None:
    process = start(run_folder, tmp_path / "out", *BOTH, "--processes", "2", "--batch-size", "1")
    wait_for_lines(tmp_path / "out" / "nq_open.jsonl", 2, process)
    workers = list_workers(process)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}/exe").exists() and _is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


MISTAKES = {
    ("--tasks", "gsm9k"): "--tasks: 'gsm9k' is no task; did you mean gsm8k",
    ("--tasks", ""): "--tasks: names no task; use some of math, ",
    ("--tasks", "gsm8k"): "no data of task gsm8k there",
    ("--tasks", "humaneval"): "allow it with --allow-code",
    ("--tasks", "nq_open", "--split", "dev"): "nq_open: has no split 'dev'; its splits are validation",
    ("--tasks", "nq_open", "--shots", "9"): "holds 6; add some, or use --shots 6",
    ("--tasks", "nq_open", "--shots", "gsm8k=2"): "--shots gsm8k=2: 'gsm8k' is none of --tasks",
    ("--tasks", "nq_open", "--shots", "two"): "--shots: 'two' is not a whole number",
    ("--tasks", "nq_open", "--num-samples", "3"): "all answers are the same without --temperature",
    ("--tasks", "nq_open", "--temperature", "-1"): "--temperature -1: is no temperature",
    ("--tasks", "nq_open", "--data", "nowhere"): "--data nowhere: ",
    ("--tasks", "nq_open", "--prompt-tokens", "-2"): "--prompt-tokens -2: is less than 0",
    ("--tasks", "nq_open", "--limit", "0"): "--limit: 0 is less than 1",
}


@pytest.mark.parametrize("options", MISTAKES, ids=" ".join)
def test_mistakes_are_told_before_a_model_is_loaded(
    options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # There is no checkpoint in this run: loading it would fail otherwise.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    write_benchmarks(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert evaluate(tmp_path, tmp_path / "out", *options) == 2
    shown = capsys.readouterr().err
    assert MISTAKES[options] in shown and shown.count("\n") == 1 and shown.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_models_that_are_none_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_benchmarks(tmp_path / "data")
    for model, words in ((tmp_path / "none", "no such folder"), (tmp_path / "data", "name the folder of a run")):
        assert main(["eval", str(model), "--tasks", "nq_open", "--data", str(tmp_path / "data")]) == 2
        assert words in capsys.readouterr().err
    assert main(["eval", "--tasks", "nq_open", "--data", str(tmp_path / "data")]) == 2
    assert "MODEL is missing" in capsys.readouterr().err


def test_the_list_names_every_task_with_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list"]) == 0
    shown = capsys.readouterr().out
    for name, task in TASKS.items():
        assert f"{name}: {task.description}" in shown and task.published in shown and task.layout in shown
    assert shown.count("needs --allow-code") == sum(task.runs_code for task in TASKS.values()) > 0


@pytest.mark.slow
def test_all_tasks_are_those_whose_data_is_there(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of its five few-shot examples, which are usual, nq_open has four here.
    assert evaluate(run_folder, tmp_path / "out", "--tasks", "all", "--limit", "1", "--shots", "2") == 0
    shown = capsys.readouterr().out
    assert "gsm8k: left out" in shown and "humaneval: left out" in shown
    assert {"nq_open", "openbookqa"} <= set(json.loads((tmp_path / "out" / "results.json").read_text())["tasks"])


@pytest.mark.slow
def test_contamination_of_shards_needs_no_model(
    shards: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--tasks", "openbookqa", "--data", str(run_folder / "data")]
    assert main(["eval", *data, "--contamination", str(shards)]) == 0
    assert "openbookqa" in capsys.readouterr().out


def test_names_and_values_of_tasks() -> None:
    assert choose_tasks(" GSM8K,math,gsm8k ", ["math", "gsm8k"]) == ["gsm8k", "math"]
    assert choose_tasks("all", ["math", "gsm8k"]) == ["math", "gsm8k"]
    names = ["math", "gsm8k"]
    assert assign_values("--data", ["a=b/c", "x", "math=y=z"], [*names, "a"]) == {
        "a": "b/c",
        "math": "y=z",
        "gsm8k": "x",
    }
    assert assign_values("--data", [], names) == {}
    for given in (["x", "y"], ["math=x", "math=y"], ["maths=x"]):
        with pytest.raises(UserError, match="--data"):
            assign_values("--data", given, names)
