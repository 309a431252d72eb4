"""Small models of every kind that the trainer makes, with weights that look trained, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from kabrn_dist.config import Config
from kabrn_dist.config.file import load_config
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.inference.load import build_full_model
from kabrn_dist.runtime.model_file import write_model_file

ROOT = Path(__file__).parents[2]

_SMALL = [
    *("model.vocab_size=300", "model.hidden_size=40", "model.layers=RR", "model.short_conv_size=0"),
    *("model.retention.num_heads=2", "model.retention.key_dim=10", "model.retention.value_dim=12"),
    *("model.experts.num_experts=4", "model.experts.top_k=2", "model.experts.expert_hidden_size=20"),
]
# Widths that are no multiples of 16, of 5 or of 64, and every kind of layer.
MODEL_KINDS: dict[str, list[str]] = {
    **{kind: [f"model.experts.type={kind}"] for kind in ("rational", "chebyshev", "hat", "swiglu", "relu2")},
    "bspline": ["model.experts.type=bspline", "model.experts.grid_size=4", "model.experts.spline_order=2"],
    "hybrid": ["model.layers=RAR", "model.short_conv_size=4"],
    "dense layers": ["model.layers=RRA", "model.experts.num_dense_layers=1", "model.experts.moe_layer_interval=2"],
    "dense alone": ["model.experts.num_dense_layers=2", "model.experts.dense_hidden_size=24"],
    "shared experts": ["model.experts.num_shared_experts=3", "model.experts.type=chebyshev"],
    "routed alone": ["model.experts.num_shared_experts=0", "model.router.score_func=softmax"],
    "router groups": [
        *("model.experts.num_experts=6", "model.router.n_group=3", "model.router.topk_group=2"),
        "model.router.norm_topk_prob=false",
    ],
    "scale groups": ["model.scale_group_size=7", "model.short_conv_size=3"],
    "wide scale groups": ["model.scale_group_size=1000"],
    "plain": ["model.quantize=false", "model.layers=RA"],
    "plain splines": ["model.quantize=false", "model.experts.type=hat"],
}


def make_model_config(*overrides: str) -> Config:
    """Return a small configuration with some values overridden, as `--set` does."""
    return load_config(ROOT / "configs" / "tiny.yaml", [*_SMALL, *overrides])


def make_model(config: Config) -> GenerativeModel:
    """Return the model of a configuration, with noise on all that starts at zero or alike."""
    model = build_full_model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("embedding", "head")):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.1 * float(parameter.std().nan_to_num(0.1)) + 0.01)
        model.routers.bias.copy_(torch.randn(model.routers.bias.shape, generator=generator) * 0.1)
    return model


def write_model_kinds(folder: Path, kinds: Sequence[str]) -> list[Path]:
    """Write a model file of each of some kinds, with embeddings in int8, and return them by name."""
    for kind in kinds:
        config = make_model_config(*MODEL_KINDS[kind])
        write_model_file(
            make_model(config), config, Tokenizer.of_bytes(), 3, folder / f"{kind}.mkb", embedding_dtype="int8"
        )
    return sorted(folder.iterdir())
