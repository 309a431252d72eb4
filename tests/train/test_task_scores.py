"""Tasks during training: the answers and scores of `mixkabrn eval` on the same weights, in any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kabrn_dist.cli.main import main
from kabrn_dist.config.file import load_config
from kabrn_dist.evaluation.load import load_evaluated_model
from kabrn_dist.train.task_scores import open_tasks
from kabrn_dist.utils.errors import UserError
from tests.support.benchmarks import write_benchmarks
from tests.support.runs import run_sessions, run_worker, write_small_config
from tests.workers.task_answers import ask

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [
        {"parallel__expert_parallel": 2},
        {"parallel__sequence_parallel": 2},
        {"parallel__zero_stage": 3},
        {"parallel__expert_parallel": 2, "parallel__sequence_parallel": 2, "parallel__zero_stage": 1},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
def test_a_model_in_training_answers_as_its_checkpoint_does(world: int, shards: Path, tmp_path: Path) -> None:
    jobs, folders = [], []
    for number, layout in enumerate(LAYOUTS[world]):
        folders.append(tmp_path / f"run{number}")
        changes = {"training__steps": 2, "model__quantize": False, **layout}
        config = write_small_config(tmp_path / f"{number}.yaml", shards, folders[-1], **changes)
        jobs.append([str(config), str(tmp_path / f"answers{number}.json")])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_worker(world, "tests.workers.task_answers", str(tmp_path / "jobs.json"))
    for folder, (_, answers) in zip(folders, jobs, strict=True):
        found = json.loads(Path(answers).read_text())
        expected = json.loads(json.dumps(ask(load_evaluated_model(folder))))
        assert found["texts"] == expected["texts"], folder
        for one, two in zip(found["scores"], expected["scores"], strict=True):
            assert one[1:] == two[1:] and one[0] == pytest.approx(two[0], abs=1e-4)
        for (nats, sizes), (their_nats, their_sizes) in zip(found["losses"], expected["losses"], strict=True):
            assert sizes == their_sizes and nats == pytest.approx(their_nats, abs=1e-4)


@pytest.mark.slow
def test_scores_at_intervals_are_those_of_eval_on_the_checkpoint_of_the_step(shards: Path, tmp_path: Path) -> None:
    data = write_benchmarks(tmp_path / "data")
    config = write_small_config(
        tmp_path / "config.yaml",
        shards,
        tmp_path / "run",
        training__steps=6,
        checkpoint__save_interval=4,
        validation__tasks=["openbookqa", "nq_open"],
        validation__task_data=str(data),
        validation__task_interval=4,
        validation__task_examples=5,
    )
    run_sessions(2, [[str(config), "never", None]], tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    scored = {entry["step"]: entry for entry in entries if "tasks/openbookqa/acc" in entry}
    # At the interval, and at the end.
    assert list(scored) == [4, 6]
    options = ["--tasks", "openbookqa,nq_open", "--data", str(data), "--limit", "5"]
    for step, entry in scored.items():
        out = tmp_path / f"eval{step}"
        assert main(["eval", str(tmp_path / "run"), *options, "--step", str(step), "--out", str(out)]) == 0
        tasks = json.loads((out / "results.json").read_text())["tasks"]
        expected = {
            f"tasks/{task}/{metric}": score["value"]
            for task, each in tasks.items()
            for metric, score in each["scores"].items()
        }
        assert {key: value for key, value in entry.items() if key.startswith("tasks/")} == pytest.approx(expected)
        assert len(expected) >= 3


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["gsm9k"], "validation.tasks: 'gsm9k' is no task; did you mean gsm8k?"),
        (["humaneval"], "validation.tasks: humaneval runs programs that the model wrote"),
        (["gsm8k"], "validation.tasks: .*no data of task gsm8k there"),
        (["perplexity"], "validation.tasks: perplexity reads documents of any length"),
    ],
)
def test_tasks_that_cannot_be_scored_are_refused_at_the_start(
    tasks: list[str], message: str, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "validation.txt").write_text("some words to read\n")
    path = write_small_config(
        tmp_path / "config.yaml",
        shards,
        tmp_path / "run",
        validation__tasks=tasks,
        validation__task_data=str(tmp_path / "data"),
    )
    with pytest.raises(UserError, match=message):
        open_tasks(load_config(path))
    assert main(["plan", str(path)]) == 2


def test_tasks_need_data(shards: Path, tmp_path: Path) -> None:
    path = write_small_config(tmp_path / "config.yaml", shards, tmp_path / "run", validation__tasks=["gsm8k"])
    with pytest.raises(UserError, match=r"validation.tasks gsm8k are read from validation.task_data, which is missing"):
        load_config(path)
