"""The sections of the training loop: `training`, `validation`, `checkpoint` and `guard`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from kabrn_dist.utils.yaml_section import ConfigSection


class TrainingConfig(ConfigSection):
    """Length, batch size and precision of the run."""

    steps: PositiveInt = Field(le=10**9, description="Optimizer steps of the whole run.")
    global_batch_size: PositiveInt = Field(description="Sequences per optimizer step, over all ranks.")
    micro_batch_size: PositiveInt = Field(
        description="Sequences per forward pass on one rank. Gradients are accumulated over "
        "global_batch_size / (micro_batch_size × data ranks) passes."
    )
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "fp32",
        description="Data type of activations and of the weights in use; master weights stay in fp32. fp16 scales the "
        "loss dynamically. auto takes what all ranks are good at, says why, and writes it into the run's config.yaml.",
    )
    log_interval: PositiveInt = Field(1, description="Steps between entries in the console, log.jsonl and TensorBoard.")

    @property
    def chosen_precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """The precision of a run that has begun, where `auto` has been replaced."""
        assert self.precision != "auto", "resolve_precision or grow comes first"
        return self.precision


class ValidationConfig(ConfigSection):
    """Evaluation on the held-out split."""

    eval_interval: int = Field(100, ge=0, description="Steps between validations; 0: only at the end.")
    eval_sequences: PositiveInt = Field(256, description="Sequences of the validation split to evaluate.")
    sample_tokens: int = Field(
        64, ge=0, le=10_000, description="Tokens of the text that the model writes at each validation; 0: none."
    )
    tasks: tuple[str, ...] = Field(
        (), description="Tasks of `mixkabrn eval` that are scored during training; none that runs code."
    )
    task_data: Path | None = Field(None, description="Folder with the files of the tasks.")
    task_interval: int = Field(0, ge=0, description="Steps between scores of the tasks; 0: only at the end.")
    task_examples: PositiveInt = Field(
        64, description="Examples of each task, those of `mixkabrn eval --limit` with the same number."
    )

    @model_validator(mode="after")
    def _check_task_data(self) -> ValidationConfig:
        if self.tasks and self.task_data is None:
            raise ValueError(
                f"validation.tasks {', '.join(self.tasks)} are read from validation.task_data, which is missing; set "
                "it to the folder of their files"
            )
        return self


class CheckpointConfig(ConfigSection):
    """When checkpoints are written, and which ones are kept."""

    save_interval: int = Field(
        500, ge=0, description="Steps between checkpoints; 0: only at the end and when the run is stopped."
    )
    keep_last: int = Field(2, ge=2, description="Number of newest checkpoints to keep.")
    keep_every: int = Field(
        0, ge=0, description="Keep every checkpoint whose step is a multiple of this number as well; 0: none."
    )
    async_save: bool = Field(
        True,
        description="Write checkpoints in a background thread while training continues; needs host memory for a copy "
        "of the tensors that a rank owns.",
    )


class GuardConfig(ConfigSection):
    """Reaction to bad steps, loss spikes and hanging ranks."""

    stop_exit_code: int = Field(
        0,
        ge=0,
        le=125,
        description="Exit code of a run that was stopped before its last step; 75 makes many schedulers requeue it.",
    )
    max_bad_steps: PositiveInt = Field(
        5,
        description="Consecutive steps with a non-finite loss or gradient, each of them skipped, after which the run "
        "returns to its last checkpoint and skips the data read since.",
    )
    spike: Literal["off", "warn", "skip"] = Field(
        "warn",
        description="Reaction to a spike of the loss: ignore it, log it, or skip the update. After more than "
        "max_bad_steps spikes in a row, the new level counts as normal.",
    )
    spike_sigma: float = Field(
        6.0, gt=0, description="A loss counts as a spike if it exceeds the mean by this many standard deviations."
    )
    spike_window: int = Field(
        128, ge=8, le=1_000_000, description="Recent steps from which mean and standard deviation are taken."
    )
    hang_timeout_s: float = Field(
        1800.0,
        ge=0,
        le=1e8,
        description="Seconds without a finished step after which a rank prints all its stacks and exits; 0: never.",
    )
