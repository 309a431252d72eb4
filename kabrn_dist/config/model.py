"""What can be set of the model: one frozen section per component, unknown keys refused, every field documented."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, values: Any) -> Any:
        """Pydantic would read `steps: true` as 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{name} is {str(value).lower()}, which is not one of its values")
        return values


class Retention(Section):
    """Multi-scale retention (RetNet, arXiv 2307.08621)."""

    heads: PositiveInt = Field(description="Heads, each with a decay of its own.")
    key_width: int = Field(ge=2, multiple_of=2, description="Query and key width of a head (even: rotary).")
    value_width: PositiveInt = Field(description="Value width of a head.")
    decay: Literal["exponent", "linspace"] | tuple[float, float] = Field(
        "exponent",
        description="Decays of the heads, evenly spaced in -log2(1-γ): `exponent` 5…4+heads (RetNet's "
        "formula), `linspace` 5…9 (RetNet's code), or [fastest, slowest], e.g. [1.5, 7] for short contexts.",
    )
    chunk: PositiveInt = Field(64, description="Tokens of a chunk of the chunkwise form; changes speed only.")

    @model_validator(mode="after")
    def _decay_range(self) -> Retention:
        if not isinstance(self.decay, str) and not 0 < self.decay[0] <= self.decay[1]:
            raise ValueError(f"decay {list(self.decay)} must be [fastest, slowest] with 0 < fastest <= slowest")
        return self


class Experts(Section):
    """Mixture of KAN experts (DeepSeekMoE, arXiv 2401.06066; KAN, arXiv 2404.19756; KAT, arXiv 2409.10594)."""

    form: Literal["rational", "chebyshev", "hat", "bspline", "swiglu", "relu2"] = Field(
        "rational",
        description="The expert. Kolmogorov-Arnold networks: `rational` and `chebyshev` (functions shared by groups "
        "of channels), `hat` and `bspline` (a function on every edge). Controls without learnable functions: "
        "`swiglu`, `relu2`.",
    )
    routed: PositiveInt = Field(description="Routed experts of a layer; a token visits top_k of them.")
    shared: int = Field(1, ge=0, description="Experts that every token visits.")
    top_k: PositiveInt = Field(description="Routed experts a token visits.")
    hidden: PositiveInt = Field(description="Hidden width of an expert.")
    every: PositiveInt = Field(1, description="A mixture in every n-th layer, a dense feed-forward in the others.")
    first_dense: int = Field(0, ge=0, description="So many first layers have a dense feed-forward.")
    dense_hidden: PositiveInt | None = Field(
        None, description="Hidden width of dense layers; default: hidden × (shared + top_k), as many active weights."
    )
    capacity: float | None = Field(
        None,
        gt=0,
        description="Copies an expert takes of one sequence, as a multiple of its fair share; the latest beyond it are "
        "dropped and counted. Default: no copy is ever dropped.",
    )
    groups: PositiveInt = Field(4, description="rational, chebyshev: groups of channels that share one function.")
    grid: int = Field(5, ge=2, description="hat, bspline: intervals of the grid.")
    degree: PositiveInt = Field(3, description="bspline: degree of the pieces.")
    range: tuple[float, float] = Field((-2.0, 2.0), description="chebyshev, hat, bspline: the grid's ends.")

    @model_validator(mode="after")
    def _numbers_fit(self) -> Experts:
        if self.top_k > self.routed:
            raise ValueError(f"top_k {self.top_k} exceeds the {self.routed} routed experts; set top_k <= {self.routed}")
        if self.range[0] >= self.range[1]:
            raise ValueError(f"range {list(self.range)} must be [low, high] with low < high, such as [-2, 2]")
        if self.form == "bspline" and self.degree > self.grid:
            raise ValueError(
                f"degree {self.degree} needs more knots than the {self.grid + 1} of grid {self.grid}; "
                f"set degree <= {self.grid} or grid >= {self.degree}"
            )
        return self


class Router(Section):
    """Which experts a token visits, and what keeps them balanced."""

    score: Literal["sigmoid", "softmax"] = Field(
        "sigmoid",
        description="An expert's score: sigmoid (DeepSeek-V3, arXiv 2412.19437) or softmax (GShard, 2006.16668).",
    )
    renormalise: bool = Field(True, description="The weights of a token's experts sum to 1 (ST-MoE, 2202.08906).")
    groups: PositiveInt = Field(
        1, description="Groups of neighbouring experts for group-limited routing; one group a rank limits the ranks."
    )
    groups_per_token: PositiveInt | None = Field(
        None, description="Most groups one token's experts may come from (DeepSeek-V2, 2405.04434); default: all."
    )
    bias_rate: float = Field(
        1e-2,
        ge=0,
        description="Step of the aux-loss-free balancing bias (arXiv 2408.15664, which takes 1e-3 for runs of tens of "
        "thousands of steps; short runs at high rates need 1e-2 and more); 0 switches it off.",
    )
    balance: float = Field(1e-4, ge=0, description="Weight of the sequence-wise balance loss (2412.19437).")
    global_balance: float = Field(0.0, ge=0, description="Weight of the global-batch balance loss (2501.11873).")
    z: float = Field(1e-3, ge=0, description="Weight of the router z-loss (ST-MoE, 2202.08906).")
    jitter: float = Field(
        0.0, ge=0, lt=1, description="In training the router's input is scaled by 1 ± jitter (Switch, 2101.03961)."
    )


