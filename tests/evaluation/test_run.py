"""Evaluations: prompts are the same for all models, results survive interruptions, errors follow their formulas."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from kabrn_dist.evaluation.requests import GenerateRequest
from kabrn_dist.evaluation.results import TaskScores
from kabrn_dist.evaluation.run import Evaluation, EvaluationProgress, run_evaluation
from kabrn_dist.evaluation.statistics import estimate_scores, standard_error_of_mean
from kabrn_dist.evaluation.task_data import TaskData
from kabrn_dist.evaluation.workers import ModelChoice
from kabrn_dist.utils.errors import UserError
from tests.support.evaluation import Adding, Compression, RuleModel, answer_by, load_sums, write_sums


def evaluate(out: Path, *tasks: TaskData, model: RuleModel | None = None, stop_after: int = -1) -> list[TaskScores]:
    evaluation = Evaluation(ModelChoice(Path("none")), list(tasks), out)
    news: list[EvaluationProgress] = []
    _, scores = run_evaluation(evaluation, news.append, answer_by(model or RuleModel(), stop_after))
    assert [each.task for each in news if each.scores is not None] == list(range(len(tasks)))
    return scores


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_groups_and_files_of_an_evaluation(tmp_path: Path) -> None:
    data = load_sums(write_sums(tmp_path / "data"))
    (scores,) = evaluate(tmp_path / "out", data)
    # Of the sums of 1 to 12, four are wrong by one, and one is not answered.
    assert scores.scores["exact_match"].value == 7 / 12 and next(iter(scores.scores)) == "exact_match"
    assert math.isclose(scores.scores["exact_match"].stderr, math.sqrt(7 / 12 * 5 / 12 / 12))
    lengths = [result.scores["length"] for result in scores.results]
    assert math.isclose(scores.scores["length"].stderr, statistics.stdev(lengths) / math.sqrt(12))
    groups = scores.groups["size"]
    assert groups["small"].count == 9 and groups["small"].scores["exact_match"].value == 5 / 9
    assert groups["large"].count == 3 and groups["large"].scores["exact_match"].value == 2 / 3
    assert scores.notes == ["1 of 12 answers are empty: the model ended the text, or the line, at once"]
    header, *lines = read_lines(tmp_path / "out" / "adding.jsonl")
    assert header["task"] == "adding" and header["model"]["fingerprint"] == "f" * 64
    assert [line["id"] for line in lines] == data.order
    assert lines[0]["prompts"][0].count("Add") == 3 and lines[0]["outputs"][0][0]["finish_reason"] == "stop"
    assert lines[0]["groups"]["size"] in ("small", "large") and lines[0]["expected"]
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert summary["tasks"]["adding"]["scores"]["exact_match"]["value"] == 7 / 12
    assert summary["tasks"]["adding"]["n"] == summary["tasks"]["adding"]["n_split"] == 12
    assert summary["versions"]["kabrn_dist"] and summary["tasks"]["adding"]["settings"]["shots"] == 2


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_file(tmp_path: Path) -> None:
    tasks = [load_sums(write_sums(tmp_path / "data"), task) for task in (Adding, Compression)]
    evaluate(tmp_path / "whole", *tasks)
    for stop in (3, 15):
        with pytest.raises(KeyboardInterrupt):
            evaluate(tmp_path / "parts", *tasks, stop_after=stop)
    model = RuleModel()
    evaluate(tmp_path / "parts", *tasks, model=model)
    # 3, and of what was left 15 were answered.
    assert len(model.asked) == 24 - 18
    for name in ("adding.jsonl", "compression.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_line_that_was_half_written_is_asked_again(tmp_path: Path) -> None:
    data = load_sums(write_sums(tmp_path / "data"))
    evaluate(tmp_path, data)
    whole = (tmp_path / "adding.jsonl").read_bytes()
    (tmp_path / "adding.jsonl").write_bytes(whole[:-20])
    model = RuleModel()
    evaluate(tmp_path, data, model=model)
    assert len(model.asked) == 1 and (tmp_path / "adding.jsonl").read_bytes() == whole
    # Nothing but a part of the first line.
    (tmp_path / "adding.jsonl").write_bytes(whole[:20])
    evaluate(tmp_path, data)
    assert (tmp_path / "adding.jsonl").read_bytes() == whole


def test_a_larger_limit_adds_to_what_is_there(tmp_path: Path) -> None:
    folder = write_sums(tmp_path / "data")
    evaluate(tmp_path / "out", load_sums(folder, limit=5))
    model = RuleModel()
    (scores,) = evaluate(tmp_path / "out", load_sums(folder, limit=8), model=model)
    assert len(model.asked) == 3 and len(scores.results) == 8
    assert "8 of 12 examples, chosen by seed 0" in scores.notes
    (scores,) = evaluate(tmp_path / "out", load_sums(folder, limit=2), model=model)
    assert len(model.asked) == 3 and len(scores.results) == 2
    assert len(read_lines(tmp_path / "out" / "adding.jsonl")) == 1 + 8
    (scores,) = evaluate(tmp_path / "out", load_sums(folder, limit=99))
    assert len(scores.results) == 12
    assert "--limit 99 is more than the split has: all 12 examples were asked" in scores.notes


def test_results_of_something_else_are_refused_by_name(tmp_path: Path) -> None:
    folder, out = write_sums(tmp_path / "data"), tmp_path / "out"
    evaluate(out, load_sums(folder))
    with pytest.raises(UserError, match=r"another model or tokenizer, rule with the fingerprint f{12}, .* --out"):
        evaluate(out, load_sums(folder), model=RuleModel("0" * 64))
    for changed, words in (({"shots": 1}, "shots 2, this evaluation has 1"), ({"seed": 4}, "seed 0")):
        with pytest.raises(UserError, match=f"adding.jsonl: holds results with {words}"):
            evaluate(out, load_sums(folder, **changed))
    write_sums(folder, 13)
    with pytest.raises(
        UserError, match=rf"holds results of other examples, those of {folder} \(sha256 [0-9a-f]{{12}}\); this"
    ):
        evaluate(out, load_sums(folder))
    (out / "adding.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match="is not a file of results"):
        evaluate(out, load_sums(folder))
    header = {"format": "mixkabrn evaluation", "version": 1}
    (out / "adding.jsonl").write_text(json.dumps(header) + "\n" + json.dumps(header) + "\n")
    with pytest.raises(UserError, match="holds results with task None"):
        evaluate(out, load_sums(folder))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    data = load_sums(write_sums(tmp_path / "data"))
    evaluate(tmp_path, data)
    lines = (tmp_path / "adding.jsonl").read_text().splitlines()
    without = {**json.loads(lines[3]), "scores": {}}
    unlike = {**json.loads(lines[3]), "scores": {"acc": math.nan}}
    for damaged in ("{damaged", json.dumps(without), json.dumps(unlike)):
        (tmp_path / "adding.jsonl").write_text("\n".join([*lines[:3], damaged, *lines[3:]]) + "\n")
        with pytest.raises(UserError, match=r"adding.jsonl: line 4 is no result; remove the line"):
            evaluate(tmp_path, data)
    for key in ("settings", "model"):
        header = {**json.loads(lines[0]), key: [1]}
        (tmp_path / "adding.jsonl").write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
        with pytest.raises(UserError, match=r"adding.jsonl: is not a file of results"):
            evaluate(tmp_path, data)


def test_prompts_begin_with_the_same_examples_and_never_hold_the_answer(tmp_path: Path) -> None:
    folder = write_sums(tmp_path / "data")
    model = RuleModel()
    evaluate(tmp_path / "out", load_sums(folder), model=model)
    prompts = [request.prompt for request in model.asked if isinstance(request, GenerateRequest)]
    assert len({prompt.rsplit("Add", 1)[0] for prompt in prompts}) == 1
    other = load_sums(folder, seed=1)
    assert other.shots != load_sums(folder).shots or other.order != load_sums(folder).order
    # Where the examples are drawn from what is asked, none is in its own prompt.
    data = load_sums(folder)
    pool = TaskData(data.task, data.settings, data.examples, data.examples[:3], data.order, "")
    for example in data.examples:
        (request,) = pool.make_requests(example, 2)
        assert isinstance(request, GenerateRequest) and request.prompt.count("Add") == 3
        assert request.prompt.count(f"Add {example.record['a']}+{example.record['b']}:") == 1


def test_prompts_that_are_too_long_lose_examples(tmp_path: Path) -> None:
    folder = write_sums(tmp_path / "data")
    model = RuleModel()
    (scores,) = evaluate(tmp_path / "out", load_sums(folder, prompt_tokens=24), model=model)
    assert {result.shots for result in scores.results} == {1}
    assert any("12 prompts were cut to 24 tokens, with 1 to 1 few-shot examples" in note for note in scores.notes)
    # Without examples a prompt stays as it is, however long.
    (scores,) = evaluate(tmp_path / "none", load_sums(folder, prompt_tokens=1))
    assert {result.shots for result in scores.results} == {0}


def test_draws_depend_on_the_seed_and_the_example_alone(tmp_path: Path) -> None:
    data = load_sums(write_sums(tmp_path / "data"), num_samples=3, temperature=0.8)
    seeds = []
    for example in data.examples:
        (request,) = data.make_requests(example, 0)
        assert isinstance(request, GenerateRequest)
        assert (request.num_samples, request.temperature, request.top_p) == (3, 0.8, 0.95)
        seeds.append(request.seed)
    assert len(set(seeds)) == 12
    again = load_sums(tmp_path / "data", num_samples=3, temperature=0.8, limit=4)
    assert [again.make_requests(example, 0)[0].seed for example in again.examples] == seeds[:4]  # type: ignore[union-attr]


def test_what_cannot_be_asked_is_refused_with_a_remedy(tmp_path: Path) -> None:
    folder = write_sums(tmp_path / "data")
    with pytest.raises(UserError, match=r"5 few-shot examples are asked for, .* holds 4; add some, or use --shots 4"):
        load_sums(folder, shots=5)
    with pytest.raises(UserError, match="compression: has no few-shot examples; use --shots 0"):
        load_sums(folder, Compression, shots=1)
    (folder / "test.jsonl").write_text("")
    with pytest.raises(UserError, match=r"the split test of .* holds no examples; adding is published at nowhere"):
        load_sums(folder)


def test_standard_errors_of_means_and_of_quotients(tmp_path: Path) -> None:
    assert standard_error_of_mean([1, 1, 0, 0]) == 0.25
    assert math.isnan(standard_error_of_mean([1.0])) and math.isnan(standard_error_of_mean([]))
    values = [0.5, 2.0, 3.5, 1.0]
    assert math.isclose(standard_error_of_mean(values), statistics.stdev(values) / 2)
    # The jackknife of a quotient with equal denominators is the error of the mean.
    scores = [{"nats": value, "bytes": 2.0} for value in values]
    found = estimate_scores(Compression(), scores)["nats_per_byte"]
    assert math.isclose(found.value, 1.75 / 2) and math.isclose(found.stderr, statistics.stdev(values) / 4)
    assert math.isnan(estimate_scores(Compression(), scores[:1])["nats_per_byte"].stderr)
    assert estimate_scores(Adding(), []) == {}


def test_two_evaluations_cannot_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kabrn_dist.evaluation import result_file
    from kabrn_dist.evaluation.run import open_results

    monkeypatch.setattr(result_file, "PATIENCE_SECONDS", 0.0)
    data = load_sums(write_sums(tmp_path / "data"))
    with open_results(tmp_path, data), pytest.raises(UserError, match="another evaluation is writing there"):
        open_results(tmp_path, data)


def test_later_tasks_join_the_earlier_ones_of_a_model(tmp_path: Path) -> None:
    folder = write_sums(tmp_path / "data")
    evaluate(tmp_path / "out", load_sums(folder))
    evaluate(tmp_path / "out", load_sums(folder, Compression))
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(summary["tasks"]) == ["adding", "compression"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<h2>adding</h2>" in page and "<h2>compression</h2>" in page
