"""What all mixtures in the benchmark are given: tokens, a router, experts; and how their passes are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Function = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """N tokens of width D; E experts of one hidden width, k of which a token visits."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    width: int = 256

    def __str__(self) -> str:
        return f"{self.experts} experts top-{self.top_k}"


class Layer(NamedTuple):
    """A function [1,N,D] → [1,N,D] and what it learns."""

    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]


class Swiglu(nn.Module):
    """down(silu(gate x) · up x), the expert of all rivals."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(matrix.clone()) for matrix in (gate, up, down))

    def forward(self, x: Tensor) -> Tensor:
        """Return the expert's outputs: [N,D] → [N,D]."""
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


def _drawn_with(seed: int) -> Callable[..., Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return lambda *sizes: torch.randn(sizes, generator=draw)


class Inputs:
    """Tokens x [1,N,D] of RMS 1, the gradient of the output, router [E,D], experts' gate, up [E,H,D], down [E,D,H]."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int = 0) -> None:
        """`seed` is that of the tokens; the rest is always the same."""
        e, h, d = shape.experts, shape.hidden, shape.width
        normal = _drawn_with(1000 + seed)
        tokens = normal(1, shape.tokens, d)
        tokens = tokens / tokens.square().mean(-1, keepdim=True).sqrt()
        self.shape, self.dtype = shape, dtype
        self.x, self.grad = tokens.to(dtype), normal(1, shape.tokens, d).to(dtype)
        normal = _drawn_with(0)
        self.router = torch.linalg.qr(normal(d, e))[0].T.contiguous().to(dtype)
        self.gate, self.up = (normal(e, h, d).div(d**0.5).to(dtype) for _ in range(2))
        self.down = normal(e, d, h).div(h**0.5).to(dtype)

    @property
    def counts(self) -> list[int]:
        """Copies for each expert."""
        chosen = (self.x[0].float() @ self.router.float().T).topk(self.shape.top_k).indices
        return torch.bincount(chosen.flatten(), minlength=self.shape.experts).tolist()

    @property
    def imbalance(self) -> float:
        """The fullest expert's copies over the fair share."""
        return max(self.counts) * self.shape.experts / (self.shape.tokens * self.shape.top_k)

    def experts(self) -> list[Swiglu]:
        """Return the experts as modules of their own."""
        return [Swiglu(*matrices) for matrices in zip(self.gate, self.up, self.down, strict=True)]


def both_passes(layer: Layer, inputs: Inputs) -> Function:
    """Forward and backward, gradients of the tokens and of all parameters."""
    x = inputs.x.clone().requires_grad_()
    return lambda: torch.autograd.grad(layer.forward(x), [x, *layer.parameters], inputs.grad)


def forward_pass(layer: Layer, inputs: Inputs) -> Callable[[], Tensor]:
    """Return a call of the forward pass alone."""
    x = inputs.x.clone().requires_grad_()
    return lambda: layer.forward(x)


def of_module(module: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> Layer:
    """Return a module and its parameters as a layer."""
    return Layer(call or module, list(module.parameters()))
