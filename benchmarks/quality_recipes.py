"""The models of `benchmarks/quality.py`, each one part away from the next, and how each is trained. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 128, 4, 4, 64, 12


@dataclass(frozen=True)
class ModelRecipe:
    """One model and how it is trained.

    Attributes:
        what: its description in tables.
        rates: learning rates to try, the best known one first.
        model: changes to `OURS`, by dotted keys; None for the rival.
        optimizer: changes to `OPTIMIZER`.
        taps: tokens before the current one that the rival's convolutions see.
    """

    what: str
    rates: tuple[float, ...]
    model: dict[str, Any] | None
    optimizer: dict[str, Any] = field(default_factory=dict)
    taps: int = 0


# The mixture: 1 + 2 experts of 2·128·172 weights are active, as many as of a dense SwiGLU of hidden width 344.
OURS: dict[str, Any] = {
    "hidden_size": WIDTH,
    "layers": "R" * LAYERS,
    "short_conv_size": 4,
    "retention": {"num_heads": HEADS, "key_dim": WIDTH // HEADS, "value_dim": WIDTH // HEADS, "decay": [1.5, 7]},
    "experts": {
        "type": "rational",
        "num_experts": 8,
        "num_shared_experts": 1,
        "top_k": 2,
        "expert_hidden_size": 172,
        "function_groups": 4,
    },
    "router": {"bias_update_rate": 1e-2},
}
OPTIMIZER: dict[str, Any] = {
    "betas": [0.9, 0.99],
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "lr_schedule": "linear",
    "min_lr_ratio": 0.0,
}
# Warm-up takes one in this many steps.
WARMUP = 20
DENSE = {"experts.type": "swiglu", "experts.num_dense_layers": LAYERS, "experts.dense_hidden_size": 344}
MODELS: dict[str, ModelRecipe] = {
    "a": ModelRecipe("dense Transformer, fp32", (2e-3, 3e-3, 1.3e-3), None),
    "b": ModelRecipe("retention and dense SwiGLU, fp32", (5e-3, 8e-3, 3e-3), {**DENSE, "quantize": False}),
    "c": ModelRecipe("b in ternary", (1.2e-2, 8e-3, 1.8e-2), DENSE),
    "d": ModelRecipe("MixKABRN: c with a mixture of rational KANs", (8e-3, 1.2e-2, 5e-3), {}),
    "e": ModelRecipe(
        "d with SwiGLU experts", (1.2e-2, 8e-3, 1.8e-2), {"experts.type": "swiglu", "experts.expert_hidden_size": 115}
    ),
    "f": ModelRecipe("d with one softmax layer of four", (1.2e-2, 8e-3, 1.8e-2), {"layers": "RARR"}),
    "g": ModelRecipe("a with the short convolutions of b to f", (8e-3, 5e-3, 1.2e-2), None, taps=3),
}
BASELINE = "a"
# Chosen so that (a) has as many active parameters as (d), and a gate on its heads as ours have.
RIVAL_HIDDEN, RIVAL_GATED = 347, True
