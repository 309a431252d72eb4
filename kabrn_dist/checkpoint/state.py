"""The state that a run's checkpoint holds next to its tensors: one record, so that every writer writes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, JsonValue, ValidationError

from kabrn_dist.checkpoint.manifest import Count, Manifest, ManifestRecord, Sha256, first_validation_error
from kabrn_dist.utils.errors import UserError


class RunState(ManifestRecord):
    """State of a run after a step.

    Attributes:
        step: Steps done.
        updates: Steps that changed the weights, the counter of AdamW.
        cursor: Position in the data, the fields of `kabrn_dist.data.state.DataState`.
        skipped_data_steps: Steps whose data was read and not trained on.
        precision: Training precision.
        loss_scale: Scale of the loss; 1 unless the precision is fp16.
        guard: State of the loss guard.
        config: The whole configuration, of the version that wrote it: see `kabrn_dist.config.file.parse_config`.
        tokenizer_sha256: Hash of the data's tokenizer.
    """

    step: Count
    updates: Count
    cursor: dict[str, JsonValue]
    skipped_data_steps: Count = 0
    precision: str
    loss_scale: Annotated[FiniteFloat, Field(gt=0)]
    guard: dict[str, JsonValue] = Field(default_factory=dict)
    config: dict[str, JsonValue]
    tokenizer_sha256: Sha256


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
        return RunState.model_validate(state)
    except ValidationError as error:
        raise UserError(
            f"{path}: its state cannot be used ({first_validation_error(error)}); use a checkpoint of this version"
        ) from error
