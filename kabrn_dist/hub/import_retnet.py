"""RetNets of flash-linear-attention (model type `retnet`), as our models.

Its retention is ours: rotary q and k by halves with base 10,000, decays 1 − 2^(−5−h), q times key_dim^−½, an RMSNorm of
each head, a swish gate. Its heads' norm has another ε: the result of retention is linear in each of q, k and v, so each
of their matrices is multiplied by the sixth root of our ε / their ε, which makes our norm theirs. Ours has one RMSNorm
more, between the gate and the output matrix, as in the feed-forward: these two matrices are approximate.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kabrn_dist.hub.import_source import CONFIG_NAME, ForeignModel
from kabrn_dist.hub.import_tensors import ImportedModel, map_ends, map_feed_forward, map_projection
from kabrn_dist.model.retention import RETENTION_NORM_EPS
from kabrn_dist.utils.errors import UserError

# Keys of the configuration that change what the model computes, and the values with which it is one of ours.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("swish", "silu"),
    "use_output_gate": (True,),
    "feature_map": (None,),
    "attn": (None,),
    "attnres_block_size": (None,),
    "use_short_conv": (False, None),
}
_DEFAULTS = {"hidden_act": "swish", "use_output_gate": True}


def plan_retnet(source: ForeignModel) -> ImportedModel:
    """Return how a RetNet becomes one of our models.

    Raises:
        UserError: for a configuration that is not one of a RetNet as ours.
    """
    for key, allowed in _REQUIRED.items():
        value = source.config.get(key, _DEFAULTS.get(key))
        if value not in allowed:
            raise UserError(
                f"{source.folder / CONFIG_NAME}: {key} is {value!r}, with which its layers are of another kind; "
                f"import a model with {allowed[0]!r}"
            )
    size, layers, heads = source.size("hidden_size"), source.count_layers(), source.size("num_heads")
    key_dim, value_dim = (_head_size(source, key, size, heads) for key in ("expand_k", "expand_v"))
    hidden = _hidden_size(source, size)
    model = {
        "vocab_size": source.size("vocab_size"),
        "hidden_size": size,
        "layers": "R" * layers,
        "retention": {"num_heads": heads, "key_dim": key_dim, "value_dim": value_dim, "decay": "exponent"},
        "experts": make_dense_section(layers, hidden),
    }
    eps = float(source.get("norm_eps", default=1e-6))
    imported = ImportedModel("retnet", source, model, eps)
    map_ends(imported, "model.embeddings.weight", "model.norm.weight", "lm_head.weight")
    for layer in range(layers):
        _map_mixer(imported, layer, heads, key_dim, value_dim)
        prefix = f"model.layers.{layer}."
        map_feed_forward(imported, layer, f"{prefix}mlp.", f"{prefix}mlp_norm.weight", hidden)
    imported.dropped += imported.list_unused()
    return imported


def make_dense_section(layers: int, hidden: int) -> dict[str, Any]:
    """Return a section `model.experts` in which every layer has one dense SwiGLU network of `hidden` units."""
    return {
        "type": "swiglu",
        "num_experts": 1,
        "num_shared_experts": 0,
        "top_k": 1,
        "expert_hidden_size": hidden,
        "dense_hidden_size": hidden,
        "num_dense_layers": layers,
    }


def _head_size(source: ForeignModel, key: str, size: int, heads: int) -> int:
    expand = source.get(key, default={"expand_k": 1.0, "expand_v": 2.0}[key])
    width = round(size * expand)
    if width < 1 or width % heads:
        raise UserError(f"{source.folder / CONFIG_NAME}: {key} {expand} gives {width}, no multiple of {heads} heads")
    return width // heads


def _hidden_size(source: ForeignModel, size: int) -> int:
    if source.get("intermediate_size") is not None:
        return source.size("intermediate_size")
    # The library's rule.
    whole = int(size * source.size("hidden_ratio", default=4) * 2 / 3)
    return 256 * ((whole + 255) // 256)


def _map_mixer(imported: ImportedModel, layer: int, heads: int, key_dim: int, value_dim: int) -> None:
    source, size = imported.source, imported.source.size("hidden_size")
    theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}.mixer."
    key_heads = source.size("num_kv_heads", default=heads)
    root = (RETENTION_NORM_EPS / imported.eps) ** (1 / 6) if imported.eps > 0 else 1.0
    folded = "the gain of the norm before it is in it"
    scaled = f"{folded}, × {root:.3g}, which gives our heads' norm their ε of {imported.eps:g}"
    for name, letter, count, width in (
        ("query", "q", heads, key_dim),
        ("key", "k", key_heads, key_dim),
        ("value", "v", key_heads, value_dim),
        ("gate", "g", heads, value_dim),
    ):
        map_projection(
            imported,
            f"{ours}inputs.{name}.weight",
            f"{theirs}attn.{letter}_proj.weight",
            f"{theirs}attn_norm.weight",
            (count * width, size),
            (heads, count),
            "exact",
            folded if name == "gate" else scaled,
            1.0 if name == "gate" else root,
        )
    matrix = f"{theirs}attn.o_proj.weight"
    norms = [f"{theirs}attn.{name}.weight" for name in ("g_norm_swish_gate", "g_norm")]
    gain = next((name for name in norms if name in source.tensors), None)

    def make() -> Tensor:
        values = source.read(matrix, (size, heads * value_dim)) * imported.stream_scale
        return values if gain is None else values * source.read(gain, (value_dim,)).repeat(heads)

    remark = "ours has an RMSNorm before it; times the mean that this divides by"
    remark += "" if gain is None else "; the gain of the heads' norm is in it"
    imported.add(f"{ours}output.out.weight", (matrix, *([gain] if gain else ())), "approximate", remark, make)
