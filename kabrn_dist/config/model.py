"""The section `model`: retention, experts, router and quantization."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from kabrn_dist.config import checks
from kabrn_dist.utils.yaml_section import ConfigSection

MAX_LAYERS = 10_000


class RetentionConfig(ConfigSection):
    """Multi-scale retention (RetNet, arXiv 2307.08621); its heads are those of attention layers too."""

    num_heads: PositiveInt = Field(description="Number of heads, each with its own decay.")
    key_dim: int = Field(
        ge=2, multiple_of=2, description="Dimension of queries and keys of a head; even, for the rotary embedding."
    )
    value_dim: PositiveInt = Field(description="Dimension of the values of a head.")
    decay: Literal["exponent", "linspace"] | tuple[float, float] = Field(
        "exponent",
        description="Decays γ of the heads, evenly spaced in -log2(1-γ): `exponent` from 5 to 4+num_heads (RetNet's "
        "formula), `linspace` from 5 to 9 (RetNet's code), or [fastest, slowest], e.g. [1.5, 7] for short contexts.",
    )
    chunk_size: PositiveInt = Field(
        64, le=65_536, description="Tokens in a chunk of chunkwise retention; affects speed only."
    )

    @model_validator(mode="after")
    def _check_decay_range(self) -> RetentionConfig:
        if not isinstance(self.decay, str) and not 0.01 <= self.decay[0] <= self.decay[1] <= 50:
            raise ValueError(
                f"decay {list(self.decay)} must be [fastest, slowest] with 0.01 <= fastest <= slowest <= 50; set decay "
                "to a pair such as [1.5, 7]"
            )
        return self


class ExpertsConfig(ConfigSection):
    """Mixture of KAN experts (DeepSeekMoE, arXiv 2401.06066; KAN, arXiv 2404.19756; KAT, arXiv 2409.10594)."""

    type: Literal["rational", "chebyshev", "hat", "bspline", "swiglu", "relu2"] = Field(
        "rational",
        description="Type of the experts. Kolmogorov-Arnold networks: `rational` and `chebyshev` (groups of channels "
        "share a function), `hat` and `bspline` (a function on every edge). Baselines without learnable functions: "
        "`swiglu`, `relu2`.",
    )
    num_experts: PositiveInt = Field(description="Routed experts in a layer.")
    num_shared_experts: int = Field(1, ge=0, description="Experts in a layer that process every token.")
    top_k: PositiveInt = Field(description="Routed experts that process a token.")
    expert_hidden_size: PositiveInt = Field(description="Hidden size of an expert.")
    moe_layer_interval: PositiveInt = Field(
        1, description="Every n-th layer has a mixture of experts; the others have a dense feed-forward."
    )
    num_dense_layers: int = Field(
        0, ge=0, description="Number of leading layers with a dense feed-forward instead of experts."
    )
    dense_hidden_size: PositiveInt | None = Field(
        None,
        description="Hidden size of dense layers. Default: expert_hidden_size × (num_shared_experts + top_k), which "
        "has as many active weights as a mixture.",
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Tokens of one sequence that an expert accepts, as a multiple of an even split; later ones are "
        "dropped and counted. Default: no limit, nothing is dropped.",
    )
    function_groups: PositiveInt = Field(
        4, description="For rational and chebyshev: groups of channels, each of which shares a function."
    )
    grid_size: int = Field(5, ge=2, description="For hat and bspline: intervals of the grid.")
    spline_order: PositiveInt = Field(3, description="For bspline: degree of the polynomial pieces.")
    grid_range: tuple[float, float] = Field(
        (-2.0, 2.0), description="For chebyshev, hat and bspline: lower and upper end of the grid."
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> ExpertsConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k {self.top_k} exceeds the {self.num_experts} routed experts; set top_k <= {self.num_experts}"
            )
        if self.grid_range[0] >= self.grid_range[1]:
            raise ValueError(
                f"grid_range {list(self.grid_range)} must be [low, high] with low < high; set it to a pair such as "
                "[-2, 2]"
            )
        if self.type == "bspline" and self.spline_order > self.grid_size:
            raise ValueError(
                f"spline_order {self.spline_order} needs more knots than the {self.grid_size + 1} of grid_size "
                f"{self.grid_size}; set spline_order <= {self.grid_size} or grid_size >= {self.spline_order}"
            )
        return self


class RouterConfig(ConfigSection):
    """Choice of the experts of a token, and the balance of their load."""

    score_func: Literal["sigmoid", "softmax"] = Field(
        "sigmoid",
        description="Score of an expert: sigmoid (DeepSeek-V3, arXiv 2412.19437) or softmax (GShard, arXiv "
        "2006.16668).",
    )
    norm_topk_prob: bool = Field(
        True, description="Normalize the weights of a token's experts to sum to 1 (ST-MoE, arXiv 2202.08906)."
    )
    n_group: PositiveInt = Field(
        1,
        description="Groups of neighboring experts for group-limited routing; with one group per rank, topk_group "
        "limits the ranks that a token is sent to.",
    )
    topk_group: PositiveInt | None = Field(
        None,
        description="Groups that the experts of a token may come from (DeepSeek-V2, arXiv 2405.04434). Default: all.",
    )
    bias_update_rate: float = Field(
        1e-2,
        ge=0,
        description="Update rate of the bias that balances experts without an auxiliary loss (arXiv 2408.15664, which "
        "uses 1e-3 for tens of thousands of steps; short runs with high learning rates need 1e-2 or more); 0: no bias.",
    )
    seq_aux_loss_weight: float = Field(
        1e-4, ge=0, description="Weight of the sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437)."
    )
    global_aux_loss_weight: float = Field(
        0.0, ge=0, description="Weight of the balance loss over the global batch (arXiv 2501.11873)."
    )
    z_loss_weight: float = Field(1e-3, ge=0, description="Weight of the router z-loss (ST-MoE, arXiv 2202.08906).")
    jitter_eps: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="In training, the router's input is multiplied by random factors in 1 ± jitter_eps (Switch "
        "Transformer, arXiv 2101.03961).",
    )


class ModelConfig(ConfigSection):
    """Architecture: a stack of blocks, each a mixer and a mixture of experts.

    Attributes:
        retention: Heads of the mixers.
        experts: Feed-forwards.
        router: Choice of experts.
    """

    vocab_size: PositiveInt = Field(
        description="Rows of the embedding, at least the size of the tokenizer.",
        json_schema_extra={"left_out": "that of the shards' tokenizer"},
    )
    hidden_size: PositiveInt = Field(description="Width of the residual stream.")
    layers: Annotated[str, Field(pattern="^[RA]+$", max_length=MAX_LAYERS)] = Field(
        description="Mixers, one letter per layer: R retention, A softmax attention, e.g. RRRA; or a number of "
        "retention layers.",
    )
    short_conv_size: int = Field(
        0,
        ge=0,
        description="Kernel size, in tokens, of a causal depthwise convolution in front of every mixer and "
        "feed-forward; it does not cross document boundaries. 0: no convolution.",
    )
    retention: RetentionConfig
    experts: ExpertsConfig
    router: RouterConfig = RouterConfig()
    quantize: bool = Field(
        True,
        description="Ternary weights and int8 activations (BitNet b1.58, arXiv 2402.17764); false: plain matrices.",
    )
    quantize_start_step: int = Field(
        0,
        ge=0,
        description="Step at which quantization begins; before it, matrices are plain (16 to 1.58 bits, arXiv "
        "2502.11895).",
    )
    quantize_warmup_steps: int = Field(
        0,
        ge=0,
        description="Steps from quantize_start_step over which λ rises from 0 to 1: a value x becomes x + λ(q(x) − x), "
        "and q(x) at the end. In hat and bspline this applies to matrices only.",
    )
    scale_group_size: PositiveInt | None = Field(
        None,
        description="Outputs of a matrix that share a scale γ; the last group may be smaller. Default: all outputs, as "
        "published. Not for hat and bspline.",
    )
    activation_checkpointing: Literal["keep", "recompute", "offload"] = Field(
        "keep",
        description="Activations for backward: keep them, recompute them layer by layer, or recompute them from layer "
        "inputs that are offloaded to host memory (fairscale).",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _expand_layer_count(cls, value: Any) -> Any:
        # --set gives a number as text.
        count = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else value
        if not isinstance(count, int) or isinstance(count, bool) or count <= 0:
            return value
        if count > MAX_LAYERS:
            raise ValueError(f"{count} layers are more than {MAX_LAYERS}; set it to {MAX_LAYERS} or fewer")
        return "R" * count

    @field_validator("short_conv_size")
    @classmethod
    def _check_short_conv_size(cls, value: int) -> int:
        if value == 1:
            raise ValueError("a kernel of 1 token sees no other token; set it to 0 for no convolution, or to 2 or more")
        return value

    @model_validator(mode="after")
    def _check_sections(self) -> ModelConfig:
        checks.check_function_groups(self)
        checks.check_quantize_schedule(self)
        checks.check_scale_groups(self)
        checks.check_router_groups(self)
        return self

    @property
    def first_quantized_step(self) -> int:
        """First step (counted from 0) that is wholly quantized."""
        return self.quantize_start_step + self.quantize_warmup_steps

    def quantization_lambda(self, step: int) -> float:
        """Return λ of `step` (counted from 0): 0 plain, 1 quantized, linear in between (arXiv 2502.11895)."""
        if not self.quantize or step < self.quantize_start_step:
            return 0.0
        return min(1.0, (step - self.quantize_start_step + 1) / (self.quantize_warmup_steps + 1))

    @property
    def dense_hidden_size(self) -> int:
        """Hidden size of a dense feed-forward."""
        experts = self.experts
        return experts.dense_hidden_size or experts.expert_hidden_size * (experts.num_shared_experts + experts.top_k)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with a mixture: every `moe_layer_interval`-th one after `num_dense_layers`."""
        rest = range(self.experts.num_dense_layers, len(self.layers))
        return tuple(layer for i, layer in enumerate(rest, 1) if i % self.experts.moe_layer_interval == 0)

    @property
    def has_dense_layers(self) -> bool:
        """True if a layer has a dense feed-forward."""
        return len(self.moe_layers) < len(self.layers)
