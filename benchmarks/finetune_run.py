"""Fine-tunings of `benchmarks/forgetting.py` and `benchmarks/finetuning.py`: a base, then domain after domain.

Everything is trained by the project's own trainer, `kabrn_dist.train.trainer`, with a section `finetune`. Each
domain is a run of its own. Of `full`, the base is the run before; an adapter goes on as that of the run before
(`finetune.init_adapter`) beside the same frozen base. What is replayed is the base's own data, never earlier domains.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.finetune_data import prepare_documents
from benchmarks.finetune_domains import Domain, Exercise, find_base_texts, list_domains, take
from benchmarks.finetune_measure import HeldOut
from benchmarks.finetune_workers import train_run
from benchmarks.forgetting_matrix import Measurement
from kabrn_dist.config import Config
from kabrn_dist.inference.run import Run

Method = Literal["full", "lora", "ternary_lora", "state"]
METHODS: tuple[Method, ...] = "full", "lora", "ternary_lora", "state"
# By method: the best of four each for 60 steps of dates and transliteration on "mini", with a linear decay to 0.
RATES: dict[Method, float] = {"full": 8e-3, "lora": 5e-2, "ternary_lora": 5e-2, "state": 1.0}
RANK, ALPHA = 8, 16.0
BASE_RATE = {"rational": 8e-3, "swiglu": 1.2e-2}
CONTEXT, BATCH, SEED = 256, 8, 1
BASE_TEXTS = 3000


class Size(NamedTuple):
    """A model, by its hidden units for both forms of experts so that both have about as many parameters."""

    width: int
    layers: int
    experts: int
    hidden: dict[str, int]
    vocabulary: int


SIZES = {
    "smallest": Size(32, 1, 2, {"rational": 24, "swiglu": 16}, 300),
    "mini": Size(64, 2, 4, {"rational": 96, "swiglu": 64}, 512),
    "tiny": Size(96, 3, 4, {"rational": 129, "swiglu": 86}, 1024),
    "small": Size(128, 4, 8, {"rational": 172, "swiglu": 115}, 2048),
}


@dataclass(frozen=True)
class DomainSequence:
    """Domains that a model learns one after another.

    Attributes:
        method: of fine-tuning.
        experts: "rational" or "swiglu".
        replay: share of the sequences that come from the base's data.
        seed: of the base, the adapter and the order of the data.
        domains: their names, in order.
        size: name of the model's size.
        steps: of each domain.
        base_steps: of the base.
        documents: of each domain, at most.
        rows: held-out rows that are measured.
        rate: peak of the learning rate.
    """

    method: Method
    experts: str
    replay: float
    seed: int
    domains: tuple[str, ...]
    size: str
    steps: int
    base_steps: int
    documents: int
    rows: int
    rate: float


class Outcome(NamedTuple):
    """What a sequence came to.

    Attributes:
        measured: of the base and after each domain: what the model knows of the base's data and of each domain.
        seconds: of the processor for each domain, its measurements left out.
        trained: parameters that were trained.
    """

    measured: list[list[Measurement]]
    seconds: list[float]
    trained: int


class Place(NamedTuple):
    """Where things are.

    Attributes:
        work: folder for shards and runs.
        data: folder of real text; None where there is none.
    """

    work: Path
    data: Path | None

    def shards(self, size: str, name: str) -> Path:
        """Return the folder of a domain's shards."""
        return self.work / f"data-{SIZES[size].vocabulary}" / name

    def base_run(self, size: str, experts: str, seed: int, steps: int) -> Path:
        """Return the folder of a base."""
        return self.work / "bases" / f"{size}-{experts}-{steps}-steps-seed-{seed}"


def prepare_domains(names: Sequence[str], size: str, documents: int, place: Place) -> None:
    """Make the shards of the base's texts, with the tokenizer, and of domains with that tokenizer.

    Raises:
        KeyError: for a domain that there is not.
        UserError: for texts that cannot be used.
    """
    base, domains = find_base_texts(place.data), list_domains(place.data)
    texts = take(base, SEED, BASE_TEXTS if documents > BASE_TEXTS else documents)
    folder = place.shards(size, "base")
    prepare_documents(texts, base.name, folder, SIZES[size].vocabulary)
    for name in names:
        prepare_documents(
            take(domains[name], SEED, documents), name, place.shards(size, name), folder / "tokenizer.json"
        )


