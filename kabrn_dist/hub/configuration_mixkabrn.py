"""Configuration of a MixKABRN model for transformers. Self-contained: exports carry a copy of this file."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig


class MixKABRNConfig(PretrainedConfig):
    """A stack of layers, each a token mixer (retention or attention) and a mixture of Kolmogorov-Arnold experts.

    Args:
        vocab_size: rows of the embedding and the head.
        hidden_size: width of the residual stream.
        layers: the mixers, one letter a layer: R retention, A softmax attention.
        num_heads: heads of a mixer.
        key_dim: width of queries and keys of a head, even.
        value_dim: width of values of a head.
        decay: exponents of the fastest and the slowest head; γ = 1 − 2^(−exponent), evenly spaced in the exponent.
        chunk_size: tokens of a chunk of chunkwise retention; speed only.
        short_conv_size: tokens that the short convolution sees in front of mixers and feed-forwards; 0 for none.
        expert_type: "rational", "chebyshev", "hat", "bspline", "swiglu" or "relu2".
        num_experts: routed experts of a layer.
        num_shared_experts: experts of a layer that every token visits.
        num_experts_per_tok: routed experts that a token visits.
        expert_hidden_size: hidden width of an expert.
        dense_hidden_size: hidden width of the feed-forward in layers without a mixture.
        moe_layers: numbers of the layers with a mixture.
        function_groups: groups of channels that share a function ("rational", "chebyshev").
        grid_size: intervals of the grid ("hat", "bspline").
        spline_order: degree of the pieces ("bspline").
        grid_range: both ends of the grid, or of the functions' range ("chebyshev", "hat", "bspline").
        score_func: of the router, "sigmoid" or "softmax".
        norm_topk_prob: whether the weights of a token's experts sum to 1.
        n_group: groups of neighboring experts.
        topk_group: groups that a token's experts may come from; None for all.
        quantize: whether matrices are ternary and their inputs int8.
        quantization: how far they are: 1, or less for a model that is still being warmed up.
        scale_group_size: outputs of a matrix that share a scale; None for all.
        weights: "latent" for weights that the model rounds itself and that can be trained; "ternary" for packed codes
            and their scales.
        retention_form: "auto" reads tokens one after another on a CPU in fp32 outside training, as `mixkabrn generate`
            does, to the last bit, and chunk by chunk elsewhere; "chunkwise" is faster for long prompts.
        step: optimizer steps of the weights.
        use_cache: whether states are returned outside training.
        **kwargs: as for every configuration.
    """

    model_type = "mixkabrn"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}

    def __init__(
        self,
        vocab_size: int = 257,
        hidden_size: int = 64,
        layers: str = "RR",
        num_heads: int = 2,
        key_dim: int = 16,
        value_dim: int = 32,
        decay: tuple[float, float] = (5.0, 6.0),
        chunk_size: int = 64,
        short_conv_size: int = 0,
        expert_type: str = "rational",
        num_experts: int = 4,
        num_shared_experts: int = 1,
        num_experts_per_tok: int = 2,
        expert_hidden_size: int = 64,
        dense_hidden_size: int = 192,
        moe_layers: tuple[int, ...] | None = None,
        function_groups: int = 4,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-2.0, 2.0),
        score_func: str = "sigmoid",
        norm_topk_prob: bool = True,
        n_group: int = 1,
        topk_group: int | None = None,
        quantize: bool = True,
        quantization: float = 1.0,
        scale_group_size: int | None = None,
        weights: str = "latent",
        retention_form: str = "auto",
        step: int = 0,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.layers, self.num_hidden_layers = layers, len(layers)
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.decay, self.chunk_size, self.short_conv_size = list(decay), chunk_size, short_conv_size
        self.expert_type, self.num_experts, self.num_shared_experts = expert_type, num_experts, num_shared_experts
        self.num_experts_per_tok, self.expert_hidden_size = num_experts_per_tok, expert_hidden_size
        self.dense_hidden_size = dense_hidden_size
        self.moe_layers = list(range(len(layers)) if moe_layers is None else moe_layers)
        self.function_groups, self.grid_size, self.spline_order = function_groups, grid_size, spline_order
        self.grid_range, self.score_func, self.norm_topk_prob = list(grid_range), score_func, norm_topk_prob
        self.n_group, self.topk_group = n_group, topk_group
        self.quantize, self.quantization, self.scale_group_size = quantize, quantization, scale_group_size
        self.weights, self.retention_form, self.step = weights, retention_form, step
        self.use_cache = use_cache
        # Follows from `layers`.
        kwargs.pop("num_hidden_layers", None)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
