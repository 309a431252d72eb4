"""What can be set of the optimizer: AdamW and its recipe, in one stage or two."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kabrn_dist.utils.yaml_section import ConfigSection

Fraction = Annotated[float, Field(ge=0, lt=1)]


class SecondStageConfig(ConfigSection):
    """The second part of a two-stage recipe for ternary weights (BitNet b1.58's training tips, microsoft/unilm).

    Codes flip less once the rate has dropped, and without decay latents may move away from the thresholds.
    """

    start_fraction: float = Field(0.5, gt=0, lt=1, description="Share of training.steps after which it begins.")
    learning_rate: float = Field(
        gt=0, description="Takes the place of optimizer.learning_rate, about two thirds of it; decays likewise."
    )
    weight_decay: float = Field(0.0, ge=0, description="Takes the place of optimizer.weight_decay.")


class OptimizerConfig(ConfigSection):
    """AdamW with linear warm-up, a decay of the learning rate, and a second stage if wanted."""

    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Learning rate at the last step, as a share of the peak.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    lr_schedule: Literal["cosine", "linear"] = Field(
        "cosine", description="How the learning rate falls from the end of the warm-up to the last step."
    )
    second_stage: SecondStageConfig | None = Field(
        None, description="A lower peak and another weight decay from a point of the run on; default: one stage."
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="AdamW's moment decays, each from 0 to below 1.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.1, ge=0, description="Weight decay of matrices (never of KAN coefficients).")
    function_lr_ratio: float = Field(
        1.0, gt=0, description="Learning rate of KAN coefficients, as a multiple of the others'."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")

    @model_validator(mode="after")
    def _check_second_stage(self) -> OptimizerConfig:
        for name in ("learning_rate", "weight_decay") if self.second_stage else ():
            first, second = getattr(self, name), getattr(self.second_stage, name)
            if second > first:
                raise ValueError(
                    f"second_stage.{name} {second:g} exceeds the first stage's optimizer.{name} {first:g}; "
                    f"set it to {first:g} or less"
                )
        return self

    def second_stage_step(self, steps: int) -> int:
        """The first step of the second stage, of `steps` (0 is the first); `steps` where there is one stage."""
        return steps if self.second_stage is None else round(self.second_stage.start_fraction * steps)

    def check_stage_order(self, steps: int) -> None:
        """Raise ValueError, with the numbers and a remedy, unless warm-up, second stage and end come in this order."""
        if self.second_stage is None:
            return
        begins, first = self.second_stage_step(steps), max(1, self.warmup_steps)
        if first <= begins < steps:
            return
        if first < steps:
            remedy = f"set at to {max(0.5, first / steps):.9g}"
        else:
            remedy = f"set training.steps to {2 * first} or more and at to 0.5"
        raise ValueError(
            f"optimizer.second_stage.start_fraction {self.second_stage.start_fraction:g} of training.steps {steps} is step {begins}, not after "
            f"optimizer.warmup_steps {self.warmup_steps} and before the end; {remedy}, or leave out second_stage"
        )
