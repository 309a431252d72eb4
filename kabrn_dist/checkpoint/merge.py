"""Merge of the reports of all ranks into one manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue, ValidationError

from kabrn_dist.checkpoint.manifest import FileRecord, Manifest, first_validation_error
from kabrn_dist.checkpoint.writer import WrittenRange
from kabrn_dist.utils.errors import UserError


def make_rank_report(file: FileRecord, ranges: list[WrittenRange]) -> list[Any]:
    """Return the report of one rank to rank 0, JSON types only.

    Args:
        file: File that the rank wrote.
        ranges: One for each fragment of the rank.
    """
    return [
        file.model_dump(),
        [{**written._asdict(), "piece": written.piece and written.piece.model_dump()} for written in ranges],
    ]


def merge_reports(step: int, reports: list[Any], state: Mapping[str, JsonValue]) -> Manifest:
    """Merge the reports of all ranks into one manifest.

    Args:
        step: Step of the checkpoint.
        reports: Results of `make_rank_report`, in rank order.
        state: The caller's JSON.

    Raises:
        UserError: if the ranks disagree about a tensor or do not cover it exactly once.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for _, ranges in reports:
        for written in ranges:
            new = {"dtype": written["dtype"], "shape": tuple(written["shape"]), "pieces": []}
            tensor = tensors.setdefault(written["name"], new)
            if (tensor["dtype"], tensor["shape"]) != (new["dtype"], new["shape"]):
                raise UserError(
                    f"{written['name']}: one fragment says {tensor['dtype']} {tensor['shape']}, another "
                    f"{new['dtype']} {new['shape']}; all must describe the same logical tensor"
                )
            if written["piece"]:
                tensor["pieces"].append(written["piece"])
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
            f"step {step}: {first_validation_error(error)}; give every element one owner and the state JSON types only"
        ) from error
