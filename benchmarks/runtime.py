"""How fast is the runtime in C, what does it take, and what do WebAssembly, PyTorch and other runtimes do beside it?

Models with random weights, packed by `mixkabrn pack`'s own code: one of which a token uses 30 M weights, and one of
100 M in a file of about 120 MB. All figures are of one thread unless said, by the program's own `bench`:

- weights a second of a matrix that stays in the cache, with each set of kernels that the machine supports;
- decoding, its share of the measured read bandwidth, two threads, prefill, and the speed at token 100,000;
- the first token from a cold start, restoring a state, memory beyond file and state, the program's size;
- the same C file in WebAssembly under node, with and without SIMD, beside each native set of kernels;
- our PyTorch decoding of the same model.

The rival's matrix product (onnxruntime, dynamic int8) reads four times the bytes of ours for as many weights, and its
weights are not ternary: comparable is the time of a product of equal shape, not what the model is worth.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Report, run
from benchmarks.runtime_rivals import measure_llama, measure_onnxruntime
from kabrn_dist.config.file import load_config
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.inference.load import build_full_model
from kabrn_dist.runtime.build import compile_runtime
from kabrn_dist.runtime.model_file import write_model_file
from kabrn_dist.runtime.native import NativeModel
from kabrn_dist.runtime.offline_page import PAGE_FOLDER
from kabrn_dist.runtime.wasm import WasmKind, compile_wasm
from kabrn_dist.utils.errors import UserError

ROOT = Path(__file__).parents[1]
WASM_PROBE = ROOT / "tests" / "runtime" / "wasm_probe.js"
MEGA, MILLI, KIBI = 1e-6, 1e3, 1024
# Sizes by name: width, layers, heads, width of a head's keys, hidden units of an expert, experts, vocabulary.
SIZES = {
    "30 M": (512, 6, 8, 32, 1024, 8, 8192),
    "100 M": (1024, 5, 8, 64, 2048, 16, 16384),
    "1 M": (128, 4, 4, 32, 172, 8, 2048),
}
DECODE_AIMS = {"30 M": 600.0, "100 M": 250.0}
GEMV_AIMS = {"avx512vnni": 80.0, "avxvnni": 80.0, "avx2": 50.0, "ssse3": 20.0}
WASM_AIMS: dict[WasmKind, float] = {"relaxed": 0.4, "simd": 0.4, "scalar": 0.1}


def questions(report: Report, quick: bool) -> None:
    """Fill the report: both models, the kernels, WebAssembly, PyTorch, the rivals."""
    sizes, tokens = (["1 M"], 64) if quick else (["30 M", "100 M"], 512)
    with tempfile.TemporaryDirectory() as folder:
        program, best = compile_runtime("program"), {}
        for size in sizes:
            path = Path(folder) / f"{size}.mkb"
            model = pack_random_model(size, path)
            best = bench(program, path, tokens)
            native(report, size, best, bench(program, path, tokens, threads=2))
            state(report, size, path)
            if size == sizes[0]:
                pytorch(report, model, best["decode_tokens_per_second"], 8 if quick else 32)
                webassembly(report, program, path, tokens, best)
            del model
        gemv(report, best)
        first_token(report, best, quick)
        binary(report, program, Path(folder))
    rivals(report, best, quick)


def pack_random_model(size: str, path: Path) -> Any:
    """Write a model file, and return its model."""
    width, layers, heads, key, hidden, experts, vocabulary = SIZES[size]
    config = load_config(
        ROOT / "configs" / "tiny.yaml",
        [
            *(f"model.vocab_size={vocabulary}", f"model.hidden_size={width}", f"model.layers={layers}"),
            *(f"model.retention.num_heads={heads}", f"model.retention.key_dim={key}"),
            *(f"model.retention.value_dim={width // heads}", f"model.experts.expert_hidden_size={hidden}"),
            f"model.experts.num_experts={experts}",
        ],
    )
    torch.manual_seed(0)
    model = build_full_model(config)
    write_model_file(model, config, Tokenizer.of_bytes(), 0, path)
    return model


def bench(program: Path, model: Path, tokens: int, threads: int = 1, kernels: str = "") -> dict[str, Any]:
    """Return what the program measures of itself."""
    command = [str(program), "bench", str(model), "--json", "--threads", str(threads), "--tokens", str(tokens)]
    environment = {**os.environ, "MIXKABRN_KERNELS": kernels}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def native(report: Report, size: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    """What one model does natively."""
    decode, active = one["decode_tokens_per_second"], one["active_parameters"] * MEGA
    name = f"{size} ({active:.0f} M active, {one['file_bytes'] * MEGA:.0f} MB)"
    report.compare(f"{name} decode, rival: 2 threads", decode, two["decode_tokens_per_second"], "tokens/s")
    report.compare(f"{name} prefill, rival: decode", one["prefill_tokens_per_second"], decode, "tokens/s")
    report.compare(f"{name} decode at token 100,000, rival: at 100", one["late_tokens_per_second"], decode, "tokens/s")
    used = decode * (one["bytes_per_token"] + 2 * one["state_bytes"])
    report.compare(f"{name} bytes read, rival: read bandwidth", used / 1e9, one["read_bytes_per_second"] / 1e9, "GB/s")
    if size in DECODE_AIMS and "vnni" in one["kernels"]:
        report.at_least(f"{size} active, decode with VNNI, tokens/s", decode, DECODE_AIMS[size])
    report.at_least(f"{size}: decode of 2 threads over 1", two["decode_tokens_per_second"] / decode, 1.6)
    report.at_least(f"{size}: prefill over decode", one["prefill_tokens_per_second"] / decode, 4.0)
    late = one["late_tokens_per_second"] / decode
    report.at_least(f"{size}: speed at token 100,000 over that at 100", late, 0.98)
    report.at_least(f"{size}: share of the read bandwidth", one["bandwidth_share"], 0.8)
    memory = (one["resident_bytes"] - one["file_bytes"] - one["state_bytes"]) * MEGA
    report.at_most(f"{size}: memory beyond file and state, MB", memory, 16.0)


def state(report: Report, size: str, path: Path) -> None:
    """How long a saved state takes to be read again."""
    with NativeModel(path, verify=False) as model, model.context() as context:
        context.decode(list(range(100)), logits=False)
        context.save_state(path.with_suffix(".state"))
        times = []
        for _ in range(5):
            began = time.perf_counter()
            context.load_state(path.with_suffix(".state"))
            times.append(time.perf_counter() - began)
    report.at_most(f"{size}: restoring a state of {model_state_megabytes(path):.1f} MB, ms", min(times) * MILLI, 10.0)


def model_state_megabytes(path: Path) -> float:
    return path.with_suffix(".state").stat().st_size * MEGA


def gemv(report: Report, found: dict[str, Any]) -> None:
    """Products in the cache with each set of kernels."""
    speeds = found["gweights_per_second"]
    for kernels, speed in speeds.items():
        report.compare(f"in cache, {kernels}, rival: scalar", speed, speeds["scalar"], "Gweights/s")
        if kernels in GEMV_AIMS:
            report.at_least(f"in cache, {kernels}, Gweights/s", speed, GEMV_AIMS[kernels])


def first_token(report: Report, found: dict[str, Any], quick: bool) -> None:
    """From the start of opening to the first logits, for the larger file."""
    seconds, size = found["first_token_seconds"], found["file_bytes"] * MEGA
    if not quick:
        report.at_most(f"from opening {size:.0f} MB to the first token, ms", seconds * MILLI, 50.0)


def binary(report: Report, program: Path, folder: Path) -> None:
    """The program's size without symbols."""
    stripped = folder / "stripped"
    size = None
    if shutil.which("strip"):
        subprocess.run(["strip", str(program), "-o", str(stripped)], check=True)
        size = stripped.stat().st_size / KIBI
    report.at_most("the program, stripped, KiB", size, 200.0)


