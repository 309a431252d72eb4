"""Small files of published tasks in their layouts, written for tests."""

from __future__ import annotations

import json
from pathlib import Path


def write_benchmarks(folder: Path, count: int = 8) -> Path:
    """Write `count` questions of nq_open and openbookqa to be answered, and six of each with their answers."""
    for split, numbers in (("train", range(90, 96)), ("dev", range(count)), ("test", range(count))):
        words = [f"{'ab' * (number % 5 + 1)}{number}" for number in numbers]
        open_book = [
            {
                "id": f"{split}-{word}",
                "question": {
                    "stem": f"What follows {word}",
                    "choices": [{"label": label, "text": f"{word}{label}" * n} for n, label in enumerate("ABCD", 1)],
                },
                "answerKey": "ABCD"[number % 4],
            }
            for number, word in zip(numbers, words, strict=True)
        ]
        _write(folder / "Main" / f"{split}.jsonl", open_book)
        if split != "test":
            questions = [{"question": f"who is {word}", "answer": [word, f"the {word}"]} for word in words]
            _write(folder / "nq" / f"NQ-open.{split}.jsonl", questions)
    return folder


def _write(path: Path, records: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
