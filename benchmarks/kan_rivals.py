"""What KAN experts are held against, and ours built for it. Each is a `Pass`: forward, or forward and backward.

- SiLU: the same two matrix products with SiLU between and nothing else, an `F.linear` for each expert's rows.
- SiLU experts: experts like ours in all but their functions, so that norms, quantisers and products are the very same.
- pykan: in the mode its `speed()` sets (no symbolic branch, no record of activations), the fastest it has, on fewer
  tokens: it keeps several tensors of tokens × inputs × outputs, 4 MB a token here, which 4,096 times are 18 GB.
- flashkan: as shipped, its basis through `torch.compile`; with the whole network compiled; and without a compiler.
- FastKAN: by its formula (arXiv 2405.06721), LayerNorm, 8 Gaussians on [−2,2], a SiLU base branch with a bias.

Neither pykan nor flashkan normalises between layers; ours is timed with its norm. All splines are cubic on 5 intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.model.bitlinear import bitlinear
from kabrn_dist.model.experts.base import Experts, ExpertSpec, MatrixSpec
from kabrn_dist.model.experts.registry import EXPERT_TYPES
from kabrn_dist.ops.activation_quant import Quantized, normalize_quantize, quantize, rms_norm

GRID, DEGREE = 5, 3
GAUSSIANS, REACH = 8, 2.0
WAYS = ("as shipped", "compiled")


class Inputs:
    """Rows [N,D] sorted by expert, the gradient of the output, the rows of each expert. All rivals get these."""

    def __init__(self, tokens: int, width: int, experts: int, dtype: torch.dtype, device: str = "cpu") -> None:
        self.draw = torch.Generator().manual_seed(tokens + experts)
        self.tokens, self.width, self.experts, self.dtype, self.device = tokens, width, experts, dtype, device
        self.rows = rms_norm(self.normal(tokens, width))
        self.grad = self.normal(tokens, width)
        # Uneven, as a router leaves them: shares from 1 to 2.
        cuts = (torch.rand(experts, generator=self.draw) + 1).cumsum(0)
        ends = (cuts / cuts[-1] * tokens).round().int().tolist()
        self.counts = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal values."""
        return torch.randn(*shape, generator=self.draw).to(self.device, self.dtype)

    def matrix(self, outputs: int, inputs: int) -> Tensor:
        """Return a matrix [outputs,inputs] that keeps the variance."""
        return (self.normal(outputs, inputs) / math.sqrt(inputs)).requires_grad_()

    def learns(self) -> Tensor:
        """Return the inputs as a leaf that requires a gradient."""
        return self.rows.clone().requires_grad_()


