"""Activation checkpointing (fairscale): keep the inputs of a module, and run it again in backward.

fairscale is imported only where it is switched on, so that inference and reports do without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kabrn_dist.model.experts.base import Experts
from kabrn_dist.ops.activation_quant import Quantized


def checkpoint_module(module: nn.Module, offload: bool) -> None:
    """Make `module` keep only its inputs for backward, in host memory with `offload`. Changes it in place."""
    from fairscale.nn.checkpoint import checkpoint_wrapper

    # Below the first adapter of a frozen base no input needs gradients. fairscale gives parameters theirs all the same.
    warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
    checkpoint_wrapper(module, offload_to_cpu=offload)


def checkpoint_experts(experts: Experts, offload: bool) -> None:
    """Do the same as `checkpoint_module` for experts, whose input is a `Quantized`. Changes them in place."""
    flat = _FlatExperts(experts)
    checkpoint_module(flat, offload)

    def forward(x: Quantized, tokens_per_expert: Sequence[int]) -> Any:
        return flat(*x, tokens_per_expert)

    experts.forward = forward  # type: ignore[method-assign]


class _FlatExperts(nn.Module):
    """Takes tensors one by one: fairscale finds inputs that need gradients only among the arguments themselves."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        # A bound method, not a submodule: parameters keep their names.
        self._forward = experts.forward

    def forward(
        self, codes: Tensor, scale: Tensor, int8_codes: Tensor | None, tokens_per_expert: Sequence[int]
    ) -> Tensor:
        return self._forward(Quantized(codes, scale, int8_codes), tokens_per_expert)
