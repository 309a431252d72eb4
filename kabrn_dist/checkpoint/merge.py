"""One manifest from what all ranks report of what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue, ValidationError

from kabrn_dist.checkpoint.manifest import FileRecord, Manifest, first_validation_error
from kabrn_dist.checkpoint.writer import WrittenRange
from kabrn_dist.utils.errors import UserError


def make_rank_report(file: FileRecord, holdings: list[WrittenRange]) -> list[Any]:
    """What one rank tells rank 0, as JSON."""
    return [
        file.model_dump(),
        [{**held._asdict(), "piece": held.piece and held.piece.model_dump()} for held in holdings],
    ]


def merge_reports(step: int, reports: list[Any], state: Mapping[str, JsonValue]) -> Manifest:
    """The manifest of all ranks' reports; UserError if they disagree or do not cover a tensor once."""
    tensors: dict[str, dict[str, Any]] = {}
    for _, holdings in reports:
        for held in holdings:
            new = {"dtype": held["dtype"], "shape": tuple(held["shape"]), "pieces": []}
            tensor = tensors.setdefault(held["name"], new)
            if (tensor["dtype"], tensor["shape"]) != (new["dtype"], new["shape"]):
                raise UserError(
                    f"{held['name']}: one fragment says {tensor['dtype']} {tensor['shape']}, another "
                    f"{new['dtype']} {new['shape']}; all must describe the same logical tensor"
                )
            if held["piece"]:
                tensor["pieces"].append(held["piece"])
    for tensor in tensors.values():
        tensor["pieces"] = tuple(sorted(tensor["pieces"], key=lambda piece: piece["offset"]))
    try:
        return Manifest.model_validate(
            {
                "step": step,
                "world_size": len(reports),
                "files": tuple(file for file, _ in reports),
                "tensors": tensors,
                "state": dict(state),
            }
        )
    except ValidationError as error:
        raise UserError(
            f"step {step}: {first_validation_error(error)}; every element needs one owner, every state entry a JSON type"
        ) from error