class Pass:
    """Called, a forward and a backward pass: gradients of the input, the first leaf, and of all that learns."""

    def __init__(self, forward: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> None:
        self.forward, self.leaves, self.grad = forward, list(leaves), grad

    @property
    def parameters(self) -> int:
        """The number of learned values."""
        return sum(leaf.numel() for leaf in self.leaves[1:])

    def __call__(self) -> object:
        """Run forward and backward."""
        return torch.autograd.grad(self.forward(), self.leaves, self.grad)


class SiluExperts(Experts):
    """y = W₂ q(SiLU(W₁ x)), q = RMSNorm and int8: a BitLinear MLP, or a plain one."""

    up: Tensor
    down: Tensor

    @classmethod
    def define_matrices(cls, spec: ExpertSpec) -> dict[str, MatrixSpec]:
        """Return the two matrices of an MLP."""
        return {
            "up": MatrixSpec(spec.expert_hidden_size, spec.hidden_size),
            "down": MatrixSpec(spec.hidden_size, spec.expert_hidden_size, spec.init_gain, reads_hidden=True),
        }

    def forward(self, x: Quantized, tokens_per_expert: Sequence[int]) -> Tensor:
        """Return the outputs of rows sorted by expert."""
        hidden = F.silu(bitlinear(x, self.matrices("up"), tokens_per_expert))
        return bitlinear(normalize_quantize(hidden, self.lam), self.matrices("down"), tokens_per_expert)


def experts(form: str, x: Inputs, hidden: int, quantized: bool) -> Pass:
    """A form of ours, or `silu`. The norm and quantiser that all experts of a token share were before."""
    silu = form == "silu"
    settings = ExpertsConfig.model_validate(
        {"type": "relu2" if silu else form, "num_experts": x.experts, "top_k": 1, "expert_hidden_size": hidden}
        | {"grid_size": GRID, "spline_order": DEGREE}
    )
    build = SiluExperts if silu else EXPERT_TYPES[form]
    module = build(ExpertSpec(x.width, hidden, settings, range(x.experts), quantized))
    module.initialize(0, form)
    module.to(x.device)
    for name in module.stds:
        # As in training: matrices in the compute dtype, coefficients in fp32.
        matrix = module.get_parameter(name)
        matrix.data = matrix.data.to(x.dtype)
    codes, scale, _ = quantize(x.rows, quantized)
    codes.requires_grad_()
    rows = Quantized(codes, scale)
    return Pass(lambda: module(rows, x.counts), [codes, *module.parameters()], x.grad)


def silu(x: Inputs, hidden: int) -> Pass:
    """Each expert has leaves of its own: slices of a stacked one cost a tensor of zeros each in backward."""
    rows = x.learns()
    matrices = [(x.matrix(hidden, x.width), x.matrix(x.width, hidden)) for _ in x.counts]

    def forward() -> Tensor:
        parts = zip(rows.split(list(x.counts)), matrices, strict=True)
        return torch.cat([F.linear(F.silu(F.linear(part, up)), down) for part, (up, down) in parts])

    return Pass(forward, [rows, *(matrix for pair in matrices for matrix in pair)], x.grad)


def fastkan(x: Inputs, hidden: int) -> Pass:
    """Return two layers y = W_s exp(−((LayerNorm(x) − c)/δ)²) + W_b SiLU(x) + bias, δ the distance of centers."""
    rows = x.learns()
    centers = torch.linspace(-REACH, REACH, GAUSSIANS, device=x.device, dtype=x.dtype)
    inverse = (GAUSSIANS - 1) / (2 * REACH)
    layers = []
    for inputs, outputs in ((x.width, hidden), (hidden, x.width)):
        gain, shift = (torch.full((inputs,), value, device=x.device, dtype=x.dtype) for value in (1.0, 0.0))
        bias = torch.zeros(outputs, device=x.device, dtype=x.dtype)
        spline, base = x.matrix(outputs, inputs * GAUSSIANS), x.matrix(outputs, inputs)
        layers.append((gain.requires_grad_(), shift.requires_grad_(), spline, base, bias.requires_grad_()))

    def forward() -> Tensor:
        z = rows
        for gain, shift, spline, base, bias in layers:
            normal = F.layer_norm(z, gain.shape, gain, shift)
            basis = torch.exp(-(((normal.unsqueeze(-1) - centers) * inverse) ** 2)).flatten(-2)
            z = F.linear(basis, spline) + F.linear(F.silu(z), base, bias)
        return z

    return Pass(forward, [rows, *(leaf for layer in layers for leaf in layer)], x.grad)


def pykan(x: Inputs, hidden: int) -> Pass | str:
    """The pass, or why it cannot be had."""
    try:
        from kan import KAN
    except ImportError as error:
        return f"missing: {error.name} (make bench-kan installs it)"
    network = KAN([x.width, hidden, x.width], grid=GRID, k=DEGREE, save_act=False, auto_save=False, device=x.device)
    network.symbolic_enabled = False  # and with it the parameters of that branch
    return _network(network, network.act_fun, x)


def flashkan(x: Inputs, hidden: int, how: str = "as shipped") -> Pass | str:
    """`as shipped`, `compiled` as a whole, or `eager`. The pass, or why it cannot be had."""
    try:
        from flashkan import KANNetwork
    except ImportError as error:
        return f"missing: {error.name} (make bench-kan installs it)"
    network = KANNetwork([x.width, hidden, x.width], grid_size=GRID, spline_order=DEGREE).to(x.device, x.dtype)
    result = _network(torch.compile(network) if how == "compiled" else network, network, x)
    if how == "eager":
        with_compiler = result.forward
        result.forward = torch.compiler.set_stance("force_eager")(with_compiler)
    else:
        try:
            result()  # compiles, which is not timed
        except torch._dynamo.exc.BackendCompilerFailed as error:
            return f"missing: a compiler ({error})".splitlines()[0]
    return result


def _network(forward: Callable[[Tensor], Tensor], learns: nn.Module, x: Inputs) -> Pass:
    rows = x.learns()
    return Pass(lambda: forward(rows), [rows, *(p for p in learns.parameters() if p.requires_grad)], x.grad)
