"""Small models with random weights of every kind, written as files of the C runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kabrn_dist.config import Config
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.inference.load import build_full_model
from kabrn_dist.runtime.model_file import write_model_file

BASE: dict[str, Any] = {
    "vocab_size": 263,
    "hidden_size": 32,
    "layers": "RR",
    "retention": {"num_heads": 2, "key_dim": 16, "value_dim": 24},
    "experts": {
        "type": "rational",
        "num_experts": 6,
        "num_shared_experts": 1,
        "top_k": 2,
        "expert_hidden_size": 48,
        "function_groups": 4,
    },
    "router": {},
}
# What differs from BASE; sections are merged.
KINDS: dict[str, dict[str, Any]] = {
    "rational": {},
    "chebyshev": {"experts": {"type": "chebyshev", "grid_range": (-2.0, 2.5)}},
    "hat": {"experts": {"type": "hat", "grid_size": 5}, "hidden_size": 27},
    "bspline": {"experts": {"type": "bspline", "grid_size": 6, "spline_order": 3}},
    "quadratic": {"experts": {"type": "bspline", "grid_size": 4, "spline_order": 2, "grid_range": (-1.0, 1.5)}},
    "swiglu": {"experts": {"type": "swiglu", "expert_hidden_size": 37}, "hidden_size": 45},
    "relu2": {"experts": {"type": "relu2", "num_shared_experts": 2}},
    "groups": {"scale_group_size": 5, "router": {"n_group": 3, "topk_group": 2, "score_func": "softmax"}},
    "unnormalized": {"router": {"norm_topk_prob": False, "n_group": 3, "topk_group": 1}, "hidden_size": 36},
    "attention": {"layers": "RAAR", "experts": {"num_shared_experts": 0}},
    "convolution": {"layers": "RA", "short_conv_size": 4, "retention": {"key_dim": 6, "value_dim": 5}},
    "dense": {"layers": "RRRR", "experts": {"num_dense_layers": 1, "moe_layer_interval": 2, "dense_hidden_size": 64}},
    "wide": {"hidden_size": 200, "vocab_size": 301, "experts": {"type": "relu2", "expert_hidden_size": 300}},
    "plain": {"quantize": False, "short_conv_size": 3, "layers": "RA"},
    "plain_hat": {"quantize": False, "experts": {"type": "hat", "grid_size": 4}},
    "plain_swiglu": {"quantize": False, "experts": {"type": "swiglu", "expert_hidden_size": 21}, "hidden_size": 19},
    "plain_chebyshev": {"quantize": False, "experts": {"type": "chebyshev"}},
}


def random_model_config(kind: str, **changes: Any) -> Config:
    """Return the configuration of one of `KINDS`, with changed keys of its section `model`."""
    model = dict(BASE)
    for part in (KINDS[kind], changes):
        for key, value in part.items():
            model[key] = {**model[key], **value} if isinstance(value, dict) else value
    return Config.model_validate(
        {
            "run": {"folder": "runs/none"},
            "data": {"path": "none", "sequence_length": 16},
            "model": model,
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )


def random_model(config: Config, seed: int = 0) -> GenerativeModel:
    """Build a model in which nothing is left at its start: functions, convolutions and routers' biases differ."""
    torch.manual_seed(seed)
    model = build_full_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "convolution" in name:
                parameter.normal_(std=0.3)
            elif any(part in name for part in ("inner", "outer")) and parameter.shape[-1] in (4, 6):
                parameter.add_(torch.randn_like(parameter) * 0.05)
            elif "router" in name:
                parameter.normal_(std=0.5)
        model.head.weight.normal_()
        model.routers.bias.normal_(std=0.1)
    return model


def write_random_model(
    kind: str, path: Path, seed: int = 0, options: dict[str, Any] | None = None, **changes: Any
) -> GenerativeModel:
    """Write a random model of a kind as a file, and return it. `options` are those of `write_model_file`."""
    config = random_model_config(kind, **changes)
    model = random_model(config, seed)
    write_model_file(model, config, Tokenizer.of_bytes(), 7, path, **(options or {}))
    return model


@torch.no_grad()
def read_by_torch(model: GenerativeModel, tokens: list[int]) -> torch.Tensor:
    """Return the logits [T,C] after each of the tokens, read one by one as one document."""
    logits, states, one = [], None, torch.zeros(1, 1, dtype=torch.int64)
    for position, token in enumerate(tokens):
        found, states = model.decode(one + token, one, one + position, states)
        logits.append(found[0])
    return torch.stack(logits)