class Model(Section):
    vocabulary: PositiveInt = Field(description="Rows of the embedding; at least the tokenizer's vocabulary.")
    width: PositiveInt = Field(description="Width of the residual stream.")
    layers: Annotated[str, Field(pattern="^[RA]+$")] = Field(
        description="Blocks, each a mixer and a mixture of experts: one letter a block, R retention, A softmax "
        "attention, e.g. RRRA; or a number of retention blocks.",
    )
    convolution: int = Field(
        0,
        ge=0,
        description="Tokens before each one that a causal convolution sees, in front of every mixer and every "
        "feed-forward, channel by channel and within documents; 0: no convolution.",
    )
    retention: Retention
    experts: Experts
    router: Router = Router()
    quantise: bool = Field(
        True, description="Ternary weights and int8 activations (BitNet b1.58); false trains plain matrices."
    )
    quantise_from: int = Field(
        0,
        ge=0,
        description="Steps trained with plain matrices before quantisation begins (16 to 1.58 bits, 2502.11895).",
    )
    quantise_warmup: int = Field(
        0,
        ge=0,
        description="Steps from there over which λ rises from 0 to 1: a value x is x + λ(q(x) − x) until it is q(x). "
        "hat and bspline warm up their matrices only.",
    )
    scale_group: PositiveInt | None = Field(
        None,
        description="Outputs of a matrix that share one scale γ; default: all of them, as published. The last group of "
        "a matrix may be smaller. Not for hat and bspline.",
    )
    activations: Literal["keep", "recompute", "offload"] = Field(
        "keep",
        description="For backward: keep activations, recompute them layer by layer, or recompute with the "
        "layers' inputs offloaded to host memory (fairscale).",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _number_of_retentions(cls, value: Any) -> Any:
        return "R" * value if isinstance(value, int) and value > 0 else value

    @model_validator(mode="after")
    def _groups_divide(self) -> Model:
        if self.experts.form not in ("rational", "chebyshev"):
            return self
        widths = [("model.width", self.width), ("model.experts.hidden", self.experts.hidden)]
        if self.dense_layers:
            widths.append(("model.experts.dense_hidden", self.dense_hidden))
        for name, width in widths:
            if width % self.experts.groups:
                both = divisors(math.gcd(*(w for _, w in widths)))
                raise ValueError(
                    f"model.experts.groups {self.experts.groups} does not divide {name} {width}; "
                    f"for these widths it can be {join(both)}"
                )
        return self

    @model_validator(mode="after")
    def _quantised_at_last(self) -> Model:
        for name in ("quantise_from", "quantise_warmup"):
            if getattr(self, name) and not self.quantise:
                raise ValueError(
                    f"model.{name} {getattr(self, name)} is for quantised models; set model.quantise to true, or leave "
                    f"{name} out"
                )
        return self

    @property
    def quantised_at(self) -> int:
        """The first step (0 is the first of a run) that is wholly quantised."""
        return self.quantise_from + self.quantise_warmup

    def quantised_share(self, step: int) -> float:
        """λ of `step` (0 is the first): 0 plain, 1 quantised, linear between (arXiv 2502.11895)."""
        if not self.quantise or step < self.quantise_from:
            return 0.0
        return min(1.0, (step - self.quantise_from + 1) / (self.quantise_warmup + 1))

    @model_validator(mode="after")
    def _groups_of_scales(self) -> Model:
        if self.scale_group is not None and self.experts.form in ("hat", "bspline"):
            raise ValueError(
                f"model.scale_group {self.scale_group} is not for model.experts.form {self.experts.form}, whose "
                "matrices have one scale each; leave scale_group out, or choose another form"
            )
        return self

    @model_validator(mode="after")
    def _router_fits(self) -> Model:
        routed, top_k, groups = self.experts.routed, self.experts.top_k, self.router.groups
        if routed % groups:
            raise ValueError(
                f"model.router.groups {groups} does not divide model.experts.routed {routed}; "
                f"it can be {join(divisors(routed))}"
            )
        most = self.router.groups_per_token
        if most is None:
            return self
        if most > groups:
            raise ValueError(
                f"model.router.groups_per_token {most} exceeds model.router.groups {groups}; set it to {groups} or less"
            )
        if top_k > most * (routed // groups):
            need = -(-top_k * groups // routed)
            raise ValueError(
                f"model.router.groups_per_token {most} groups of {routed // groups} experts hold fewer than "
                f"model.experts.top_k {top_k}; set groups_per_token to {need} or more"
            )
        return self

    @property
    def dense_hidden(self) -> int:
        """Hidden width of a dense feed-forward."""
        experts = self.experts
        return experts.dense_hidden or experts.hidden * (experts.shared + experts.top_k)

    @property
    def mixture_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that hold a mixture: every `every`-th after the `first_dense`."""
        rest = range(self.experts.first_dense, len(self.layers))
        return tuple(layer for i, layer in enumerate(rest, 1) if i % self.experts.every == 0)

    @property
    def dense_layers(self) -> bool:
        """True where some layer has a dense feed-forward."""
        return len(self.mixture_layers) < len(self.layers)


def divisors(n: int) -> list[int]:
    """All, rising."""
    return [d for d in range(1, n + 1) if n % d == 0]


def join(values: list[int]) -> str:
    """For messages: 1, 2, 4."""
    return ", ".join(map(str, values))
