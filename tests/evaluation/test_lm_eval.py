"""lm-eval with this package's model, in an environment of its own: its numbers are those of `mixkabrn eval`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from kabrn_dist.cli.main import main
from kabrn_dist.evaluation.load import load_evaluated_model
from kabrn_dist.evaluation.requests import TextRequest
from tests.support.benchmarks import write_benchmarks
from tests.support.environments import make_environment, run_in_environment
from tests.support.native_models import write_random_model
from tests.support.runs import ROOT

TASKS = {
    "local_choices": {
        "file": "Main/test.jsonl",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question.stem}}",
        "doc_to_choice": "{{question.choices|map(attribute='text')|list}}",
        "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answerKey)}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_questions": {
        "file": "nq/NQ-open.dev.jsonl",
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}?\nA:",
        "doc_to_target": "{{answer[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 48},
        "metric_list": [{"metric": "exact_match"}],
    },
    "local_texts": {
        "file": "nq/NQ-open.dev.jsonl",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def write_task_files(folder: Path, data: Path) -> None:
    """Write lm-eval's descriptions of tasks that read local files."""
    folder.mkdir()
    for name, task in TASKS.items():
        described = {key: value for key, value in task.items() if key != "file"}
        files = {"data_files": {"test": str(data / str(task["file"]))}}
        described |= {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(described))


def read_samples_of(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def expect_bits_per_byte(folder: Path, model: Path) -> float:
    texts = [sample["doc"]["question"] for sample in read_samples_of(folder, "local_texts")]
    scores = [score for _, score in load_evaluated_model(model).score_texts([TextRequest(text) for text in texts])]
    nats = sum(float(score.nats.sum()) for score in scores)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@pytest.mark.slow
def test_lm_eval_finds_the_numbers_of_this_package(tmp_path: Path) -> None:
    environment = make_environment(
        "lm-eval-local", ["lm-eval==0.4.13", "pydantic", "pyyaml", "tokenizers", "zstandard"]
    )
    data, model = write_benchmarks(tmp_path / "data", 5), tmp_path / "model.mkb"
    write_random_model("plain", model)
    write_task_files(tmp_path / "tasks", data)
    command = ["lm_eval", "run", "--model", "mixkabrn", "--model_args", f"path={model}", "--tasks", ",".join(TASKS)]
    command += ["--include_path", "tasks", "--output_path", "out", "--log_samples"]
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {command!r}\n"
    start += "from kabrn_dist.evaluation.lm_eval_model import main; sys.exit(main())"
    done = run_in_environment(environment, ["-c", start], tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]

    options = ["--data", str(data), "--shots", "0", "--out", str(tmp_path / "ours")]
    assert main(["eval", str(model), "--tasks", "openbookqa,nq_open", *options]) == 0
    ours = json.loads((tmp_path / "ours" / "results.json").read_text())["tasks"]
    for metric in ("acc", "acc_norm"):
        assert theirs["local_choices"][f"{metric},none"] == ours["openbookqa"]["scores"][metric]["value"]
    for task, name in (("local_choices", "openbookqa"), ("local_questions", "nq_open")):
        lines = [json.loads(line) for line in (tmp_path / "ours" / f"{name}.jsonl").read_text().splitlines()[1:]]
        by_prompt = {line["prompts"][0]: line for line in lines}
        samples = read_samples_of(tmp_path / "out", task)
        assert len(samples) == len(lines) == 5
        for sample in samples:
            if task == "local_questions":
                outputs = by_prompt[f"Q: {sample['doc']['question']}?\nA:"]["outputs"]
                assert sample["resps"] == [[outputs[0][0]["text"]]]
                continue
            outputs = by_prompt[sample["doc"]["question"]["stem"]]["outputs"]
            found = [float(answer[0][0]) for answer in sample["resps"]]
            assert found == pytest.approx([output["logprob"] for output in outputs], abs=1e-4)
    assert theirs["local_texts"]["bits_per_byte,none"] == pytest.approx(
        expect_bits_per_byte(tmp_path / "out", model), rel=1e-6
    )
