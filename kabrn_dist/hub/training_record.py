"""What a run's folder tells about its training: figures of the exported step, data, and evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from kabrn_dist.config import Config
from kabrn_dist.data.index import INDEX_NAME
from kabrn_dist.data.index_io import parse_index
from kabrn_dist.data.remote import is_url
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain

LOG_NAME, RESULTS_NAME, REPORT_NAME = "log.jsonl", "results.json", "report.json"
_LOG_BYTES_LIMIT, _JSON_BYTES_LIMIT = 1 << 32, 1 << 28


class TrainingText(NamedTuple):
    """Texts of one origin that a run was trained on.

    Attributes:
        name: In the shards.
        kind: Kind of reader that read them, such as "hf_jsonl".
        documents: Documents to train on.
        text_bytes: Bytes of their texts.
        license: As the preparation recorded it; empty if it did not.
        languages: Tags of languages with the documents of each, as recorded.
    """

    name: str
    kind: str
    documents: int
    text_bytes: int
    license: str
    languages: dict[str, int]


class TaskScore(NamedTuple):
    """A score of an evaluation.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        value: The score.
        stderr: Its standard error; None if unknown.
        examples: Number of examples; None if unknown.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int | None


class TrainingRecord(NamedTuple):
    """Everything that the model card tells about the training.

    Attributes:
        figures: Name → value in the log's last validation at or before the step, such as "validation/loss".
        figures_step: Step of that validation; None without one.
        sources: Of the data; empty where the shards are not at hand.
        scores: Of evaluations.
    """

    figures: dict[str, float]
    figures_step: int | None
    sources: list[TrainingText]
    scores: list[TaskScore]


def read_training_record(folder: Path, config: Config, step: int) -> TrainingRecord:
    """Collect what is recorded about a run; what is missing is left out.

    Args:
        folder: The run's folder.
        config: Its configuration.
        step: The exported step.
    """
    figures_step, figures = _read_figures(folder / LOG_NAME, step)
    return TrainingRecord(figures, figures_step, _read_sources(config), _read_scores(folder / RESULTS_NAME))


def _read_figures(log: Path, step: int) -> tuple[int | None, dict[str, float]]:
    found: tuple[int | None, dict[str, float]] = (None, {})
    if not log.is_file():
        return found
    for line in read_plain(log, _LOG_BYTES_LIMIT, follow_links=True).splitlines():
        entry = _parse(line)
        at = entry.get("step")
        if isinstance(at, int) and at <= step and isinstance(entry.get("validation/loss"), float | int):
            values = {key: value for key, value in entry.items() if key.startswith("validation/")}
            found = at, {key: float(value) for key, value in values.items() if isinstance(value, float | int)}
    return found


def _read_sources(config: Config) -> list[TrainingText]:
    if is_url(config.data.path) or not (Path(config.data.path) / INDEX_NAME).is_file():
        return []
    shards = Path(config.data.path)
    try:
        content = read_plain(shards / INDEX_NAME, _JSON_BYTES_LIMIT, follow_links=True)
        index = parse_index(content, str(shards / INDEX_NAME))
    except UserError:
        # Shards of another version, or damaged: the model does not need them.
        return []
    recorded = {each.get("name"): each for each in _read_json(shards / REPORT_NAME).get("sources", [])}
    return [
        TrainingText(
            name=source.name,
            kind=source.kind,
            documents=source.train.documents,
            text_bytes=source.train.text_bytes,
            license=str(recorded.get(source.name, {}).get("license") or ""),
            languages=dict(recorded.get(source.name, {}).get("languages") or {}),
        )
        for source in index.sources
    ]


def _read_scores(path: Path) -> list[TaskScore]:
    scores = []
    for task, result in _read_json(path).get("tasks", {}).items():
        for metric, score in result.get("scores", {}).items():
            value = score.get("value") if isinstance(score, dict) else score
            if isinstance(value, float | int):
                stderr = score.get("stderr") if isinstance(score, dict) else None
                scores.append(TaskScore(task, metric, float(value), stderr, result.get("n")))
    return scores


def _read_json(path: Path) -> dict[str, Any]:
    return _parse(read_plain(path, _JSON_BYTES_LIMIT, follow_links=True)) if path.is_file() else {}


def _parse(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        # A line that a crash cut off.
        return {}
    return found if isinstance(found, dict) else {}
