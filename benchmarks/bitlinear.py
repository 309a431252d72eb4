"""What does a ternary matrix with int8 inputs cost in training, beside a plain one, and what does it keep?

One square matrix, forward and forward + backward to inputs and weights. Ours starts at rows that are not normalised
yet: RMSNorm, quantiser, rounding of the latents and the product are all in its time. In one run, in turns:

- nn.Linear in bf16 and fp32, without norm or quantiser: the floor that the aims are set against.
- ours in fp32 arithmetic instead of int8 forward, and with backward's products in the dtype they come in instead of the
  faster one: what the choices are worth here.
- the fake-quantised form by definition, differentiated by autograd.
- transformers' AutoBitLinear (online) and torchao's BitNet training linear, where they are installed.

The floor of the work is 2·N·D² operations for a forward pass and three times that for both.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.report import Report, kept_bytes, measure, run
from kabrn_dist.kernels.selection import int8_matmul_is_faster, matmul_dtype
from kabrn_dist.model import bitlinear
from kabrn_dist.model.bitlinear import BitLinear
from kabrn_dist.ops.activation_quant import normalize_quantize

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WAYS = ("forward", "forward + backward")
# Of the products, as they would be without a measurement.
CHOICES: dict[str, tuple[str, Callable[..., object]]] = {
    "ours in fp32 arithmetic": ("int8_matmul_is_faster", lambda *_: False),
    "ours, backward as it comes": ("matmul_dtype", lambda _, dtype: dtype),
}
MILLI, MEGA = 1e3, 1e-6
Layer = Callable[[Tensor], Tensor]


def questions(report: Report, quick: bool) -> None:
    """Fill the report: all rivals at each width, the choices of arithmetic, the saved bytes."""
    tokens, widths, seconds = (256, (256, 512), 0.3) if quick else (1024, (256, 512, 1024, 2048, 4096), 20.0)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for width in widths:
            one_width(report, device, tokens, width, seconds)
        chosen = int8_matmul_is_faster(device, torch.bfloat16)
        report.compare(f"{device}: codes are multiplied in int8 (1) or fp32 (0), rival: always int8", chosen, 1.0, "")
        wide = float(matmul_dtype(device, torch.bfloat16) == torch.float32)
        report.compare(f"{device}: bf16's backward is in fp32 (1) or bf16 (0), rival: always fp32", wide, 1.0, "")
    if "cuda" not in devices:
        report.compare("GPU, rival: nn.Linear", None, "missing: no CUDA card", "ms")
    memory(report, 256 if quick else 1024)


def one_width(report: Report, device: str, tokens: int, width: int, seconds: float) -> None:
    """Both passes of all rivals at one width."""
    functions: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    for name, dtype in DTYPES.items():
        rows = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
        for rival, layer in rivals(width, dtype, device).items():
            if isinstance(layer, str):
                missing[f"{rival} {name}"] = layer
                continue
            functions[f"{rival} {name} forward"] = forward_pass(layer, rows)
            functions[f"{rival} {name} forward + backward"] = both_passes(layer, rows)
        for choice in CHOICES:
            for way in WAYS:
                functions[f"{choice} {name} {way}"] = with_choice(choice, functions[f"ours {name} {way}"])
    times = measure(functions, seconds)
    for name in DTYPES:
        for way in WAYS:
            here, ours = f"{device} {width} {name} {way}", times[f"ours {name} {way}"] * MILLI
            for rival in ("nn.Linear", *CHOICES, "fake-quantised", "AutoBitLinear", "torchao"):
                key = f"{rival} {name}"
                figure: float | str = missing[key] if key in missing else times[f"{key} {way}"] * MILLI
                report.compare(f"{here}, rival: {rival}", ours, figure, "ms")
    if width >= 1024:
        for way, aim in (("forward", 0.7), ("forward + backward", 0.95)):
            over = times[f"ours bf16 {way}"] / times[f"nn.Linear bf16 {way}"]
            report.at_most(f"{device} {width} bf16 {way}: time over nn.Linear's", over, aim)


def rivals(width: int, dtype: torch.dtype, device: str) -> dict[str, Layer | str]:
    """By name: a layer with a weight that requires gradients, or why there is none."""
    ours = BitLinear(width, width).to(device, dtype)
    ours.initialize(0, "ours")
    plain = nn.Linear(width, width, bias=False, device=device, dtype=dtype)
    return {
        "ours": lambda x: ours(normalize_quantize(x)),
        "nn.Linear": plain,
        "fake-quantised": lambda x: fake_quantized(x, ours.weight),
        "AutoBitLinear": _auto_bitlinear(width, dtype, device),
        "torchao": _torchao(width, dtype, device),
    }


def with_choice(choice: str, call: Callable[[], object]) -> Callable[[], object]:
    """`call` as if the choice had been made otherwise."""

    def run() -> None:
        with mock.patch.object(bitlinear, *CHOICES[choice]):
            call()

    return run


def fake_quantized(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm and BitLinear by definition: both sides dequantised, [N,D] × [D,D]."""
    values = F.rms_norm(x, x.shape[-1:])
    scale = 127 / values.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    read = values + ((values * scale).round().clamp(-128, 127) / scale - values).detach()
    gamma = weight.abs().mean().clamp(min=1e-5)
    used = weight + ((weight / gamma).round().clamp(-1, 1) * gamma - weight).detach()
    return read @ used.T


