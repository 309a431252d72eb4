"""What does a mixture of experts cost over a dense network, what does it keep, and what does it send?

All rivals are in one run, forward + backward, fp32 and bf16, at D = 256. Top-2 of 8 experts of hidden width 512, and
fine-grained top-6 of 64 of 176: 1,056 active hidden channels, the nearest to 1,024 that kernels like.
What each rival is and what it includes: `benchmarks/moe_rivals.py`. Several processes: `benchmarks/moe_exchange.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import moe_exchange
from benchmarks import moe_rivals as rivals
from benchmarks.moe_inputs import Function, Inputs, Layer, Shape, both_passes, forward_pass
from benchmarks.moe_rivals import Own
from benchmarks.report import Report, kept_bytes, measure, run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BACK_ENDS = ("eager", "grouped_mm", "batched_mm")
RATIONAL = Own("rational", quantized=True)
MILLI, MEGA = 1e3, 1e-6


def shapes(tokens: int) -> list[Shape]:
    """Return the shapes of the two mixtures that are measured."""
    return [Shape(tokens, experts=8, top_k=2, hidden=512), Shape(tokens, experts=64, top_k=6, hidden=176)]


def questions(report: Report, quick: bool) -> None:
    """Fill the report: one process, a card, several processes."""
    tokens = 512 if quick else 4096
    seconds, rounds = (0.2, 1) if quick else (40.0, 8)
    for shape in shapes(tokens):
        for name, dtype in DTYPES.items():
            one_process(report, f"{shape} {name}", Inputs(shape, dtype), seconds, rounds)
    on_gpu(report, shapes(16384), seconds)
    moe_exchange.question(report, quick)


def one_process(report: Report, here: str, x: Inputs, seconds: float, rounds: int) -> None:
    """Time and memory of one layer, against all rivals."""
    candidates = {
        "ours": rivals.ours(x),
        "dense": rivals.dense(x),
        "our own dense": rivals.own_dense(x),
        "deepspeed dropless": rivals.deepspeed(x, dropless=True),
        "deepspeed capacity 1": rivals.deepspeed(x, dropless=False),
        "fairscale": rivals.fairscale(x),
        **{f"transformers {back_end}": rivals.transformers(x, back_end) for back_end in BACK_ENDS},
    }
    rational = {"ours": rivals.ours(x, RATIONAL), "our own dense": rivals.own_dense(x, RATIONAL)}
    layers = {name: layer for name, layer in candidates.items() if not isinstance(layer, str)}
    missing = {name: why for name, why in candidates.items() if isinstance(why, str)}
    functions: dict[str, Function] = {name: both_passes(layer, x) for name, layer in layers.items()}
    functions |= {f"rational {name}": both_passes(layer, x) for name, layer in rational.items()}
    functions["bare products"] = rivals.bare_products(x)
    times = measure(functions, seconds, rounds)
    for name in ("dense", "our own dense", "bare products", *list(candidates)[3:]):
        rival: float | str = missing[name] if name in missing else times[name] * MILLI
        report.compare(f"{here}, rival: {name}", times["ours"] * MILLI, rival, "ms")
    ternary = times["rational ours"] * MILLI, times["rational our own dense"] * MILLI
    report.compare(f"{here}, rational ternary, rival: our own dense", *ternary, "ms")
    report.compare(f"{here}, load of the fullest expert, rival: fair share", x.imbalance, 1.0, "")
    speed_aims(report, here, times)
    memory(report, here, x, layers, missing)


def speed_aims(report: Report, here: str, times: dict[str, float]) -> None:
    """Add the aims on time."""
    report.at_most(f"{here}: time over one dense network", times["ours"] / times["dense"], 1.15)
    groups = {
        "deepspeed dropless": ["deepspeed dropless"],
        "deepspeed capacity 1": ["deepspeed capacity 1"],
        "fairscale": ["fairscale"],
        "transformers' best": [f"transformers {back_end}" for back_end in BACK_ENDS],
    }
    for rival, names in groups.items():
        best = min((times[name] for name in names if name in times), default=None)
        report.at_least(f"{here}: times faster than {rival}", best and best / times["ours"], 1.0)


def memory(report: Report, here: str, x: Inputs, layers: dict[str, Layer], missing: dict[str, str]) -> None:
    """Bytes kept for backward, and the most that is there at once; both with weights, tokens and gradients."""
    kept = {name: kept_bytes(forward_pass(layer, x)) * MEGA for name, layer in layers.items()}
    peak = {name: peak_bytes(both_passes(layer, x)) * MEGA for name, layer in layers.items()}
    for what, figures in (("kept for backward", kept), ("peak", peak)):
        for name in figures | missing:
            if name != "ours":
                rival = missing.get(name) or figures[name]
                report.compare(f"{here} {what}, rival: {name}", figures["ours"], rival, "MB")


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes at once that a call takes from torch's allocator, over what was taken before. On the CPU."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def on_gpu(report: Report, shapes: list[Shape], seconds: float) -> None:
    """On a card, the grouped product of an expert's first matrix: ours, torch's own (torchtitan's way), one matrix."""
    if not torch.cuda.is_available():
        report.compare("GPU grouped product, rival: torch._grouped_mm", None, "missing: no CUDA card", "ms")
        return
    for shape in shapes:
        times = measure(rivals.grouped_products(Inputs(shape, torch.bfloat16), "cuda"), seconds)
        here = f"GPU bf16 {shape}"
        for rival in ("torch._grouped_mm", "one large matrix"):
            report.compare(f"{here} grouped product, rival: {rival}", times["ours"] * MILLI, times[rival] * MILLI, "ms")
        flops = 2 * shape.tokens * shape.top_k * shape.width * shape.hidden
        rates = {name: flops / time / 1e12 for name, time in times.items()}
        report.compare(f"{here} rate, rival: torch._grouped_mm", rates["ours"], rates["torch._grouped_mm"], "TFLOP/s")
        share = times["one large matrix"] / times["ours"]
        report.at_least(f"{here}: share of a large product's rate", share, 0.8)


if __name__ == "__main__":
    run("Mixture of experts", questions)
