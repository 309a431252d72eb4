"""How fast is retention, how much does it keep, and how little does it send?

All rivals are in one run, forward + backward, fp32 and bf16, at B = 1, 4 heads, key width 64, value width 128.
What each rival is and what it includes: `benchmarks/retention_rivals.py`. Bytes: `benchmarks/retention_wire.py`.
"""

from __future__ import annotations

import inspect
from functools import partial

import torch
from torch import Tensor

from benchmarks import retention_rivals as rivals
from benchmarks import retention_wire
from benchmarks.report import Report, kept_bytes, measure, run
from benchmarks.retention_rivals import Function, Inputs
from kabrn_dist.ops.retention import retention_chunk, retention_step

CHUNK: int = inspect.signature(retention_chunk).parameters["chunk"].default
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ATTENTION_UP_TO = 16384  # its time is quadratic
AIMED = 8192  # the length that the aims name
SHORT, LONG = 4096, 65536  # between which nothing but the length may grow
EARLY, LATE = 100, 100_000  # tokens before the one that is decoded
MILLI, MICRO = 1e3, 1e6
# Its own chunk, and the one it is fastest with.
TORCHSCALES = {"torchscale as shipped": 512, "torchscale": rivals.TORCHSCALE_CHUNK}


def questions(report: Report, quick: bool) -> None:
    """Fill the report: time, growth, saved bytes, decoding, a card, bytes between ranks."""
    lengths = [1024, AIMED] if quick else [1024, 2048, 4096, AIMED, 16384, 32768, 65536]
    seconds, rounds = (0.2, 1) if quick else (6.0, 4)
    for name, dtype in DTYPES.items():
        for length in lengths:
            against_rivals(report, name, Inputs(length, dtype), seconds, rounds)
    for name, dtype in DTYPES.items():
        inputs = {length: Inputs(length, dtype) for length in (SHORT, LONG)}
        growth(report, name, inputs, seconds, rounds)
        kept(report, name, inputs)
        decoding(report, name, Inputs(LATE, dtype), seconds)
    on_gpu(report, [2048, 8192] if quick else [2048, 8192, 32768, 131072], seconds)
    retention_wire.question(report, quick)


def against_rivals(report: Report, name: str, x: Inputs, seconds: float, rounds: int) -> None:
    """Forward + backward of one length on the CPU."""
    functions: dict[str, Function] = {
        "ours": rivals.ours(x, x.one),
        "ours, packed": rivals.ours(x, x.packed),
        "bare products": rivals.floor(x, CHUNK),
    }
    if x.time <= ATTENTION_UP_TO:
        functions["SDPA"] = rivals.sdpa(x)
    for rival, chunk in TORCHSCALES.items():
        torchscale = rivals.torchscale(x, chunk=chunk)
        if not isinstance(torchscale, str):
            functions[rival] = torchscale
    times = measure(functions, seconds, rounds)
    here = f"{name} {x.time // 1024}K"
    for rival, time in times.items():
        if rival != "ours":
            report.compare(f"{here}, rival: {rival}", times["ours"] * MILLI, time * MILLI, "ms")
    if isinstance(torchscale, str):
        report.compare(f"{here}, rival: torchscale", times["ours"] * MILLI, torchscale, "ms")
    if x.time == AIMED:
        speed_aims(report, name, here, times)


def speed_aims(report: Report, name: str, here: str, times: dict[str, float]) -> None:
    """Add the aims on time."""
    for rival, aim in (("SDPA", {"fp32": 10.0, "bf16": 15.0}[name]), *((rival, 2.0) for rival in TORCHSCALES)):
        faster = times[rival] / times["ours"] if rival in times else None
        report.at_least(f"{here}: times faster than {rival}", faster, aim)
    report.at_most(f"{here}: time over the bare products", times["ours"] / times["bare products"], 1.5)


