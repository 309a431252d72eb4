"""What a run's checkpoint keeps beside its tensors: one record, so that all who write it write the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, JsonValue, ValidationError

from kabrn_dist.checkpoint.manifest import Count, ManifestRecord, Sha256, first_error
from kabrn_dist.utils.errors import UserError


class RunState(ManifestRecord):
    """Where a run stands.

    Attributes:
        step: steps done. updates: of them, those that changed the weights: AdamW's counter.
        cursor: the data's place, fields of `kabrn_dist.data.state.Cursor`.
        passed_over: steps' worth of data that was read and not trained on.
        precision, loss_scale: of the training; the scale is 1 but in fp16.
        guard: what it remembers. config: the whole configuration. tokenizer_sha256: of the data's tokenizer.
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


def read_state(path: Path, state: Mapping[str, Any]) -> RunState:
    """The state in the manifest of the checkpoint `path`, which may come from a stranger or from another version.

    Raises UserError where something is missing or is no such value.
    """
    try:
        return RunState.model_validate(dict(state))
    except ValidationError as error:
        raise UserError(
            f"{path}: its state cannot be used ({first_error(error)}); use a checkpoint of this version"
        ) from error
