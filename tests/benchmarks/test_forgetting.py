"""The benchmarks of fine-tuning: averages by hand, rows, what a log has, and quick runs from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from benchmarks.finetune_costs import QUICK_WAYS
from benchmarks.finetune_domains import Exercise, list_domains, take
from benchmarks.finetune_measure import count_right_answers
from benchmarks.finetune_run import METHODS, RATES, DomainSequence, Outcome
from benchmarks.forgetting import append_sequence, average_way, fill, group_ways, read_sequences
from benchmarks.forgetting_matrix import Measurement, average_matrices, stack_measurements
from benchmarks.report import Report
from kabrn_dist.data.dataset import Batch
from tests.benchmarks.test_benchmarks import check_form
from tests.support.runs import start_command, wait_for_exit

EXACT = {"addition", "dates", "transliteration", "roman", "sorting"}


def make_outcome(shift: float = 0.0) -> Outcome:
    """Two domains; each row is what is known of the base's data and of both."""
    rows = [
        [(2.0, 0.5, 0.0), (4.0, 0.1, 0.0), (8.0, 0.2, 0.0)],
        [(2.5, 0.4, 0.0), (1.0, 0.9, 0.8), (7.0, 0.3, 0.0)],
        [(3.0 + shift, 0.3, 0.0), (2.0, 0.6, 0.4), (1.5, 0.8, 0.6)],
    ]
    return Outcome([[Measurement(*each) for each in row] for row in rows], [1.0, 2.0], 10)


def make_sequence(
    method: str = "lora", experts: str = "rational", replay: float = 0.0, seed: int = 1
) -> DomainSequence:
    chosen = next(each for each in METHODS if each == method)
    names = ("addition", "dates")
    return DomainSequence(chosen, experts, replay, seed, names, "smallest", 3, 3, 100, 2, RATES[chosen])


def test_averages_are_those_by_hand() -> None:
    bits, accuracy, answers = stack_measurements([make_outcome().measured])
    one = average_matrices(bits, accuracy, answers)
    assert one.learned == pytest.approx((0.9 + 0.8) / 2)
    assert one.accuracy == pytest.approx((0.6 + 0.8) / 2)
    assert one.backward == pytest.approx(0.6 - 0.9)
    assert one.forward == pytest.approx(0.3 - 0.2)
    assert one.learned_bits == pytest.approx((1.0 + 1.5) / 2)
    assert one.bits == pytest.approx((2.0 + 1.5) / 2)
    assert one.bits_rise == pytest.approx(2.0 - 1.0)
    assert one.base_rise == pytest.approx(3.0 / 2.0 - 1)
    assert (one.answers_learned, one.answers) == (pytest.approx(0.7), pytest.approx(0.5))


def test_averages_over_seeds_are_those_of_the_mean_matrix() -> None:
    assert average_way([make_outcome(), make_outcome(shift=1.0)]).base_rise == pytest.approx(3.5 / 2.0 - 1)


def test_rows_put_both_kinds_of_experts_side_by_side_and_say_what_was_not_run() -> None:
    outcomes = {
        make_sequence(method, experts, replay): make_outcome(1.0 if experts == "swiglu" else 0.0)
        for method in METHODS
        for experts in ("rational", "swiglu")
        for replay in (0.0, 0.2)
        if (method, experts) != ("state", "swiglu")
    }
    report = Report("")
    fill(report, group_ways(outcomes))
    rows = {row.name: row for row in report.rows}
    for method in METHODS:
        for replay in ("0", "0.2"):
            row = rows[f"{method}, replay {replay}, base rise, rival: swiglu"]
            assert row.ours == pytest.approx(0.5)
            assert row.rival == ("missing: not run" if method == "state" else pytest.approx(1.0))
    assert len(rows) == len(METHODS) * 2 * 7