def _auto_bitlinear(width: int, dtype: torch.dtype, device: str) -> Layer | str:
    try:
        from transformers.integrations.bitnet import AutoBitLinear
    except ImportError as error:
        return f"missing: {error}"
    layer: nn.Module = AutoBitLinear(width, width, bias=False, dtype=dtype, device=device, online_quant=True)
    return layer


def _torchao(width: int, dtype: torch.dtype, device: str) -> Layer | str:
    try:
        from torchao import quantize_
        from torchao.prototype.quantized_training import bitnet_training

        layer = nn.Sequential(nn.Linear(width, width, bias=False, dtype=dtype, device=device))
        quantize_(layer, bitnet_training())
        layer(torch.randn(32, width, dtype=dtype, device=device).requires_grad_()).sum().backward()
    except (ImportError, RuntimeError, AssertionError) as error:
        return f"missing: {str(error).splitlines()[0][:80]}"
    return layer


def forward_pass(layer: Layer, x: Tensor) -> Callable[[], object]:
    """As in training: what backward needs is kept, then dropped."""
    return lambda: layer(x)


def both_passes(layer: Layer, x: Tensor) -> Callable[[], object]:
    """Return a call of forward and backward, to inputs and weights."""
    noise = torch.randn_like(x)

    def call() -> None:
        x.grad = None
        layer(x).backward(noise)

    return call


def memory(report: Report, width: int) -> None:
    """What a stack of six steps, each a norm, a quantiser and four matrices that read it, keeps for backward."""
    layers = [BitLinear(width, width) for _ in range(24)]
    for name, dtype in DTYPES.items():
        for number, layer in enumerate(layers):
            layer.initialize(0, str(number))
            layer.to(dtype)
        x = torch.randn(1024, width).to(dtype).requires_grad_()

        def ours(x: Tensor = x) -> Tensor:
            for step in range(6):
                read = normalize_quantize(x)
                x = torch.stack([layer(read) for layer in layers[4 * step : 4 * step + 4]]).sum(0)
            return x

        def fake(x: Tensor = x) -> Tensor:
            for step in range(6):
                x = torch.stack([fake_quantized(x, layer.weight) for layer in layers[4 * step : 4 * step + 4]]).sum(0)
            return x

        kept = kept_bytes(ours) * MEGA, kept_bytes(fake) * MEGA
        report.compare(f"{name} kept for backward by a stack of 24, rival: fake-quantised", *kept, "MB")
        report.at_most(f"{name} kept for backward over the fake-quantised form's", kept[0] / kept[1], 0.6)


if __name__ == "__main__":
    run("BitLinear", questions)
