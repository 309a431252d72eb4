"""One of N processes that ask a model in training what tasks ask, in one layout after another.

The argument is a JSON file with a list of [configuration file, file for the answers].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kabrn_dist.evaluation.requests import ContinuationRequest, GenerateRequest, TextRequest
from kabrn_dist.train.task_model import CollectiveModel
from tests.support.trainers import open_trainers, read_jobs

GENERATE = [
    GenerateRequest("def ", 12),
    GenerateRequest("", 7, stop=("e",)),
    GenerateRequest("import os\nimport ", 9, num_samples=2, temperature=0.8, top_p=0.9, seed=3),
    GenerateRequest("x" * 40, 5),
]
CONTINUATIONS = [
    ContinuationRequest("def f(", "self):"),
    ContinuationRequest("", "class A:"),
    ContinuationRequest("return ", "x"),
]
TEXTS = [TextRequest("for i in range(10):\n    print(i)\n"), TextRequest("a")]


def ask(model: Any) -> dict[str, Any]:
    """Answers of an evaluated model, as JSON has them, in the order of the requests."""
    texts, scores, losses = (
        [found[number] for number in sorted(found)]
        for found in (
            dict(model.generate(GENERATE)),
            dict(model.score_continuations(CONTINUATIONS)),
            dict(model.score_texts(TEXTS)),
        )
    )
    return {
        "texts": [[list(each) for each in answer] for answer in texts],
        "scores": [list(score) for score in scores],
        "losses": [[score.nats.tolist(), score.num_bytes.tolist()] for score in losses],
    }


def main(jobs: str) -> None:
    work = read_jobs(jobs)
    trainers = open_trainers([(path, "never") for path, _ in work])
    for (_, answers), trainer in zip(work, trainers, strict=True):
        trainer.run()
        found = ask(CollectiveModel(trainer.engine, trainer.datasets.tokenizer, lambda: False))
        if trainer.mesh.is_main:
            Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
