"""The section `model` of a run as config.json and generation_config.json of transformers."""

from __future__ import annotations

from typing import Any

from kabrn_dist.config import ModelConfig
from kabrn_dist.hub.tensors import Flavor

# Version of transformers whose layout of files is written; newer ones read it.
TRANSFORMERS_VERSION = "4.57.0"


def make_hub_config(model: ModelConfig, lam: float, step: int, document_token: int, flavor: Flavor) -> dict[str, Any]:
    """Return the content of config.json, whose keys are those of configuration_mixkabrn.py.

    Args:
        model: Model of the run.
        lam: How far it is quantized.
        step: Optimizer steps of the weights.
        document_token: Id that begins and ends documents.
        flavor: Of the tensors.
    """
    retention, experts, router = model.retention, model.experts, model.router
    return {
        "architectures": ["MixKABRNForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mixkabrn.MixKABRNConfig",
            "AutoModel": "modeling_mixkabrn.MixKABRNModel",
            "AutoModelForCausalLM": "modeling_mixkabrn.MixKABRNForCausalLM",
        },
        "model_type": "mixkabrn",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "layers": model.layers,
        "num_hidden_layers": len(model.layers),
        "num_heads": retention.num_heads,
        "key_dim": retention.key_dim,
        "value_dim": retention.value_dim,
        "decay": _decay_exponents(retention.decay, retention.num_heads),
        "chunk_size": retention.chunk_size,
        "short_conv_size": model.short_conv_size,
        "expert_type": experts.type,
        "num_experts": experts.num_experts,
        "num_shared_experts": experts.num_shared_experts,
        "num_experts_per_tok": experts.top_k,
        "expert_hidden_size": experts.expert_hidden_size,
        "dense_hidden_size": model.dense_hidden_size,
        "moe_layers": list(model.moe_layers),
        "function_groups": experts.function_groups,
        "grid_size": experts.grid_size,
        "spline_order": experts.spline_order,
        "grid_range": list(experts.grid_range),
        "score_func": router.score_func,
        "norm_topk_prob": router.norm_topk_prob,
        "n_group": router.n_group,
        "topk_group": router.topk_group,
        "quantize": model.quantize,
        "quantization": lam,
        "scale_group_size": model.scale_group_size,
        "weights": flavor,
        "retention_form": "auto",
        "step": step,
        "bos_token_id": document_token,
        "eos_token_id": document_token,
        "pad_token_id": document_token,
        "tie_word_embeddings": False,
        "use_cache": True,
        # Of the arithmetic that gives the trainer's logits, whatever the dtype of the file.
        "torch_dtype": "float32",
        "transformers_version": TRANSFORMERS_VERSION,
    }


def make_generation_config(document_token: int, tokens: int, vocab_size: int) -> dict[str, Any]:
    """Return the content of generation_config.json: the sampling of `mixkabrn generate`.

    Args:
        document_token: Id that begins and ends documents.
        tokens: Number of the tokenizer's ids.
        vocab_size: Rows of the head. Those without a token are never drawn.
    """
    unused = {"suppress_tokens": list(range(tokens, vocab_size))} if tokens < vocab_size else {}
    return unused | {
        "bos_token_id": document_token,
        "eos_token_id": document_token,
        "pad_token_id": document_token,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 50,
        "transformers_version": TRANSFORMERS_VERSION,
    }


def _decay_exponents(schedule: str | tuple[float, float], heads: int) -> list[float]:
    named = {"exponent": (5.0, 4.0 + heads), "linspace": (5.0, 9.0)}
    return list(named[schedule] if isinstance(schedule, str) else schedule)
