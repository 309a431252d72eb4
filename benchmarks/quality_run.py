"""One run of `benchmarks/quality.py`: train a model on a text and score it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from benchmarks.quality_export import export_transformer
from benchmarks.quality_models import Learner, Ours, Rival, Size, Transformer, measure_ours
from benchmarks.quality_recipes import (
    BATCH,
    CONTEXT,
    HEADS,
    LAYERS,
    MODELS,
    OPTIMIZER,
    OURS,
    RIVAL_GATED,
    RIVAL_HIDDEN,
    WARMUP,
    WIDTH,
)
from benchmarks.quality_text import Text, read_text
from kabrn_dist.config import Config
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.utils.malloc import keep_freed_memory

SCORED_ROWS = 48
# All of the plays' validation part is 1,742 rows.
MOST_ROWS = 2000


@dataclass(frozen=True)
class Run:
    """What is trained: a model of `MODELS` at one rate from one seed.

    Attributes:
        changes: dotted keys of the configuration and their values as YAML, for all but the rival.
        rows: of the validation part, at most.
    """

    model: str
    rate: float
    seed: int
    steps: int
    text: str
    rows: int
    changes: tuple[tuple[str, str], ...] = ()


class Outcome(NamedTuple):
    """Attributes:
    nats: a character of the validation part. trained: of the last twentieth of the training batches.
    seconds: of the processor, in training, a character.
    """

    nats: float
    trained: float
    seconds: float
    size: Size


def begin() -> None:
    """Make this process ready to train, with one thread."""
    # Where it is not set, joining takes all cores; runs side by side would then wait for each other's threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    keep_freed_memory()
    # Left open: the process trains until it is told to end, and is alone in its group.
    init_distributed(read_launch_env()).__enter__()


def train(run: Run, export: Path | None = None) -> Outcome:
    """Train and score one model; `begin` comes first.

    Args:
        run: what to train.
        export: folder in which a dense Transformer is left for Hugging Face's libraries; None leaves nothing.

    Raises:
        ValueError: for a text that cannot be read.
        pydantic.ValidationError: for changes that the configuration does not take.
    """
    text = read_text(run.text, CONTEXT)
    learner, size = make_learner(run, text)
    generator = torch.Generator().manual_seed(1337 + run.seed)
    losses, began = [], time.process_time()
    for step in range(run.steps):
        losses.append(learner.learn(text.draw(generator, BATCH, CONTEXT), step))
    seconds = (time.process_time() - began) / (run.steps * BATCH * CONTEXT)
    batches = list(text.windows(SCORED_ROWS, CONTEXT, run.rows))
    nats = sum(map(learner.score, batches)) / sum(batch.targets.numel() for batch in batches)
    if export is not None and isinstance(learner, Rival):
        export_transformer(learner.model, text.alphabet, export / f"{run.model}-rate-{run.rate:g}-seed-{run.seed}")
    learner.close()
    last = losses[-max(1, run.steps // 20) :]
    return Outcome(nats, sum(last) / len(last), seconds, size)


def make_learner(run: Run, text: Text) -> tuple[Learner, Size]:
    """Return a new model in training and its size."""
    config = configure(run, text.vocabulary)
    recipe = MODELS[run.model]
    if recipe.model is not None:
        return Ours(config), measure_ours(config.model)
    torch.manual_seed(run.seed)
    rival = Transformer(text.vocabulary, WIDTH, LAYERS, HEADS, RIVAL_HIDDEN, RIVAL_GATED, recipe.taps)
    return Rival(rival, config.optimizer, run.steps), rival.measure()


def configure(run: Run, vocabulary: int) -> Config:
    """The whole configuration; of the rival only the optimizer's part is used."""
    recipe = MODELS[run.model]
    optimizer = {**OPTIMIZER, "learning_rate": run.rate, "warmup_steps": run.steps // WARMUP, **recipe.optimizer}
    tree: dict[str, Any] = {
        "run": {"folder": os.devnull, "seed": run.seed},
        "data": {"path": os.devnull, "sequence_length": CONTEXT},
        "model": {**OURS, "vocab_size": vocabulary},
        "parallel": {"zero_stage": 0},
        "optimizer": optimizer,
        "training": {"steps": run.steps, "global_batch_size": BATCH, "micro_batch_size": BATCH},
    }
    for key, value in (recipe.model or {}).items():
        put(tree, f"model.{key}", value)
    for key, value in run.changes if recipe.model is not None else ():
        put(tree, key, yaml.safe_load(value))
    return Config.model_validate(tree)


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, copying the sections on the way, which other trees share."""
    first, _, rest = key.partition(".")
    if rest:
        tree[first] = dict(tree.get(first) or {})
        put(tree[first], rest, value)
    else:
        tree[first] = value
