"""What can be set of the model: one frozen section per component, unknown keys refused, every field documented."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from kabrn_dist.utils.yaml_section import ConfigSection


class RetentionConfig(ConfigSection):
    """Multi-scale retention (RetNet, arXiv 2307.08621)."""

    num_heads: PositiveInt = Field(description="Heads, each with a decay of its own.")
    key_dim: int = Field(ge=2, multiple_of=2, description="Query and key width of a head (even: rotary).")
    value_dim: PositiveInt = Field(description="Value width of a head.")
    decay: Literal["exponent", "linspace"] | tuple[float, float] = Field(
        "exponent",
        description="Decays of the heads, evenly spaced in -log2(1-γ): `exponent` 5…4+heads (RetNet's "
        "formula), `linspace` 5…9 (RetNet's code), or [fastest, slowest], e.g. [1.5, 7] for short contexts.",
    )
    chunk_size: PositiveInt = Field(64, description="Tokens of a chunk of the chunkwise form; changes speed only.")

    @model_validator(mode="after")
    def _check_decay_range(self) -> RetentionConfig:
        if not isinstance(self.decay, str) and not 0 < self.decay[0] <= self.decay[1]:
            raise ValueError(f"decay {list(self.decay)} must be [fastest, slowest] with 0 < fastest <= slowest")
        return self


class ExpertsConfig(ConfigSection):
    """Mixture of KAN experts (DeepSeekMoE, arXiv 2401.06066; KAN, arXiv 2404.19756; KAT, arXiv 2409.10594)."""

    type: Literal["rational", "chebyshev", "hat", "bspline", "swiglu", "relu2"] = Field(
        "rational",
        description="The expert. Kolmogorov-Arnold networks: `rational` and `chebyshev` (functions shared by groups "
        "of channels), `hat` and `bspline` (a function on every edge). Controls without learnable functions: "
        "`swiglu`, `relu2`.",
    )
    num_experts: PositiveInt = Field(description="Routed experts of a layer; a token visits top_k of them.")
    num_shared_experts: int = Field(1, ge=0, description="Experts that every token visits.")
    top_k: PositiveInt = Field(description="Routed experts a token visits.")
    expert_hidden_size: PositiveInt = Field(description="Hidden width of an expert.")
    moe_layer_interval: PositiveInt = Field(
        1, description="A mixture in every n-th layer, a dense feed-forward in the others."
    )
    num_dense_layers: int = Field(0, ge=0, description="So many first layers have a dense feed-forward.")
    dense_hidden_size: PositiveInt | None = Field(
        None, description="Hidden width of dense layers; default: hidden × (shared + top_k), as many active weights."
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="Copies an expert takes of one sequence, as a multiple of its fair share; the latest beyond it are "
        "dropped and counted. Default: no copy is ever dropped.",
    )
    function_groups: PositiveInt = Field(
        4, description="rational, chebyshev: groups of channels that share one function."
    )
    grid_size: int = Field(5, ge=2, description="hat, bspline: intervals of the grid.")
    spline_order: PositiveInt = Field(3, description="bspline: degree of the pieces.")
    grid_range: tuple[float, float] = Field((-2.0, 2.0), description="chebyshev, hat, bspline: the grid's ends.")

    @model_validator(mode="after")
    def _check_sizes(self) -> ExpertsConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k {self.top_k} exceeds the {self.num_experts} routed experts; set top_k <= {self.num_experts}"
            )
        if self.grid_range[0] >= self.grid_range[1]:
            raise ValueError(f"range {list(self.grid_range)} must be [low, high] with low < high, such as [-2, 2]")
        if self.type == "bspline" and self.spline_order > self.grid_size:
            raise ValueError(
                f"degree {self.spline_order} needs more knots than the {self.grid_size + 1} of grid {self.grid_size}; "
                f"set degree <= {self.grid_size} or grid >= {self.spline_order}"
            )
        return self


class RouterConfig(ConfigSection):
    """Which experts a token visits, and what keeps them balanced."""

    score_func: Literal["sigmoid", "softmax"] = Field(
        "sigmoid",
        description="An expert's score: sigmoid (DeepSeek-V3, arXiv 2412.19437) or softmax (GShard, 2006.16668).",
    )
    norm_topk_prob: bool = Field(True, description="The weights of a token's experts sum to 1 (ST-MoE, 2202.08906).")
    n_group: PositiveInt = Field(
        1, description="Groups of neighbouring experts for group-limited routing; one group a rank limits the ranks."
    )
    topk_group: PositiveInt | None = Field(
        None, description="Most groups one token's experts may come from (DeepSeek-V2, 2405.04434); default: all."
    )
    bias_update_rate: float = Field(
        1e-2,
        ge=0,
        description="Step of the aux-loss-free balancing bias (arXiv 2408.15664, which takes 1e-3 for runs of tens of "
        "thousands of steps; short runs at high rates need 1e-2 and more); 0 switches it off.",
    )
    seq_aux_loss_weight: float = Field(1e-4, ge=0, description="Weight of the sequence-wise balance loss (2412.19437).")
    global_aux_loss_weight: float = Field(
        0.0, ge=0, description="Weight of the global-batch balance loss (2501.11873)."
    )
    z_loss_weight: float = Field(1e-3, ge=0, description="Weight of the router z-loss (ST-MoE, 2202.08906).")
    jitter_eps: float = Field(
        0.0, ge=0, lt=1, description="In training the router's input is scaled by 1 ± jitter (Switch, 2101.03961)."
    )


class ModelConfig(ConfigSection):
    vocab_size: PositiveInt = Field(description="Rows of the embedding; at least the tokenizer's vocabulary.")
    hidden_size: PositiveInt = Field(description="Width of the residual stream.")
    layers: Annotated[str, Field(pattern="^[RA]+$")] = Field(
        description="Blocks, each a mixer and a mixture of experts: one letter a block, R retention, A softmax "
        "attention, e.g. RRRA; or a number of retention blocks.",
    )
    short_conv_size: int = Field(
        0,
        ge=0,
        description="Kernel size, in tokens, of a causal depthwise convolution in front of every mixer and every "
        "feed-forward, which stays within documents; 0: no convolution.",
    )
    retention: RetentionConfig
    experts: ExpertsConfig
    router: RouterConfig = RouterConfig()
    quantize: bool = Field(
        True, description="Ternary weights and int8 activations (BitNet b1.58); false trains plain matrices."
    )
    quantize_start_step: int = Field(
        0,
        ge=0,
        description="Steps trained with plain matrices before quantisation begins (16 to 1.58 bits, 2502.11895).",
    )
    quantize_warmup_steps: int = Field(
        0,
        ge=0,
        description="Steps from there over which λ rises from 0 to 1: a value x is x + λ(q(x) − x) until it is q(x). "
        "hat and bspline warm up their matrices only.",
    )
    scale_group_size: PositiveInt | None = Field(
        None,
        description="Outputs of a matrix that share one scale γ; default: all of them, as published. The last group of "
        "a matrix may be smaller. Not for hat and bspline.",
    )
    activation_checkpointing: Literal["keep", "recompute", "offload"] = Field(
        "keep",
        description="For backward: keep activations, recompute them layer by layer, or recompute with the "
        "layers' inputs offloaded to host memory (fairscale).",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _expand_layer_count(cls, value: Any) -> Any:
        return "R" * value if isinstance(value, int) and value > 0 else value

    @field_validator("short_conv_size")
    @classmethod
    def _check_short_conv_size(cls, value: int) -> int:
        if value == 1:
            raise ValueError("a kernel of 1 token sees no other token; set it to 0 for no convolution, or to 2 or more")
        return value

    @model_validator(mode="after")
    def _check_function_groups(self) -> ModelConfig:
        if self.experts.type not in ("rational", "chebyshev"):
            return self
        widths = [
            ("model.hidden_size", self.hidden_size),
            ("model.experts.expert_hidden_size", self.experts.expert_hidden_size),
        ]
        if self.has_dense_layers:
            widths.append(("model.experts.dense_hidden_size", self.dense_hidden_size))
        for name, width in widths:
            if width % self.experts.function_groups:
                both = divisors(math.gcd(*(w for _, w in widths)))
                raise ValueError(
                    f"model.experts.function_groups {self.experts.function_groups} does not divide {name} {width}; "
                    f"for these widths it can be {join(both)}"
                )
        return self

    @model_validator(mode="after")
    def _check_quantize_schedule(self) -> ModelConfig:
        for name in ("quantize_start_step", "quantize_warmup_steps"):
            if getattr(self, name) and not self.quantize:
                raise ValueError(
                    f"model.{name} {getattr(self, name)} is for quantised models; set model.quantize to true, or leave "
                    f"{name} out"
                )
        return self

    @property
    def first_quantized_step(self) -> int:
        """The first step (0 is the first of a run) that is wholly quantised."""
        return self.quantize_start_step + self.quantize_warmup_steps

    def quantization_lambda(self, step: int) -> float:
        """λ of `step` (0 is the first): 0 plain, 1 quantised, linear between (arXiv 2502.11895)."""
        if not self.quantize or step < self.quantize_start_step:
            return 0.0
        return min(1.0, (step - self.quantize_start_step + 1) / (self.quantize_warmup_steps + 1))

    @model_validator(mode="after")
    def _check_scale_groups(self) -> ModelConfig:
        if self.scale_group_size is not None and self.experts.type in ("hat", "bspline"):
            raise ValueError(
                f"model.scale_group_size {self.scale_group_size} is not for model.experts.type {self.experts.type}, whose "
                "matrices have one scale each; leave scale_group_size out, or choose another form"
            )
        return self

    @model_validator(mode="after")
    def _check_router_groups(self) -> ModelConfig:
        routed, top_k, groups = self.experts.num_experts, self.experts.top_k, self.router.n_group
        if routed % groups:
            raise ValueError(
                f"model.router.n_group {groups} does not divide model.experts.num_experts {routed}; "
                f"it can be {join(divisors(routed))}"
            )
        most = self.router.topk_group
        if most is None:
            return self
        if most > groups:
            raise ValueError(
                f"model.router.topk_group {most} exceeds model.router.n_group {groups}; set it to {groups} or less"
            )
        if top_k > most * (routed // groups):
            need = -(-top_k * groups // routed)
            raise ValueError(
                f"model.router.topk_group {most} groups of {routed // groups} experts hold fewer than "
                f"model.experts.top_k {top_k}; set topk_group to {need} or more"
            )
        return self

    @property
    def dense_hidden_size(self) -> int:
        """Hidden width of a dense feed-forward."""
        experts = self.experts
        return experts.dense_hidden_size or experts.expert_hidden_size * (experts.num_shared_experts + experts.top_k)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that hold a mixture: every `every`-th after the `num_dense_layers`."""
        rest = range(self.experts.num_dense_layers, len(self.layers))
        return tuple(layer for i, layer in enumerate(rest, 1) if i % self.experts.moe_layer_interval == 0)

    @property
    def has_dense_layers(self) -> bool:
        """True where some layer has a dense feed-forward."""
        return len(self.moe_layers) < len(self.layers)


def divisors(n: int) -> list[int]:
    """All, rising."""
    return [d for d in range(1, n + 1) if n % d == 0]


def join(values: list[int]) -> str:
    """For messages: 1, 2, 4."""
    return ", ".join(map(str, values))
