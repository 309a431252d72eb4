"""Adapters of random contents, for tests of files; they fit models of the names and sizes below."""

from __future__ import annotations

import numpy as np

from kabrn_dist.adapters.adapter import Adapter, AdapterInfo, AdapterMethod, LowRankFactors, StateFactors
from kabrn_dist.adapters.code_patch import make_patch

STACKED, SINGLE = "blocks.1.mixture.routed.up", "blocks.0.mixer.inputs.query.weight"


def make_info(method: AdapterMethod, rank: int = 4, alpha: float = 8.0) -> AdapterInfo:
    result = "e" * 64 if method == "ternary_lora" else ""
    return AdapterInfo("café", method, rank, alpha, ("mixer", "routed"), "5" * 64, result, 120, "runs/base")


def make_adapter_of(method: AdapterMethod, seed: int = 0, rank: int = 4, alpha: float = 8.0) -> Adapter:
    """Return an adapter of a method with factors, states or patches of a stack of 3 and a single matrix."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return random.normal(size=shape).astype(np.float32)

    info = make_info(method, rank, alpha)
    if method == "lora":
        stack = LowRankFactors(normal(3, rank, 10), normal(3, 7, rank))
        return Adapter(info, low_ranks={SINGLE: LowRankFactors(normal(1, rank, 6), normal(1, 9, rank)), STACKED: stack})
    if method == "state":
        return Adapter(info, states={layer: StateFactors(normal(2, rank, 5), normal(2, rank, 6)) for layer in (0, 12)})
    patches = {}
    for name, shape, scales, share in ((STACKED, (3, 70, 50), 10, 0.002), (SINGLE, (1, 9, 6), 1, 0.3)):
        base = random.integers(-1, 2, shape).astype(np.int8)
        flips = random.random(shape) < share
        codes = ((base + 1 + flips * random.integers(1, 3, shape)) % 3 - 1).astype(np.int8)
        before = np.abs(normal(shape[0], scales)) + np.float32(0.1)
        patches[name] = make_patch(base, before, codes, before * np.float32(1.01))
    return Adapter(info, patches=patches)
