"""Dense Transformers of the Llama kind (Llama, Mistral, Qwen2, Qwen3), as our models.

Embedding, head, and what a feed-forward reads are exact. A layer of softmax attention (`A`) is close to theirs: ours
normalizes queries, keys and heads, and has a gate. For a layer of retention (`R`) their projections are a start that
has to be trained on.
"""

from __future__ import annotations

from torch import Tensor

from kabrn_dist.hub.import_retnet import make_dense_section
from kabrn_dist.hub.import_source import CONFIG_NAME, ForeignModel
from kabrn_dist.hub.import_tensors import ImportedModel, map_ends, map_feed_forward, map_projection
from kabrn_dist.utils.errors import UserError

LLAMA_TYPES = ("llama", "mistral", "qwen2", "qwen3")
OUR_ROPE_BASE = 10_000.0


def plan_llama(source: ForeignModel, layers: str | None = None) -> ImportedModel:
    """Return how a Transformer becomes one of our models.

    Args:
        source: The Transformer.
        layers: Letter of each layer, R for retention and A for attention; None makes all retention.

    Raises:
        UserError: for a configuration that is not of the Llama kind, or another number of layers.
    """
    if (activation := source.get("hidden_act", default="silu")) not in ("silu", "swish"):
        raise UserError(
            f"{source.folder / CONFIG_NAME}: hidden_act is {activation!r}, and ours is 'silu'; import a model with that"
        )
    size, count, heads = source.size("hidden_size"), source.count_layers(), source.size("num_attention_heads")
    letters = layers or "R" * count
    if len(letters) != count or set(letters) - {"R", "A"}:
        raise UserError(f"--layers {letters}: {source.folder} has {count} layers; give {count} letters of R and A")
    head_size = source.size("head_dim", default=max(1, size // heads))
    hidden = source.size("intermediate_size")
    model = {
        "vocab_size": source.size("vocab_size"),
        "hidden_size": size,
        "layers": letters,
        "retention": {"num_heads": heads, "key_dim": head_size, "value_dim": head_size, "decay": "exponent"},
        "experts": make_dense_section(count, hidden),
    }
    imported = ImportedModel("llama", source, model, float(source.get("rms_norm_eps", default=1e-6)))
    map_ends(imported, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    for layer, letter in enumerate(letters):
        _map_attention(imported, layer, letter, heads, head_size)
        prefix = f"model.layers.{layer}."
        map_feed_forward(imported, layer, f"{prefix}mlp.", f"{prefix}post_attention_layernorm.weight", hidden)
    imported.dropped += _list_dropped(imported)
    return imported


def _map_attention(imported: ImportedModel, layer: int, letter: str, heads: int, head_size: int) -> None:
    source, size = imported.source, imported.source.size("hidden_size")
    theirs, ours = f"model.layers.{layer}.self_attn.", f"blocks.{layer}.mixer."
    key_heads = source.size("num_key_value_heads", default=heads)
    if heads % key_heads:
        raise UserError(
            f"{source.folder / CONFIG_NAME}: num_key_value_heads {key_heads} does not divide {heads} heads; correct it"
        )
    start = "a start: theirs is softmax attention"
    for name, letter_of_name, count in (("query", "q", heads), ("key", "k", key_heads), ("value", "v", key_heads)):
        differs = "our heads of queries and keys are normalized" if name != "value" else "as it is"
        map_projection(
            imported,
            f"{ours}inputs.{name}.weight",
            f"{theirs}{letter_of_name}_proj.weight",
            f"model.layers.{layer}.input_layernorm.weight",
            (count * head_size, size),
            (heads, count),
            "exact" if letter == "A" and name == "value" else "approximate",
            differs if letter == "A" else start,
        )
    imported.add(
        f"{ours}inputs.gate.weight", (), "new", "alike in all channels, so that the norm behind it cancels it at first"
    )
    matrix, scale = f"{theirs}o_proj.weight", imported.stream_scale

    def make() -> Tensor:
        return source.read(matrix, (size, heads * head_size)) * scale

    remark = "our heads are normalized before it; times the mean that this divides by"
    imported.add(f"{ours}output.out.weight", (matrix,), "approximate", remark, make)


def _list_dropped(imported: ImportedModel) -> list[str]:
    source = imported.source
    dropped = []
    parameters = source.get("rope_parameters", default={})
    base = source.get("rope_theta", default=None) or (
        parameters.get("rope_theta") if isinstance(parameters, dict) else None
    )
    if base is not None and float(base) != OUR_ROPE_BASE:
        dropped.append(f"rotary base {base:g}: ours is {OUR_ROPE_BASE:g}")
    scaling = source.get("rope_scaling", default=None)
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) not in (None, "default"):
        dropped.append(f"rotary scaling {scaling.get('rope_type', scaling.get('type'))}")
    if source.get("sliding_window") and source.get("use_sliding_window", default=True):
        dropped.append(f"sliding window of {source.get('sliding_window')} tokens: our attention sees the document")
    return dropped + imported.list_unused()