def test_a_log_gives_back_what_was_run(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "log.jsonl"
    entries = {make_sequence(seed=seed): make_outcome(float(seed)) for seed in (1, 2)}
    for sequence, outcome in entries.items():
        append_sequence(log, sequence, outcome)
    assert read_sequences(log) == entries


def test_an_answer_is_right_if_all_its_tokens_are() -> None:
    # Two documents in the first row; the second row has one, and no answer.
    targets = torch.tensor([[-100, 5, 6, -100, 7], [-100, -100, -100, -100, -100]])
    documents = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    batch = Batch(targets.abs(), targets, documents, torch.zeros_like(targets), torch.zeros(2, dtype=torch.int64))
    hits = torch.tensor([[False, True, False, True, True], [True] * 5])
    assert count_right_answers(batch, hits) == (1, 2)
    assert count_right_answers(batch, torch.ones_like(hits)) == (2, 2)


def test_domains_are_the_same_for_the_same_seed_and_repeat_no_question() -> None:
    for name, domain in list_domains(None).items():
        first = take(domain, 1, 50)
        assert first == take(domain, 1, 50) != take(domain, 2, 50)
        assert (name in EXACT) == isinstance(first[0], Exercise)
        if name in EXACT:
            questions = [each.question for each in domain.documents(Random(3)) if isinstance(each, Exercise)]
            assert len(questions) == len(set(questions)) >= 10_000


def test_exercises_are_right() -> None:
    additions, dates, _, romans, _, _ = (take(domain, 1, 20) for domain in list_domains(None).values())
    for each in (*additions, *dates, *romans):
        assert isinstance(each, Exercise)
    for question, answer in additions:
        words = question.strip("?").split()
        assert int(words[2]) + int(words[4]) == int(answer)
    values = dict(zip("IVXLCDM", (1, 5, 10, 50, 100, 500, 1000), strict=True))
    for question, answer in romans:
        numbers = np.array([values[letter] for letter in answer] + [0])
        signs = np.where(numbers[:-1] < numbers[1:], -1, 1)
        assert str((signs * numbers[:-1]).sum()) in question


@pytest.mark.slow
def test_forgetting_runs_and_a_second_call_takes_the_log(tmp_path: Path) -> None:
    path, log = tmp_path / "forgetting.json", tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "benchmarks.forgetting", "--quick", "--jobs", "1", "--methods", "lora"]
    command += ["--experts", "rational", "--replays", "0.2", "--work", str(tmp_path), "--log", str(log)]
    command += ["--json", str(path)]
    result = wait_for_exit(start_command(command, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"), timeout=600)
    assert result.exit_code == 0, result.output + (tmp_path / "output.log").read_text()
    content = json.loads(path.read_text())
    check_form(content)
    assert all(row["name"].startswith("lora, replay 0.2, ") for row in content["rows"])
    # The second domain goes on with the adapter of the first.
    assert (tmp_path / "output.log").read_text().count("goes on with the adapter of") == 1
    again = wait_for_exit(start_command(command, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"), timeout=600)
    assert again.exit_code == 0 and len(log.read_text().splitlines()) == 1
    assert json.loads(path.read_text())["rows"] == content["rows"]


@pytest.mark.slow
def test_finetuning_runs(tmp_path: Path) -> None:
    path = tmp_path / "finetuning.json"
    command = [sys.executable, "-m", "benchmarks.finetuning", "--quick", "--work", str(tmp_path), "--json", str(path)]
    result = wait_for_exit(start_command(command, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"), timeout=600)
    assert result.exit_code == 0, result.output + (tmp_path / "output.log").read_text()
    content = json.loads(path.read_text())
    check_form(content)
    names = [row["name"] for row in content["rows"]]
    for way in QUICK_WAYS:
        assert f"{way}: peak memory" in names
    for method in METHODS:
        assert f"dates, {method}, replay 0.2: loss, rival: full" in names
        assert f"dates, {method}: right answers after, rival: before" in names
    assert "dates, replay 0: loss of ternary_lora over that of full" in content["aims"]