def train_base(size: str, experts: str, seed: int, steps: int, place: Place) -> None:
    """Train a base, unless it is there."""
    folder = place.base_run(size, experts, seed, steps)
    tree = describe_run(folder, place.shards(size, "base"), seed, steps, BASE_RATE[experts])
    train_run(Config.model_validate(tree | {"model": describe_model(size, experts)}))


def learn_sequence(sequence: DomainSequence, place: Place) -> Outcome:
    """Fine-tune on one domain after another, and measure all of them each time."""
    base = place.base_run(sequence.size, sequence.experts, sequence.seed, sequence.base_steps)
    names, domains = sequence.domains, list_domains(place.data)
    held_out = [HeldOut(place.shards(sequence.size, "base"), CONTEXT, sequence.rows, False)]
    held_out += [
        HeldOut(place.shards(sequence.size, name), CONTEXT, sequence.rows, has_answers(domains[name])) for name in names
    ]
    work = place.work / "sequences" / f"{sequence.method}-{sequence.experts}-{sequence.replay:g}-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    before, seconds, trained = base, list[float](), 0
    measured = [[each.measure(Run.open(base).model()) for each in held_out]]
    for number, name in enumerate(names):
        folder, began = work / f"{number}-{name}", time.process_time()
        train_run(configure_stage(sequence, place, base, before, name, folder))
        seconds.append(time.process_time() - began)
        model = Run.open(folder).model()
        measured.append([each.measure(model) for each in held_out])
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        before = folder
    shutil.rmtree(work)
    return Outcome(measured, seconds, trained)


def has_answers(domain: Domain) -> bool:
    """Whether a domain has exercises, and not texts."""
    return isinstance(take(domain, SEED, 1)[0], Exercise)


def configure_stage(
    sequence: DomainSequence, place: Place, base: Path, before: Path, name: str, folder: Path
) -> Config:
    """Return the configuration of the run that learns one domain of a sequence.

    Args:
        sequence: what it is part of.
        place: where the shards are.
        base: folder of the base.
        before: folder of the run before; the base for the first domain.
        name: of the domain.
        folder: of the run.
    """
    finetune: dict[str, Any] = {"base": str(base), "method": sequence.method, "replay": sequence.replay}
    finetune |= {"rank": RANK, "alpha": ALPHA, "base_data": str(place.shards(sequence.size, "base"))}
    if sequence.method == "full":
        finetune["base"] = str(before)
    elif before != base:
        finetune["init_adapter"] = str(before)
    tree = describe_run(folder, place.shards(sequence.size, name), sequence.seed, sequence.steps, sequence.rate)
    tree["optimizer"]["weight_decay"] = 0.0
    model = describe_model(sequence.size, sequence.experts)
    return Config.model_validate(tree | {"model": model, "finetune": finetune})


def describe_model(size: str, experts: str) -> dict[str, Any]:
    """Return the section `model` of a size."""
    chosen = SIZES[size]
    heads = max(1, chosen.width // 32)
    width = chosen.width // heads
    return {
        "vocab_size": chosen.vocabulary,
        "hidden_size": chosen.width,
        "layers": "R" * chosen.layers,
        "short_conv_size": 4,
        "retention": {"num_heads": heads, "key_dim": width, "value_dim": width, "decay": [1.5, 7]},
        "experts": {
            "type": experts,
            "num_experts": chosen.experts,
            "num_shared_experts": 1,
            "top_k": 2,
            "expert_hidden_size": chosen.hidden[experts],
            "function_groups": 4,
        },
        "router": {"bias_update_rate": 0.01},
    }


def describe_run(folder: Path, shards: Path, seed: int, steps: int, rate: float) -> dict[str, Any]:
    """Return the configuration of a run but for its model."""
    return {
        "run": {"folder": str(folder), "seed": seed},
        "data": {"path": str(shards), "sequence_length": CONTEXT},
        "optimizer": {
            "learning_rate": rate,
            "warmup_steps": steps // 10,
            "lr_schedule": "linear",
            "min_lr_ratio": 0.0,
        },
        "training": {
            "steps": steps,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
            "precision": "fp32",
            "log_interval": max(1, steps // 10),
        },
        "validation": {"eval_interval": 0, "eval_sequences": 1, "sample_tokens": 0},
        "checkpoint": {"save_interval": 0},
    }
