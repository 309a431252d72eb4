"""Small files in the layouts in which the tasks' data is published."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

PASSAGE = "The ferry left the island at noon, and by evening the harbor lights were all that we could see. " * 30


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_math(folder: Path) -> None:
    for split in ("train", "test"):
        for number in range(6):
            path = folder / "MATH" / split / "algebra" / f"{number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            solution = rf"We add {number} and a half, so the sum is $\boxed{{\frac{{{2 * number + 1}}}{{2}}}}$."
            record = {
                "problem": f"What is ${number} + 1/2$?",
                "level": f"Level {number % 5 + 1}",
                "type": "Algebra",
                "solution": solution,
            }
            path.write_text(json.dumps(record))


def write_gsm8k(folder: Path) -> None:
    for split in ("train", "test"):
        write_lines(
            folder / "gsm8k" / f"{split}.jsonl",
            (
                {
                    "question": f"A crate holds {n} apples. How many do 1,000 crates hold?",
                    "answer": f"They hold {n} * 1000 = <<{n}*1000={n}000>>{n}000 apples.\n#### {n},000",
                }
                for n in range(3, 10)
            ),
        )


def write_nq_open(folder: Path) -> None:
    records = [{"question": f"who built bridge {n}", "answer": [f"Engineer {n}", f"The Firm {n}"]} for n in range(7)]
    write_lines(folder / "nq_open" / "NQ-open.dev.jsonl", [*records, {"question": "which mark?", "answer": ["---"]}])
    write_lines(folder / "nq_open" / "NQ-open.train.jsonl", records)


def _science(number: int) -> dict[str, Any]:
    choices = [{"text": f"{number + shift} legs", "label": label} for shift, label in enumerate("ABCD")]
    return {
        "id": f"Exam_{number}",
        "question": {"stem": f"How many legs have {number} stools?", "choices": choices},
        "answerKey": "ABCD"[number % 4],
    }


def write_arc(folder: Path) -> None:
    for kind in ("Easy", "Challenge"):
        for split in ("Train", "Dev", "Test"):
            write_lines(
                folder / "ARC-V1-Feb2018-2" / f"ARC-{kind}" / f"ARC-{kind}-{split}.jsonl", map(_science, range(5))
            )


def write_openbookqa(folder: Path) -> None:
    main = folder / "OpenBookQA-V1-Sep2018" / "Data" / "Main"
    for split in ("train", "dev", "test"):
        write_lines(main / f"{split}.jsonl", map(_science, range(6)))
    write_lines(main.parent / "Additional" / "test_complete.jsonl", map(_science, range(6)))


def write_hellaswag(folder: Path) -> None:
    for split in ("train", "val"):
        write_lines(
            folder / "hellaswag" / f"hellaswag_{split}.jsonl",
            (
                {
                    "ind": 10 + n,
                    "activity_label": "Baking bread",
                    "ctx_a": f"[header] How to bake {n} loaves [title] Mix the dough. [step] Wait.",
                    "ctx_b": "then",
                    "endings": ["bake it.", "paint it [substeps] blue.", "sell it.", "read it."],
                    "label": n % 4,
                }
                for n in range(5)
            ),
        )


def write_piqa(folder: Path) -> None:
    for split in ("train", "valid"):
        goals = ({"goal": f"Open jar {n}", "sol1": "turn the lid", "sol2": "turn the label"} for n in range(5))
        write_lines(folder / "piqa" / f"{split}.jsonl", goals)
        (folder / "piqa" / f"{split}-labels.lst").write_text("0\n1\n0\n1\n1\n")


def write_lambada(folder: Path) -> None:
    (folder / "lambada").mkdir()
    lines = (f"she looked for the boat number {n} , but nobody had seen the boat" for n in range(5))
    (folder / "lambada" / "lambada_test_plain_text.txt").write_text("\n".join(lines) + "\n")


def write_own_texts(folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "harbor.txt").write_text(PASSAGE)
    (folder / "notes" / "weather.test.txt").write_text("It rained all week. " * 20)
    write_lines(folder / "notes" / "letters.jsonl", ({"text": f"Dear reader, letter {n} is short."} for n in range(3)))


WRITERS: dict[str, Callable[[Path], None]] = {
    "math": write_math,
    "gsm8k": write_gsm8k,
    "nq_open": write_nq_open,
    "arc": write_arc,
    "arc_easy": write_arc,
    "arc_challenge": write_arc,
    "openbookqa": write_openbookqa,
    "hellaswag": write_hellaswag,
    "piqa": write_piqa,
    "last_word": write_lambada,
    "perplexity": write_own_texts,
    "long_context": write_own_texts,
    "recall": write_own_texts,
    "recall_generated": write_own_texts,
}
# Tasks whose data is recognized among other data; the others take all texts.
PUBLISHED = [name for name in WRITERS if WRITERS[name] is not write_own_texts]
