"""The state that a run's checkpoint holds next to its tensors: one record, so that every writer writes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, JsonValue, NonNegativeInt, PositiveInt, ValidationError

from kabrn_dist.checkpoint.manifest import Count, Manifest, ManifestRecord, Sha256, first_validation_error
from kabrn_dist.config import ModelConfig
from kabrn_dist.config.migrate import migrate
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.mistakes import explain_errors


class CursorState(ManifestRecord):
    """Position in the data: the fields of `kabrn_dist.data.state.DataState`, which explains them."""

    consumed: NonNegativeInt
    seed: NonNegativeInt
    sequence_length: PositiveInt
    fingerprint: str
    drawn: dict[str, str] = Field(default_factory=dict)


class GuardState(ManifestRecord):
    """State of the loss guard: the attributes of `kabrn_dist.train.guard.LossGuard`, which explains them."""

    skipped: Count = 0
    spikes: Count = 0
    rollbacks: Count = 0
    bad: Count = 0
    returned_to: Count | None = None
    window: list[FiniteFloat] = Field(default_factory=list)
    spikes_in_a_row: Count = 0


class BaseState(ManifestRecord):
    """The model that a run fine-tunes.

    Attributes:
        sha256: Hash of its ternary codes, by which adapters know it.
        step: Its step.
        bits_per_byte: On the base's own validation data before the first step, by source; empty if not measured.
    """

    sha256: Sha256
    step: Count
    bits_per_byte: dict[str, FiniteFloat] = Field(default_factory=dict)


class RunState(ManifestRecord):
    """State of a run after a step.

    Attributes:
        step: Steps done.
        updates: Steps that changed the weights, the counter of AdamW.
        cursor: Position in the data.
        skipped_data_steps: Steps whose data was read and not trained on.
        precision: Training precision.
        loss_scale: Scale of the loss; 1 unless the precision is fp16.
        guard: State of the loss guard.
        config: The whole configuration, of the version that wrote it: see `kabrn_dist.config.file.parse_config`.
        tokenizer_sha256: Hash of the data's tokenizer.
        base: The model that the run fine-tunes; None for training from the start.
    """

    step: Count
    updates: Count
    cursor: CursorState
    skipped_data_steps: Count = 0
    precision: Literal["fp32", "bf16", "fp16"]
    loss_scale: Annotated[FiniteFloat, Field(gt=0)]
    guard: GuardState = Field(default_factory=GuardState)
    config: dict[str, JsonValue]
    tokenizer_sha256: Sha256
    base: BaseState | None = None


def read_state(path: Path, manifest: Manifest) -> RunState:
    """Return the run's state from the manifest of a checkpoint, converted if an earlier version wrote it.

    Args:
        path: The checkpoint's folder, for messages.
        manifest: Its manifest, which may come from a stranger.

    Raises:
        UserError: for a state in which something is missing or wrong.
    """
    state: dict[str, Any] = dict(manifest.state)
    if manifest.format_version == 1 and "passed_over" in state:
        state["skipped_data_steps"] = state.pop("passed_over")
    try:
        read = RunState.model_validate(state)
    except ValidationError as error:
        raise UserError(
            f"{path}: its state cannot be used ({first_validation_error(error)}); use a checkpoint of this version"
        ) from error
    if read.step != manifest.step:
        raise UserError(
            f"{path}: its state is of step {read.step}, its manifest of step {manifest.step}; use another checkpoint"
        )
    return read


def read_model(path: Path, state: RunState) -> ModelConfig:
    """Return the section `model` of the configuration in a checkpoint.

    Args:
        path: The checkpoint, for messages.
        state: Its state.

    Raises:
        UserError: if the checkpoint's configuration describes no model.
    """
    try:
        return ModelConfig.model_validate(migrate(dict(state.config)).get("model"))
    except ValidationError as error:
        mistakes = "; ".join(mistake.text for mistake in explain_errors(error, ModelConfig))
    except UserError as error:
        mistakes = str(error)
    raise UserError(f"{path}: the configuration in its state cannot be used ({mistakes}); use another checkpoint")