def pytorch(report: Report, model: Any, ours: float, tokens: int) -> None:
    """Decoding of the same model by PyTorch, on one thread too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    states, zero = None, torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        for position in range(tokens + 2):
            if position == 2:
                began = time.perf_counter()
            _, states = model.decode(zero + position, zero, zero + position, states)
    theirs = tokens / (time.perf_counter() - began)
    torch.set_num_threads(threads)
    report.compare("decode, rival: our PyTorch decode", ours, theirs, "tokens/s")
    report.at_least("decode over our PyTorch decode", ours / theirs, 20.0)


def webassembly(report: Report, program: Path, path: Path, tokens: int, best: dict[str, Any]) -> None:
    """The same model under node, beside each native set of kernels."""
    natively = {
        kernels: bench(program, path, tokens, kernels=kernels)["decode_tokens_per_second"]
        for kernels in best["gweights_per_second"]
        if kernels != best["kernels"]
    }
    natively[best["kernels"]] = best["decode_tokens_per_second"]
    for kind, aim in WASM_AIMS.items():
        speed = measure_wasm(kind, path, tokens)
        for kernels, rival in natively.items():
            figure = rival if isinstance(speed, float) else speed
            ours = speed if isinstance(speed, float) else None
            report.compare(f"WebAssembly {kind} decode, rival: native {kernels}", ours, figure, "tokens/s")
        share = speed / natively[best["kernels"]] if isinstance(speed, float) else None
        report.at_least(f"WebAssembly {kind} over native {best['kernels']}", share, aim)


def measure_wasm(kind: WasmKind, path: Path, tokens: int) -> float | str:
    """Tokens a second under node, or what is missing."""
    if not shutil.which("node"):
        return "missing: node is not installed"
    try:
        module = compile_wasm(kind)
    except UserError as error:
        return f"missing: {error}"
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    # Node 20 has the dot products of bytes behind a flag, which later versions do not know.
    is_old = kind == "relaxed" and int(version.removeprefix("v").split(".")[0]) <= 20
    flags = ["--experimental-wasm-relaxed-simd"] if is_old else []
    command = ["node", *flags, str(WASM_PROBE), str(PAGE_FOLDER / "worker.js"), str(module), str(tokens), str(path)]
    code = f"process.stdout.write(require({json.dumps(str(PAGE_FOLDER / 'worker.js'))}).chooseKind())"
    can = subprocess.run(["node", *flags, "-e", code], capture_output=True, text=True, check=False).stdout
    if kind == "relaxed" and can != "relaxed":
        return "missing: this node's dot products of bytes are not those of the standard"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"missing: {done.stderr.strip()[:80]}"
    return tokens / float(json.loads(done.stdout)["seconds"])


def rivals(report: Report, found: dict[str, Any], quick: bool) -> None:
    """A product of one token with one matrix, of equal shape."""
    ours = found["gweights_per_second"].get(found["kernels"])
    width = 512 if quick else 4096
    name = f"{found['kernels']}, one token, rival: onnxruntime dynamic int8 {width} × {width}"
    report.compare(name, ours, measure_onnxruntime(width), "Gweights/s")
    report.compare("decode, rival: llama.cpp", found["decode_tokens_per_second"], measure_llama(), "tokens/s")


if __name__ == "__main__":
    run("Runtime in C", questions)
