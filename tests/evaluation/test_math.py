"""Answers of MATH: found, normalized, and compared, also those that would take forever.

Of the 308 pairs in math_pairs.jsonl, written for this test, 188 are equivalent. The normalization of texts says so of
105 of them, those that need no calculation, and of none of the others. math-verify contradicts 13 labels: of repeating
decimals, bases, powers of the imaginary unit, a root of a square, "5 million", \\big, and 7.41 with a percent sign.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kabrn_dist.evaluation.math_answer import find_final_answer
from kabrn_dist.evaluation.math_equivalence import MathComparer, UnfinishedComparison
from kabrn_dist.evaluation.math_normalization import is_same_answer
from kabrn_dist.evaluation.task import Example
from kabrn_dist.evaluation.tasks.generation import one_continuation
from kabrn_dist.evaluation.tasks.math import MathProblems
from kabrn_dist.utils.errors import UserError

PAIRS: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("math_pairs.jsonl").read_text().splitlines()
]
HALF = Example("test/x/1", {"problem": "p", "solution": r"It is $\boxed{\frac{1}{2}}$."})


def box(answer: str) -> str:
    return rf"$\boxed{{{answer}}}$"


@pytest.fixture(scope="module")
def comparer() -> Iterator[MathComparer]:
    comparer = MathComparer(1)
    yield comparer
    comparer.close()


def test_there_are_enough_pairs() -> None:
    assert len(PAIRS) >= 200 and len({(pair["a"], pair["b"]) for pair in PAIRS}) == len(PAIRS)
    assert 100 <= sum(pair["equivalent"] for pair in PAIRS) <= len(PAIRS) - 100


def test_normalized_texts_are_never_equal_for_different_answers() -> None:
    for pair in PAIRS:
        equal = is_same_answer(pair["a"], pair["b"])
        assert equal == is_same_answer(pair["b"], pair["a"]), pair
        assert pair["equivalent"] or not equal, pair
        assert is_same_answer(pair["a"], pair["a"]) and is_same_answer(pair["b"], pair["b"])


def test_normalized_texts_are_equal_where_nothing_is_to_be_calculated() -> None:
    """The rest needs arithmetic or algebra, such as sqrt 8 and 2 sqrt 2, or sets in another order."""
    found = sum(is_same_answer(pair["a"], pair["b"]) for pair in PAIRS if pair["equivalent"])
    assert found >= 100, f"{found} of {sum(pair['equivalent'] for pair in PAIRS)}"
    for first, second in (("1/2", "0.5"), (r"\frac12", ".5"), ("1,000", "1000"), (r"7.41\%", "7.41"), ("2.50", "5/2")):
        assert is_same_answer(first, second)


@pytest.mark.slow
def test_our_comparison_agrees_with_math_verify_called_directly(comparer: MathComparer) -> None:
    math_verify = pytest.importorskip("math_verify")
    with ThreadPoolExecutor(1) as ours:  # on another processor, meanwhile
        waiting = [ours.submit(comparer.equal, box(pair["a"]), box(pair["b"])) for pair in PAIRS]
        direct = [
            math_verify.verify(
                *(math_verify.parse(box(text), parsing_timeout=None) for text in (pair["a"], pair["b"])),
                timeout_seconds=None,
            )
            for pair in PAIRS
        ]
        agreed = sum(each.result() == expected for each, expected in zip(waiting, direct, strict=True))
    labeled = sum(equal == pair["equivalent"] for equal, pair in zip(direct, PAIRS, strict=True))
    assert agreed >= 0.99 * len(PAIRS)
    assert labeled >= 0.95 * len(PAIRS)


@pytest.mark.slow
def test_an_answer_that_takes_forever_costs_its_limit_and_is_wrong() -> None:
    pytest.importorskip("math_verify")
    task = MathProblems(seconds=1)
    for text in (r"\boxed{9^{9^{9^9}}}", rf"\boxed{{{'1' * 100_000}}}", rf"\boxed{{{'(' * 3000 + ')' * 3000}}}"):
        start, answers = time.process_time(), one_continuation(text)
        scores = task.score(HALF, answers)
        assert scores["exact_match"] == scores["math_verify"] == 0.0, text[:40]
        assert time.process_time() - start < 2  # here; the limit of the other process is its own
    # The next answer has a new process, and the one that failed is remembered.
    assert task.score(HALF, one_continuation(r"\boxed{0.5}"))["math_verify"] == 1.0
    forever = one_continuation(r"\boxed{9^{9^{9^9}}}")
    start = time.monotonic()
    assert task.score(HALF, forever)["math_verify_unfinished"] == 1.0
    assert time.monotonic() - start < 0.5
    assert "not finished in 1 s" in task.explain(HALF, forever)
    assert "more than 20000 characters" in task.explain(HALF, one_continuation("1" * 100_000))


@pytest.mark.slow
def test_threads_share_one_process(comparer: MathComparer) -> None:
    pytest.importorskip("math_verify")
    results: dict[int, bool] = {}

    def compare(number: int) -> None:
        results[number] = comparer.equal(box(str(number)), box(str(number % 2)))

    threads = [threading.Thread(target=compare, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: number < 2 for number in range(6)}


def test_without_math_verify_a_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kabrn_dist.evaluation.math_equivalence.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'kabrn_dist\[eval\]'"):
        MathComparer().equal("1", "1")


def test_too_long_an_answer_is_not_compared() -> None:
    with pytest.raises(UnfinishedComparison, match="more than 20000 characters"):
        MathComparer().equal("1", "1" * 100_000)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"\fbox{3} then \boxed{4", "3"),
        ("The final answer is $7$. I hope it is correct.", "7"),
        ("Final Answer: The final answer is 7.", "7"),
        (r"\boxed{1}. The final answer is $2$. I hope it is correct.", "2"),
        (r"The final answer is $2$. I hope so. \boxed{3}", "3"),
        (r"The final answer is $\$5$. I hope it is correct.", r"\$5"),
        ("nothing", None),
        ("", None),
        ("The final answer is", None),
    ],
)
def test_final_answers_are_found(text: str, answer: str | None) -> None:
    assert find_final_answer(text) == answer


@pytest.mark.parametrize("text", [r"\boxed{" * 20_000, "{" * 200_000, "final answer is " * 20_000, r"\frac" * 40_000])
def test_long_nonsense_is_read_in_a_moment(text: str) -> None:
    start = time.process_time()
    find_final_answer(text)
    is_same_answer(text, "1")
    is_same_answer(text[:1000], text[:999])
    assert time.process_time() - start < 1
