"""What does a KAN expert cost beside an MLP, and beside other KANs? And does it learn what they learn?

All rivals are in one run, forward + backward, fp32 and bf16, at width 256, hidden width 512, with 1 and 8 experts.
The quick form shows that everything runs: it has few tokens and steps, and its aims say little.
`plain` matrices are held against plain products with SiLU between and no norm, ternary ones against a BitLinear MLP.
What each rival is and what it includes: `benchmarks/kan_rivals.py`. Fits: `benchmarks/kan_fits.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks import kan_fits
from benchmarks import kan_rivals as rivals
from benchmarks.kan_rivals import Inputs, Pass
from benchmarks.report import Report, kept_bytes, measure, run

WIDTH, HIDDEN = 256, 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATRICES = {"plain": False, "ternary": True}
GROUPED, EDGES, CONTROLS = ("rational", "chebyshev"), ("bspline", "hat"), ("swiglu", "relu2", "silu")
OVER_MLP = {"fp32": 1.10, "bf16": 1.25, "GPU bf16": 1 / 0.9}
OVER_EQUAL_FLOPS = 1.6
MILLI = 1e3


class Size(NamedTuple):
    """How many tokens, pykan's fewer; how many experts; and how long to measure each group of rivals."""

    tokens: int
    pykan: int
    experts: tuple[int, ...]
    seconds: float
    rounds: int


QUICK, WHOLE = Size(256, 32, (1, 2), 0.2, 2), Size(4096, 1024, (1, 8), 6.0, 3)


def questions(report: Report, quick: bool) -> None:
    """Fill the report: time and saved bytes of all forms, then fits of functions."""
    size = QUICK if quick else WHOLE
    for name, dtype in DTYPES.items():
        for count in size.experts:
            beside_mlps(report, name, Inputs(size.tokens, WIDTH, count, dtype), size)
    for name, dtype in DTYPES.items():
        beside_peers(report, name, Inputs(size.tokens, WIDTH, 1, dtype), size, quick)
    beside_pykan(report, Inputs(size.pykan, WIDTH, 1, torch.float32), size)
    on_gpu(report, size)
    kan_fits.question(report, quick)


def beside_mlps(report: Report, name: str, x: Inputs, size: Size) -> None:
    """Grouped forms and controls beside the same products, forms with a function on every edge at equal FLOPs."""
    for matrices, quantized in MATRICES.items():
        here = f"{name} E={x.experts} {matrices}"
        mlp = rivals.experts("silu", x, HIDDEN, True) if quantized else rivals.silu(x, HIDDEN)
        rival = "BitLinear MLP" if quantized else "products with SiLU"
        # The ternary MLP is the rival itself; the plain one with norms tells what the norms cost.
        forms = [form for form in (*GROUPED, *CONTROLS) if not (quantized and form == "silu")]
        passes = {form: rivals.experts(form, x, HIDDEN, quantized) for form in forms}
        times = compare(report, here, passes, {rival: mlp}, x, size)
        for form in GROUPED:
            report.at_most(f"{here} {form}: time over {rival}", times[form] / times[rival], OVER_MLP[name])
        for form in EDGES:
            at_equal_flops(report, here, form, x, quantized, size)


def at_equal_flops(report: Report, here: str, form: str, x: Inputs, quantized: bool, size: Size) -> None:
    """Beside an MLP so wide that it has as many weights, each of them one multiplication a token."""
    ours = rivals.experts(form, x, HIDDEN, quantized)
    wide = ours.parameters // (2 * x.width * x.experts)
    mlp = rivals.experts("silu", x, wide, True) if quantized else rivals.silu(x, wide)
    rival = f"{'BitLinear' if quantized else 'plain'} MLP of hidden width {wide}"
    times = compare(report, here, {form: ours}, {rival: mlp}, x, size)
    if form == "hat" and quantized:
        over = times[form] / times[rival]
        report.at_most(f"{here} {form}: time over a BitLinear MLP of equal FLOPs", over, OVER_EQUAL_FLOPS)


def beside_peers(report: Report, name: str, x: Inputs, size: Size, quick: bool) -> None:
    """Other KANs of the same widths; matrices are plain, as theirs are."""
    # Compiling takes longer than the quick form may.
    flashkans = {f"flashkan {how}": rivals.flashkan(x, HIDDEN, how) for how in (["eager"] if quick else rivals.WAYS)}
    passes = {form: rivals.experts(form, x, HIDDEN, False) for form in ("bspline", "hat", "rational")}
    times = compare(report, f"{name} plain", passes, {**flashkans, "FastKAN": rivals.fastkan(x, HIDDEN)}, x, size)
    for rival in flashkans:
        for form, aim in (("bspline", 1.0), ("rational", 5.0)):
            faster = times[rival] / times[form] if rival in times else None
            report.at_least(f"{name} {form}: times faster than {rival}", faster, aim)
    report.at_least(f"{name} rational: times faster than FastKAN", times["FastKAN"] / times["rational"], 3.0)


def beside_pykan(report: Report, x: Inputs, size: Size) -> None:
    """In fp32 alone, on as many tokens as its memory allows. `rational` is so wide that it has pykan's parameters."""
    here = f"fp32 plain, {x.tokens} tokens"
    passes = {form: rivals.experts(form, x, HIDDEN, False) for form in EDGES}
    pykan = rivals.pykan(x, HIDDEN)
    parameters = passes["bspline"].parameters if isinstance(pykan, str) else pykan.parameters
    wide = parameters // (2 * WIDTH)
    passes[f"rational of hidden width {wide}"] = rivals.experts("rational", x, wide, False)
    times = compare(report, here, passes, {"pykan": pykan}, x, size)
    for form, ours in passes.items():
        if form == "hat":
            continue
        # A parameter's time, as the splines have nine parameters an edge where pykan has ten.
        faster = times["pykan"] / times[form] * ours.parameters / parameters if "pykan" in times else None
        report.at_least(f"{here}: times faster than pykan a parameter, {form}", faster, 50.0)


def compare(
    report: Report, here: str, ours: dict[str, Pass], others: dict[str, Pass | str], x: Inputs, size: Size
) -> dict[str, float]:
    """Rows of time and of bytes kept for backward. Times in seconds, of ours and of the rivals that could run."""
    able = {rival: other for rival, other in others.items() if not isinstance(other, str)}
    times = measure({**ours, **able}, size.seconds, size.rounds)
    kept = {name: kept_bytes(function.forward) / x.tokens for name, function in {**ours, **able}.items()}
    for rival, other in others.items():
        for form in ours:
            time = other if isinstance(other, str) else times[rival] * MILLI
            size_or_why = other if isinstance(other, str) else kept[rival]
            report.compare(f"{here} {form}, rival: {rival}", times[form] * MILLI, time, "ms")
            report.compare(f"{here} {form} kept a token, rival: {rival}", kept[form], size_or_why, "B")
    return times


def on_gpu(report: Report, size: Size) -> None:
    """The same beside MLPs, on a card."""
    if not torch.cuda.is_available():
        report.compare("GPU, rival: MLP", None, "missing: no CUDA card", "ms")
        return
    for count in size.experts:
        beside_mlps(report, "GPU bf16", Inputs(size.tokens, WIDTH, count, torch.bfloat16, "cuda"), size)


if __name__ == "__main__":
    run(f"KAN experts, {WHOLE.tokens} tokens, width {WIDTH}, hidden width {HIDDEN}", questions)
