"""The section `optimizer`: AdamW and its schedule, in one stage or two."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kabrn_dist.utils.yaml_section import ConfigSection

Beta = Annotated[float, Field(ge=0, lt=1)]


class SecondStageConfig(ConfigSection):
    """Second stage of a two-stage recipe for ternary weights (BitNet b1.58's training tips, microsoft/unilm).

    After the drop of the learning rate fewer codes flip, and without weight decay the latent weights may move away
    from the thresholds between codes.
    """

    start_fraction: float = Field(
        0.5, gt=0, lt=1, description="Fraction of training.steps after which the stage begins."
    )
    learning_rate: float = Field(
        gt=0,
        description="Peak that replaces optimizer.learning_rate, about two thirds of it; the schedule continues from "
        "there.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Value that replaces optimizer.weight_decay.")


class OptimizerConfig(ConfigSection):
    """AdamW with linear warm-up, a learning rate schedule and an optional second stage."""

    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="Learning rate at the last step, as a fraction of the peak."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    lr_schedule: Literal["cosine", "linear"] = Field(
        "cosine", description="Shape of the decay from the end of the warm-up to the last step."
    )
    second_stage: SecondStageConfig | None = Field(
        None, description="Lower peak and other weight decay for the rest of the run; default: a single stage."
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's betas, each in [0, 1).")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        0.1, ge=0, description="Weight decay of matrices; coefficients of KAN functions have none."
    )
    function_lr_ratio: float = Field(
        1.0, gt=0, description="Learning rate of KAN coefficients, as a multiple of that of the other parameters."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Norm to which gradients are clipped; 0: no clipping.")

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
        """Return the first step (counted from 0) of the second stage in a run of `steps`; `steps` without one."""
        return steps if self.second_stage is None else round(self.second_stage.start_fraction * steps)
