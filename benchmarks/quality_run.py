"""One run of `benchmarks/quality.py`: which models there are, how one is trained, and what comes of it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import yaml

from benchmarks.quality_models import Learner, Ours, Rival, Size, Transformer, measure_ours
from benchmarks.quality_text import Text, read_text
from kabrn_dist.config import Config
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.mesh import init_distributed, keep_freed_memory

# Setting A of the README.
WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 128, 4, 4, 64, 12
SCORED_ROWS = 48
# All of the plays' validation part is 1,742 rows.
MOST_ROWS = 2000


@dataclass(frozen=True)
class Recipe:
    """A model of the table and how it is trained.

    Attributes:
        what: for the table.
        rates: learning rates to try, the best known one first.
        model: changes to `OURS`, dotted keys; None for the rival.
        optimizer: changes to `OPTIMIZER`.
        taps: of the rival's convolutions.
    """

    what: str
    rates: tuple[float, ...]
    model: dict[str, Any] | None
    optimizer: dict[str, Any] = field(default_factory=dict)
    taps: int = 0


# The mixture: 1 + 2 experts of 2·128·172 weights are active, as many as of a dense SwiGLU of hidden width 344.
OURS: dict[str, Any] = {
    "hidden_size": WIDTH,
    "layers": "R" * LAYERS,
    "short_conv_size": 4,
    "retention": {"num_heads": HEADS, "key_dim": WIDTH // HEADS, "value_dim": WIDTH // HEADS, "decay": [1.5, 7]},
    "experts": {
        "type": "rational",
        "num_experts": 8,
        "num_shared_experts": 1,
        "top_k": 2,
        "expert_hidden_size": 172,
        "function_groups": 4,
    },
    "router": {"bias_update_rate": 1e-2},
}
OPTIMIZER: dict[str, Any] = {
    "betas": [0.9, 0.99],
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "lr_schedule": "linear",
    "min_lr_ratio": 0.0,
}
# One of so many steps is of the warm-up.
WARMUP = 20
DENSE = {"experts.type": "swiglu", "experts.num_dense_layers": LAYERS, "experts.dense_hidden_size": 344}
MODELS: dict[str, Recipe] = {
    "a": Recipe("dense Transformer, fp32", (2e-3, 3e-3, 1.3e-3), None),
    "b": Recipe("retention + dense SwiGLU, fp32", (5e-3, 8e-3, 3e-3), {**DENSE, "quantize": False}),
    "c": Recipe("b, ternary", (1.2e-2, 8e-3, 1.8e-2), DENSE),
    "d": Recipe("MixKABRN: c with a mixture of rational KANs", (8e-3, 1.2e-2, 5e-3), {}),
    "e": Recipe(
        "d with SwiGLU experts", (1.2e-2, 8e-3, 1.8e-2), {"experts.type": "swiglu", "experts.expert_hidden_size": 115}
    ),
    "f": Recipe("d with one softmax layer of four", (1.2e-2, 8e-3, 1.8e-2), {"layers": "RARR"}),
    "g": Recipe("a with the convolutions of b to f", (8e-3, 5e-3, 1.2e-2), None, taps=3),
}
BASELINE = "a"
# Chosen so that (a) has as many active parameters as (d), and a gate on its heads as ours have.
RIVAL_HIDDEN, RIVAL_GATED = 347, True


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


def train(run: Run) -> Outcome:
    """Train and score one model; `begin` comes first.

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
    learner.close()
    last = losses[-max(1, run.steps // 20) :]
    return Outcome(nats, sum(last) / len(last), seconds, size)


def make_learner(run: Run, text: Text) -> tuple[Learner, Size]:
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
