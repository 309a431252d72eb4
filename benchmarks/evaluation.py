"""How fast are texts generated and scored for evaluation, in batches, beside one at a time and the runtime in C?

A model with random weights of which a token uses 30 M (1 M with --quick), and prompts of unlike lengths. Figures are
tokens generated, or scored, in a second, of whole calls with the reading of prompts, on all threads of the process.

- batches of 1, 8 and 32 rows, beside decoding that rounds the weights anew for every token, as `mixkabrn generate` does
  with a run;
- the same prompts by the runtime in C, one after another, on one thread and on as many as the process has;
- prompts with a long beginning in common, beside the same ones asked one call at a time, which read it again;
- choices after a shared context, beside one call for each choice; and a long document.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.report import Report, run
from benchmarks.runtime import pack_random_model
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.evaluation.native_model import NativeEvaluatedModel
from kabrn_dist.evaluation.requests import ContinuationRequest, EvaluatedModel, GenerateRequest, TextRequest
from kabrn_dist.evaluation.torch_model import TorchModel
from kabrn_dist.inference.generate import GenerativeModel

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
BATCHES = (1, 8, 32)
AIM = 10.0


def questions(report: Report, quick: bool) -> None:
    """Fill the report."""
    tokens, document, rounds = (8, 600, 1) if quick else (48, 16_384, 3)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mkb"
        model = pack_random_model("1 M" if quick else "30 M", path)
        rounding = decode_with_rounding(model, 3 if quick else 12)
        batches = {size: TorchModel(model, Tokenizer.of_bytes(), "random", "none", size) for size in BATCHES}
        with NativeEvaluatedModel(path) as one, NativeEvaluatedModel(path, threads=threads) as all_threads:
            generating(
                report, batches, {"one thread": one, f"{threads} threads": all_threads}, rounding, tokens, rounds
            )
        beginnings(report, batches[BATCHES[-1]], 4 if quick else 16)
        scoring(report, batches[BATCHES[-1]], 4 if quick else 16, document)


def decode_with_rounding(model: GenerativeModel, tokens: int) -> float:
    """Tokens a second of decoding one text whose weights are rounded for each token."""
    states, zero = None, torch.zeros(1, 1, dtype=torch.long)
    began = 0.0
    for position in range(tokens + 1):
        if position == 1:
            began = time.perf_counter()
        _, states = model.decode(zero + 97, zero, zero + position, states)
    return tokens / (time.perf_counter() - began)


def generating(
    report: Report,
    batches: dict[int, TorchModel],
    natives: dict[str, NativeEvaluatedModel],
    rounding: float,
    tokens: int,
    rounds: int,
) -> None:
    """Prompts of 10 to 100 tokens, by every model."""
    texts = [(TEXT * 2)[number:][: 10 + 29 * number % 91] for number in range(2 * BATCHES[-1])]
    requests, turns = [GenerateRequest(text, tokens) for text in texts], min(2, rounds)
    tasks = {f"batch of {size}": partial(generate, model, requests[: turns * size]) for size, model in batches.items()}
    speeds = fastest(
        tasks | {name: partial(generate, model, requests[:turns]) for name, model in natives.items()}, rounds
    )
    for size in BATCHES:
        ours = speeds[f"batch of {size}"]
        rivals = {"one by one with rounding": rounding, "batch of 1": speeds["batch of 1"]}
        rivals |= {f"runtime in C, {name}": speeds[name] for name in natives}
        for name, speed in rivals.items():
            report.compare(f"generate, batch of {size}, rival: {name}", ours, speed, "tokens/s")
    batched = speeds[f"batch of {BATCHES[-1]}"]
    report.at_least("batch of 32 over one by one with rounding", batched / rounding, AIM)
    report.at_least("batch of 32 over batch of 1", batched / speeds["batch of 1"], AIM)
    report.at_least("batch of 1 over one by one with rounding", speeds["batch of 1"] / rounding, 1.0)


def beginnings(report: Report, model: TorchModel, count: int) -> None:
    """Few-shot prompts: questions after 1,100 tokens that are the same."""
    requests = [GenerateRequest(TEXT * 10 + TEXT[: 20 + 3 * number], 12) for number in range(count)]
    speeds = fastest(
        {
            "together": lambda: generate(model, requests),
            "alone": lambda: sum(generate(model, [request]) for request in requests[:4]),
        }
    )
    report.compare("few-shot prompts, rival: one call each", speeds["together"], speeds["alone"], "tokens/s")


def scoring(report: Report, model: TorchModel, count: int, length: int) -> None:
    """Four choices after each context, and a document whose state is carried along."""
    requests = [
        ContinuationRequest(TEXT * 2 + str(number), f" choice {choice}")
        for number in range(count)
        for choice in range(4)
    ]
    document = [TextRequest((TEXT * (length // len(TEXT) + 1))[:length])]
    speeds = fastest(
        {
            "together": lambda: len(list(model.score_continuations(requests))),
            "alone": lambda: sum(len(list(model.score_continuations([request]))) for request in requests[:8]),
            "document": lambda: len(next(iter(model.score_texts(document)))[1].nats),
        }
    )
    report.compare("choices, rival: one call each", speeds["together"], speeds["alone"], "choices/s")
    name = f"a document of {length:,} tokens, rival: generating in the largest batch"
    generated = next(row.ours for row in report.rows if row.name.startswith(f"generate, batch of {BATCHES[-1]},"))
    report.compare(name, speeds["document"], generated or 0.0, "tokens/s")


def generate(model: EvaluatedModel, requests: Sequence[GenerateRequest]) -> int:
    """Generate, and return the number of tokens."""
    return sum(each.num_tokens for _, found in model.generate(requests) for each in found)


def fastest(tasks: Mapping[str, Callable[[], int]], rounds: int = 1) -> dict[str, float]:
    """Return the greatest number a second of what each task counts; tasks take turns."""
    speeds = dict.fromkeys(tasks, 0.0)
    for _ in range(rounds):
        for name, task in tasks.items():
            began = time.perf_counter()
            speeds[name] = max(speeds[name], task() / (time.perf_counter() - began))
    return speeds


if __name__ == "__main__":
    run("Evaluation", questions)
