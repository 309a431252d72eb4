"""Initial weights: drawn per logical tensor from its name, so they do not depend on rank or world size."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def draw_normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """Draw Gaussian fp32 values of `shape` and standard deviation `std`, a pure function of `seed` and `name`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std


def draw_experts(seed: int, name: str, expert_ids: range, shape: tuple[int, ...], std: float) -> Tensor:
    """Draw [E, *shape]: one tensor for each of `expert_ids`, named by its global number."""
    return torch.stack([draw_normal(seed, f"{name}.{expert}", shape, std) for expert in expert_ids])