def growth(report: Report, name: str, inputs: dict[int, Inputs], seconds: float, rounds: int) -> None:
    """Time per token of a long sequence and of a short one, in turn."""
    times = measure({str(length): rivals.ours(x, x.one) for length, x in inputs.items()}, seconds, rounds)
    a_token = {length: times[str(length)] / length * MICRO for length in inputs}
    report.compare(f"{name} a token at 64K, rival: at 4K", a_token[LONG], a_token[SHORT], "µs")
    report.at_most(f"{name}: time a token at 64K over that at 4K", a_token[LONG] / a_token[SHORT], 1.15)


def kept(report: Report, name: str, inputs: dict[int, Inputs]) -> None:
    """Bytes kept between forward and backward, for each token."""
    a_token = {length: kept_bytes(rivals.ours(x, x.one, backward=False)) / length for length, x in inputs.items()}
    report.compare(f"{name} kept for backward a token at 64K, rival: at 4K", a_token[LONG], a_token[SHORT], "B")
    report.at_most(f"{name}: bytes kept a token at 64K over those at 4K", a_token[LONG] / a_token[SHORT], 1.01)
    x = inputs[SHORT]
    attention = kept_bytes(rivals.sdpa(x, backward=False)) / x.time
    report.compare(f"{name} kept for backward a token, rival: SDPA", a_token[SHORT], attention, "B")
    rival = rivals.torchscale(x, backward=False)
    bytes_or_why = rival if isinstance(rival, str) else kept_bytes(rival) / x.time
    report.compare(f"{name} kept for backward a token, rival: torchscale", a_token[SHORT], bytes_or_why, "B")


def decoding(report: Report, name: str, x: Inputs, seconds: float) -> None:
    """One token on top of the states that few and many tokens leave."""
    steps = 50
    q, k, v = (part[:, :, 0].clone() for part in (x.q, x.k, x.v))
    starts = torch.zeros(1, dtype=torch.bool)

    def state_after(length: int) -> Tensor:
        keys = x.q[:, :, :length], x.k[:, :, :length]
        return retention_chunk(*keys, x.v[:, :, :length], x.log_decay, x.one[:, :length])[1]

    def decode(state: Tensor) -> None:
        for _ in range(steps):
            state = retention_step(q, k, v, x.log_decay, state, starts)[1]

    with torch.no_grad():
        states = {length: state_after(length) for length in (EARLY, LATE)}
        functions = {str(length): partial(decode, state) for length, state in states.items()}
        times = measure(functions, seconds, rounds=10)
    a_token = {length: times[str(length)] / steps * MICRO for length in states}
    size = {length: float(state.nbytes) for length, state in states.items()}
    report.compare(f"{name} decoding a token at 100,000, rival: at 100", a_token[LATE], a_token[EARLY], "µs")
    report.compare(f"{name} decoding state at 100,000, rival: at 100", size[LATE], size[EARLY], "B")
    report.at_most(f"{name}: decoding time at 100,000 over that at 100", a_token[LATE] / a_token[EARLY], 1.1)
    report.at_most(f"{name}: decoding state at 100,000 over that at 100", size[LATE] / size[EARLY], 1.0)


def on_gpu(report: Report, lengths: list[int], seconds: float) -> None:
    """On a card, 8 heads: flash-linear-attention's own call and torch's attention."""
    if not torch.cuda.is_available():
        for rival in ("flash-linear-attention", "SDPA"):
            report.compare(f"GPU, rival: {rival}", None, "missing: no CUDA card", "ms")
        return
    for length in lengths:
        # bf16 alone: Triton kernels and flash attention are for half precision.
        x = Inputs(length, torch.bfloat16, "cuda", heads=8, key=64, value=128)
        functions = {"ours": rivals.ours(x, x.one), "SDPA": rivals.sdpa(x)}
        fla = rivals.flash_linear_attention(x)
        if not isinstance(fla, str):
            functions["flash-linear-attention"] = fla
        times = measure(functions, seconds)
        results: dict[str, float | str] = {key: time * MILLI for key, time in times.items() if key != "ours"}
        if isinstance(fla, str):
            results["flash-linear-attention"] = fla
        for rival, result in results.items():
            report.compare(f"GPU bf16 {length // 1024}K, rival: {rival}", times["ours"] * MILLI, result, "ms")


if __name__ == "__main__":
    run(f"Retention, chunk {CHUNK}", questions)
