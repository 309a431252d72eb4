"""What a fine-tuning of a model of 30 M parameters costs: time, memory, and the bytes of what it leaves.

The base has random weights: what is measured hardly depends on them. Every run is a process of its own with one
thread. Two runs of a few steps give the time of a step and of all else; a whole fine-tuning is computed from them,
but for ternary_lora, which is run whole: the bytes of its patches grow with the steps. Time is the processor's, which a
busy machine changes little.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.finetune_data import prepare_documents
from benchmarks.finetune_domains import Exercise, find_base_texts, take
from benchmarks.finetune_run import BASE_TEXTS, RATES, SEED, describe_run
from benchmarks.finetune_workers import Workers, train_run
from benchmarks.report import Report
from kabrn_dist.adapters.folder import ADAPTER_NAME, write_adapter
from kabrn_dist.config import Config
from kabrn_dist.data.index_io import read_index
from kabrn_dist.inference.make_adapter import make_adapter
from kabrn_dist.inference.run import Run
from kabrn_dist.planner.count import count_parameters
from kabrn_dist.runtime.file_plan import Packing
from kabrn_dist.runtime.pack import pack_folder

CONVERSATIONS, PASSES, ANSWER_CHARACTERS = 1000, 2, 300
TIMED, QUICK_TIMED = (2, 6), (1, 2)
GIGA = 1e-9
WAYS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora of rank 8": {"method": "lora", "rank": 8},
    "lora of rank 2 of mixers": {"method": "lora", "rank": 2, "targets": ["mixer"]},
    "ternary_lora of rank 8": {"method": "ternary_lora", "rank": 8},
    "ternary_lora of rank 8 of mixers": {"method": "ternary_lora", "rank": 8, "targets": ["mixer"]},
    "state of rank 8": {"method": "state", "rank": 8},
    "state of rank 1": {"method": "state", "rank": 1},
}
QUICK_WAYS = ("full", "lora of rank 2 of mixers", "ternary_lora of rank 8", "state of rank 8")


class RunCosts(NamedTuple):
    """What a run took.

    Attributes:
        seconds: of the processor.
        peak_bytes: of its process at once.
    """

    seconds: float
    peak_bytes: int


class CostPlace(NamedTuple):
    """The folders of a measurement.

    Attributes:
        work: for everything.
        quick: whether a smaller model stands for that of 30 M parameters.
    """

    work: Path
    quick: bool

    @property
    def base(self) -> Path:
        """Run of the base."""
        return self.work / "base"

    @property
    def texts(self) -> Path:
        """Shards that the base learns, with the tokenizer."""
        return self.work / "texts"

    @property
    def conversations(self) -> Path:
        """Shards of the conversations."""
        return self.work / "conversations"


def describe_large_model(quick: bool) -> dict[str, Any]:
    """Return the section `model` of 30 M parameters, 7 M of them active; a tiny one if `quick`."""
    width, layers, experts, vocabulary = (32, 1, 2, 300) if quick else (256, 6, 16, 2048)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "layers": "R" * layers,
        "short_conv_size": 4,
        "retention": {"num_heads": width // 32, "key_dim": 32, "value_dim": 32, "decay": [1.5, 7]},
        "experts": {"num_experts": experts, "num_shared_experts": 1, "top_k": 2, "expert_hidden_size": 2 * width},
    }


def make_conversations(count: int) -> list[str | Exercise]:
    """Return questions for passages of Python's help, each with the passage as its answer."""
    conversations: list[str | Exercise] = []
    for text in take(find_base_texts(None), SEED, BASE_TEXTS):
        assert isinstance(text, str)
        title = text.strip().split("\n", 1)[0]
        for start in range(0, len(text) - ANSWER_CHARACTERS, ANSWER_CHARACTERS):
            number = start // ANSWER_CHARACTERS + 1
            answer = text[start : start + ANSWER_CHARACTERS].strip()
            if answer:
                conversations.append(Exercise(f"What is part {number} of: {title}?", answer))
    return conversations[:count]


