"""What can be set: one frozen model per component, unknown keys refused, every field documented.

Nothing here imports torch, so a mistake is reported before anything heavy starts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from kabrn_dist.errors import UserError

Share = Annotated[float, Field(ge=0, lt=1)]


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


class Run(Section):
    folder: Path = Field(description="Where config.yaml, log.jsonl, tensorboard/ and checkpoints/ are written.")
    seed: int = Field(1, ge=0, description="Seeds the initial weights and the order of the data.")


class Data(Section):
    path: Path = Field(description="Folder of shards and index.json, made by `python -m data_prep`.")
    sequence_length: int = Field(ge=2, description="Tokens in one training sequence.")


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
    """Mixture of KAN experts (DeepSeekMoE, arXiv 2401.06066; KAT, arXiv 2409.10594)."""

    form: Literal["rational", "swiglu"] = Field(
        "rational", description="The expert: `rational` is a Kolmogorov-Arnold network, `swiglu` the control."
    )
    routed: PositiveInt = Field(description="Routed experts of a layer; a token visits top_k of them.")
    shared: int = Field(1, ge=0, description="Experts that every token visits.")
    top_k: PositiveInt = Field(description="Routed experts a token visits.")
    hidden: PositiveInt = Field(description="Hidden width of an expert.")
    groups: PositiveInt = Field(4, description="Groups of channels that share one rational function.")
    score: Literal["sigmoid", "softmax"] = Field("sigmoid", description="The router's score of an expert.")
    balance_weight: float = Field(
        1e-2, ge=0, description="Weight of the sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437)."
    )
    router_z_weight: float = Field(1e-3, ge=0, description="Weight of the router z-loss (ST-MoE, 2202.08906).")

    @model_validator(mode="after")
    def _numbers_fit(self) -> Experts:
        if self.top_k > self.routed:
            raise ValueError(f"top_k {self.top_k} exceeds the {self.routed} routed experts; set top_k <= {self.routed}")
        return self


class Model(Section):
    vocabulary: PositiveInt = Field(description="Rows of the embedding; at least the tokenizer's vocabulary.")
    width: PositiveInt = Field(description="Width of the residual stream.")
    layers: Annotated[str, Field(pattern="^[RA]+$")] = Field(
        description="Blocks, each a mixer and a mixture of experts: one letter a block, R retention, A softmax "
        "attention, e.g. RRRA; or a number of retention blocks.",
    )
    retention: Retention
    experts: Experts
    quantise: bool = Field(
        True, description="Ternary weights and int8 activations (BitNet b1.58); false trains plain matrices."
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
        for name, width in (("model.width", self.width), ("model.experts.hidden", self.experts.hidden)):
            if self.experts.form == "rational" and width % self.experts.groups:
                both = _divisors(math.gcd(self.width, self.experts.hidden))
                raise ValueError(
                    f"model.experts.groups {self.experts.groups} does not divide {name} {width}; "
                    f"for these widths it can be {_join(both)}"
                )
        return self


class Parallel(Section):
    sequence: PositiveInt = Field(1, description="Sequence parallelism: ranks that hold a slice each of a sequence.")
    exchange: Literal["auto", "scan", "ring", "allgather"] = Field(
        "auto", description="How retention's states travel between slices; changes speed only."
    )
    expert: PositiveInt = Field(1, description="Expert parallelism: ranks that share one set of routed experts.")
    experts_per_rank: tuple[PositiveInt, ...] | None = Field(
        None, description="Experts on each rank of an expert group, uneven allowed; default: equal shares."
    )
    zero: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage: what the ranks share out instead of copying.")
    bucket: PositiveInt = Field(50_000_000, description="Elements of a ZeRO reduce, gather or prefetch bucket.")


class Optimizer(Section):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    final: float = Field(0.1, ge=0, le=1, description="Learning rate at the last step, as a share of the peak.")
    warmup: int = Field(0, ge=0, description="Steps of linear warm-up.")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="AdamW's moment decays, each from 0 to below 1.")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.1, ge=0, description="Weight decay of matrices (never of KAN coefficients).")
    clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")


class Training(Section):
    steps: PositiveInt = Field(description="Optimizer steps of the whole run.")
    batch: PositiveInt = Field(description="Sequences of one optimizer step, over all ranks.")
    micro_batch: PositiveInt = Field(description="Sequences of one forward pass on one rank.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Working copy of weights and activations; masters are fp32. fp16 scales the loss."
    )
    log_every: PositiveInt = Field(1, description="Steps between lines of the console, log.jsonl and TensorBoard.")


class Validation(Section):
    every: int = Field(100, ge=0, description="Steps between validations; 0 validates at the end only.")
    sequences: PositiveInt = Field(256, description="Sequences of the validation split that are scored.")


class Checkpoint(Section):
    every: int = Field(500, ge=0, description="Steps between checkpoints; 0 saves at the end and when stopped only.")
    keep: int = Field(2, ge=2, description="Newest checkpoints kept.")
    keep_every: int = Field(0, ge=0, description="Also keep each checkpoint whose step this divides; 0: none.")


class Config(Section):
    run: Run
    data: Data
    model: Model
    parallel: Parallel = Parallel()
    optimizer: Optimizer
    training: Training
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()

    def accumulation(self, world: int) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.training.batch // (self.training.micro_batch * (world // self.parallel.sequence))

    def placement(self) -> tuple[int, ...]:
        """Routed experts on each rank of an expert group."""
        if self.parallel.experts_per_rank is not None:
            return self.parallel.experts_per_rank
        return (self.model.experts.routed // self.parallel.expert,) * self.parallel.expert

    def check_world(self, world: int) -> None:
        """Refuse combinations that cannot run on `world` processes.

        Raises:
            UserError: naming the numbers and the nearest that work.
        """
        expert, routed, counts = self.parallel.expert, self.model.experts.routed, self.parallel.experts_per_rank
        fits = [e for e in _divisors(world) if routed % e == 0]
        if world % expert:
            raise UserError(
                f"parallel.expert {expert} does not divide the {world} processes; "
                f"it can be {_join(fits)}, or start a multiple of {expert} processes"
            )
        if counts is None and routed % expert:
            raise UserError(
                f"parallel.expert {expert} does not divide model.experts.routed {routed}; set it to "
                f"{_join(fits)}, or name the shares in parallel.experts_per_rank"
            )
        if counts is not None and (len(counts) != expert or sum(counts) != routed):
            raise UserError(
                f"parallel.experts_per_rank {list(counts)} has {len(counts)} entries that sum to {sum(counts)}; "
                f"it needs parallel.expert = {expert} entries that sum to model.experts.routed = {routed}"
            )
        if counts is not None and len(set(counts)) > 1 and self.parallel.zero > 1:
            raise UserError(
                f"parallel.experts_per_rank {list(counts)} is uneven, which is proven for ZeRO 0 and 1 only, "
                f"and parallel.zero is {self.parallel.zero}; set parallel.zero to 1"
            )
        self._check_sequence(world)
        sequence = self.parallel.sequence
        step = self.training.micro_batch * (world // sequence)
        if self.training.batch % step:
            near = _nearest_multiple(self.training.batch, step)
            over = f"{world} processes" if sequence == 1 else f"{world} processes / parallel.sequence {sequence}"
            raise UserError(
                f"training.batch {self.training.batch} is not a multiple of training.micro_batch "
                f"{self.training.micro_batch} × {over} = {step}; set training.batch to {near}"
            )

    def _check_sequence(self, world: int) -> None:
        sequence, length = self.parallel.sequence, self.data.sequence_length
        if world % sequence:
            raise UserError(
                f"parallel.sequence {sequence} does not divide the {world} processes; it can be "
                f"{_join(_divisors(world))}, or start a multiple of {sequence} processes"
            )
        if length % sequence:
            below = length // sequence * sequence
            near = [n for n in (below, below + sequence) if n >= 2]
            raise UserError(
                f"data.sequence_length {length} cannot be cut into parallel.sequence {sequence} equal slices; "
                f"the nearest lengths that can: {_join(near)}"
            )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest_multiple(value: int, step: int) -> int:
    return max(step, round(value / step) * step)


def _join(values: list[int]) -> str:
    return ", ".join(map(str, values))
