"""The page of an evaluation: well-formed, self-contained, everything escaped, right and wrong answers apart."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kabrn_dist.evaluation import progress
from kabrn_dist.evaluation.console import make_table, show_evaluation
from kabrn_dist.evaluation.requests import Continuation, GenerateRequest
from kabrn_dist.evaluation.results_page import describe_limit, read_samples, render_results_page
from kabrn_dist.evaluation.run import Evaluation, run_evaluation
from kabrn_dist.evaluation.statistics import estimate_scores
from kabrn_dist.evaluation.workers import Events, ModelChoice
from tests.support.browser import CHROMIUM, start_browser
from tests.support.evaluation import Adding, Compression, RuleModel, answer_by, load_sums, write_sums

_VOID = {"meta", "br"}
HOSTILE = '</pre><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"\x1b[2J\ud800'


class Reader(HTMLParser):
    """Reads a page strictly: every element is closed in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= set(attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


class HostileModel(RuleModel):
    name = "<b>rule</b>"

    def generate(self, requests):  # type: ignore[no-untyped-def]
        for number, found in super().generate(requests):
            yield (
                number,
                [Continuation(each.text + "\n" + HOSTILE if number % 2 else each.text, 9, "length") for each in found],
            )


def read_page(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = write_sums(tmp_path / "data", 20)
    tasks = [load_sums(folder), load_sums(folder, Compression)]
    evaluation = Evaluation(ModelChoice(Path("runs/<i>&")), tasks, tmp_path / "out")
    run_evaluation(evaluation, lambda news: None, answer_by(HostileModel()))
    return tmp_path / "out"


def test_the_page_is_well_formed_and_loads_nothing(out: Path) -> None:
    page = read_page(out / "index.html")
    assert page.tags >= {"table", "details", "pre", "h2"} and not page.tags & {"script", "img", "link", "iframe", "i"}
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "onerror", "onclick"}
    assert "url(" not in (out / "index.html").read_text() and "@import" not in (out / "index.html").read_text()
    assert ("content", "width=device-width, initial-scale=1") in page.attributes
    # What the model wrote is there, as text.
    assert "<script>alert(1)</script>" in page.text and "<b>rule</b>" in page.text and "runs/<i>&" in page.text
    assert "Wrong answers: 5 of 13 shown" in page.text and "By size" in page.text and "large" in page.text
    assert "Nats per byte <of text>" in page.text and "20 of 20 answers were cut" in page.text


def test_samples_are_right_or_wrong_or_neither(out: Path) -> None:
    tasks = json.loads((out / "results.json").read_text())["tasks"]
    found = read_samples(out / "adding.jsonl", tasks["adding"])
    assert found.is_accuracy and found.right and found.wrong
    assert all(result.scores["exact_match"] == 1 for result in found.right)
    assert all(result.scores["exact_match"] == 0 for result in found.wrong)
    found = read_samples(out / "compression.jsonl", tasks["compression"])
    assert not found.is_accuracy and len(found.right) == 5 and not found.wrong
    assert read_samples(out / "removed.jsonl", tasks["adding"]) == ([], [], True, 0, 0)
    summary = json.loads((out / "results.json").read_text())
    # Without its file, a task keeps its place in the table.
    page = render_results_page(summary, {name: read_samples(out / "removed", task) for name, task in tasks.items()})
    assert page.count("<h2>") == 2


def test_the_console_has_a_table_and_says_where_the_files_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_sums(write_sums(tmp_path / "data"))
    show_evaluation(Evaluation(ModelChoice(Path("none")), [data], tmp_path / "out"), answer_by(RuleModel()))
    shown = capsys.readouterr().out
    assert "adding: exact_match 0.5833 ± 0.1423, 12 examples" in shown
    assert "rule: scores" in shown and "1 of 12 answers are empty" in shown and "results.json" in shown
    assert "\x1b" not in shown


def test_a_table_shows_no_error_of_a_single_example(tmp_path: Path) -> None:
    data = load_sums(write_sums(tmp_path / "data", 1))
    evaluation = Evaluation(ModelChoice(Path("none")), [data], tmp_path / "out")
    model, scores = run_evaluation(evaluation, lambda news: None, answer_by(RuleModel()))
    shown = io.StringIO()
    Console(file=shown, width=100).print(make_table(model.name, scores))
    assert "exact_match │ 1.0000 │        – │        1" in shown.getvalue()
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["adding"]["scores"]["exact_match"]
    assert entry == {"value": 1.0, "stderr": None}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_fits_a_phone(out: Path, tmp_path: Path) -> None:
    with start_browser(tmp_path / "profile") as page:
        page.resize(360, 740, phone=True)
        page.open((out / "index.html").as_uri())
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("document.querySelectorAll('script, img').length") == 0
        assert not page.errors


def test_doubles_of_these_tests_are_right_on_gold_and_wrong_on_nothing(tmp_path: Path) -> None:
    task, data = Adding(), load_sums(write_sums(tmp_path))
    for example in data.examples:
        assert task.score(example, task.gold_answers(example))["exact_match"] == 1
        assert task.score(example, task.empty_answers(example))["exact_match"] == 0
    assert isinstance(data.make_requests(data.examples[0], 0)[0], GenerateRequest)


def test_lines_tell_of_the_work_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    folder = write_sums(tmp_path / "data")
    evaluation = Evaluation(
        ModelChoice(Path("none")), [load_sums(folder), load_sums(folder, Compression)], tmp_path / "out"
    )

    def slow(*arguments: Any) -> Events:
        for number, event in enumerate(answer_by(RuleModel(), 5)(*arguments)):
            yield event
            if number in (0, 5):
                time.sleep(0.3)
            if number == 5:
                # As `kill` and schedulers do.
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        show_evaluation(evaluation, slow)
    shown = capsys.readouterr().out
    assert shown.startswith("loading none\nadding: 12 examples, 2 few-shot examples in a prompt\n")
    assert "adding: 0 of 12 examples, after 0:00:00\n" in shown
    assert "adding: 5 of 12 examples, 10 tokens in them, after 0:00:0" in shown and "about 0:00:0" in shown
    assert f"kept in {tmp_path / 'out'}: adding 5 of 12 examples; the same command goes on\n" in shown
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    show_evaluation(evaluation, answer_by(RuleModel()))
    shown = capsys.readouterr().out
    assert "adding: 12 examples, 2 few-shot examples in a prompt, 5 of them were answered before\n" in shown
    size = sum(len(f"{a} <b>&{a % 4}" * a + ".") for a in range(1, 13))
    assert f"compression: 12 examples, whole documents of {size} bytes together\n" in shown
    assert "nats_per_byte ↓" in shown and "↓ lower is better" in shown


def test_answers_that_are_all_wrong_have_a_limit_in_place_of_an_error() -> None:
    found = estimate_scores(Adding(), [{"exact_match": 0.0, "length": 2.0}] * 60)
    assert round(found["exact_match"].limit, 4) == 0.0602 and math.isnan(found["length"].limit)
    assert describe_limit(found["exact_match"].limit, 0.0) == "≤ 0.0602" and describe_limit(0.9398, 1.0) == "≥ 0.9398"