def measure_costs(report: Report, workers: Workers, place: CostPlace) -> None:
    """Add rows and aims; `workers` run each call in a new process, made ready by `finetune_workers.begin`."""
    model = describe_large_model(place.quick)
    texts = take(find_base_texts(None), SEED, BASE_TEXTS)
    prepare_documents(texts, "help", place.texts, model["vocab_size"])
    conversations = make_conversations(100 if place.quick else CONVERSATIONS)
    prepare_documents(conversations, "conversations", place.conversations, place.texts / "tokenizer.json")
    workers.submit(run_costs, describe_run(place.base, place.texts, SEED, 1, 1e-3) | {"model": model}).result()
    packed = pack_folder(place.base, place.work / "base.mkb", Packing()).plan.file_bytes
    tokens = read_index(place.conversations).tokens("train")
    config = Config.model_validate(describe_run(place.base, place.conversations, SEED, 1, 1e-3) | {"model": model})
    parameters = count_parameters(config.model).total
    steps = max(1, round(PASSES * tokens / config.data.sequence_length / config.training.global_batch_size))
    told = f"{parameters / 1e6:.3g} M parameters, {len(conversations)} conversations of {tokens} tokens"
    print(f"{told}, {PASSES} passes: {steps} steps; model file {packed:,} bytes", flush=True)
    for name in QUICK_WAYS if place.quick else tuple(WAYS):
        measure_way(report, workers, place, name, steps, packed)


def measure_way(report: Report, workers: Workers, place: CostPlace, name: str, steps: int, model_bytes: int) -> None:
    """Add the rows and aims of one way to fine-tune."""
    timed, costs, folder = QUICK_TIMED if place.quick else TIMED, list[RunCosts](), place.base
    if WAYS[name]["method"] == "ternary_lora" and not place.quick:
        timed = timed[0], steps
    for count in timed:
        folder = place.work / f"{name.replace(' ', '-')}-{count}"
        costs.append(workers.submit(run_costs, describe_finetuning(place, name, count, folder)).result())
    step = max(0.0, costs[1].seconds - costs[0].seconds) / (timed[1] - timed[0])
    minutes = (costs[0].seconds + step * (steps - timed[0])) / 60
    peak = costs[1].peak_bytes * GIGA
    missing = "missing: nobody else trains ternary codes so"
    report.compare(f"{name}: processor's time of a step", step, missing, "s")
    report.compare(f"{name}: processor's time of {steps} steps", minutes, missing, "minutes")
    report.compare(f"{name}: peak memory", peak, missing, "GB")
    report.at_most(f"{name}: minutes for {CONVERSATIONS} conversations", minutes, 10)
    report.at_most(f"{name}: peak memory in GB", peak, 1.5)
    if WAYS[name]["method"] != "full":
        share = write_trained_adapter(folder) / model_bytes
        report.compare(f"{name}: bytes of the adapter, rival: model file", share * model_bytes, model_bytes, "bytes")
        report.at_most(f"{name}: share of the model's bytes", share, 0.02)
    print(f"{name}: {step:.2f} s a step, {minutes:.1f} minutes, {peak:.2f} GB", flush=True)


def describe_finetuning(place: CostPlace, name: str, steps: int, folder: Path) -> dict[str, Any]:
    """Return the configuration of a short fine-tuning."""
    way = WAYS[name]
    tree = describe_run(folder, place.conversations, SEED, steps, RATES[way["method"]])
    finetune = {"base": str(place.base), "base_data": str(place.texts), **way}
    return tree | {"model": describe_large_model(place.quick), "finetune": finetune}


def run_costs(tree: dict[str, Any]) -> RunCosts:
    """Train a run in this process, and return what it took."""
    began = time.process_time()
    train_run(Config.model_validate(tree))
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return RunCosts(time.process_time() - began, peak)


def write_trained_adapter(folder: Path) -> int:
    """Write the adapter of a run in fp16, and return the bytes of its tensors' file."""
    out = folder / "benchmark_adapter"
    write_adapter(make_adapter(Run.open(folder)), out, "fp16")
    return (out / ADAPTER_NAME).stat().st_size
