"""The checkpoint store: save, find, load. Collective, world-size free, no pickle.

A checkpoint exists from one rename on; whatever a crash leaves before it is never looked at.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue, ValidationError

from kabrn_dist.checkpoint.exchange import (
    Group,
    broadcast_json,
    gather_json,
    on_first,
    rank_of,
    size_of,
    together,
)
from kabrn_dist.checkpoint.folder import commit, list_checkpoints, start_temporary, temporary_path, tidy
from kabrn_dist.checkpoint.fragment import Fragment, check_fragment
from kabrn_dist.checkpoint.manifest import (
    Manifest,
    first_error,
    manifest_bytes,
    read_manifest,
    verify_files,
)
from kabrn_dist.checkpoint.shard import (
    Copy,
    Holding,
    load_tensor,
    plan_copies,
    read_copies,
    tensor_record,
    write_shard,
)
from kabrn_dist.errors import UserError

__all__ = ["CheckpointStore", "load_tensor", "read_manifest"]

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run, in `folder`, on a file system that all ranks share.

    keep: how many of the newest intact ones are kept, at least 2, as the newest may turn out damaged.
    keep_every: steps divisible by it are kept for ever; 0 for none.
    group: the ranks that save and load together; None for the default group, or for a single process
    where torch.distributed is not initialised. Its timeout must exceed the slowest rank's writing.

    Raises UserError for keep < 2 or keep_every < 0.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_every: int = 0, group: Group = None) -> None:
        if keep < 2:
            raise UserError(f"keep: {keep} checkpoints are too few, the newest may be damaged; use 2 or more")
        if keep_every < 0:
            raise UserError(f"keep_every: {keep_every} is negative; use 0 to keep none for ever")
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self.group = group
        self._loaded: Path | None = None

    def save(self, step: int, fragments: Iterable[Fragment], state: Mapping[str, JsonValue]) -> bool:
        """Commit the owned fragments of all ranks, and rank 0's `state`, as the checkpoint of `step`.

        Collective. True once it is durable. False on every rank if any rank failed: one line is logged,
        nothing is left behind, older checkpoints are untouched and training can go on. Together the
        owned fragments must cover each logical tensor exactly once. `state` comes back unchanged from
        the manifest, so it holds only JSON types (lists, not tuples) and finite numbers.
        """
        try:
            self._write(step, fragments, state)
        except UserError as error:
            on_first(self.group, shutil.rmtree, temporary_path(self.folder, step), True)
            if rank_of(self.group) == 0:
                logger.error("checkpoint of step %d was not saved: %s", step, error)
            return False
        if rank_of(self.group) == 0:
            self._tidy(step)
        return True

    def find(self, verify: bool = True) -> Path | None:
        """The newest checkpoint that is intact, the same on every rank; None if there is none.

        Collective. Checks manifests and file sizes, and with `verify` the sha256 of every file, each
        rank reading its share. Each one passed over is logged with what is wrong with it. Raises
        UserError if the folder cannot be listed.
        """
        listed = on_first(self.group, list_checkpoints, self.folder)
        for name in broadcast_json([path.name for path in listed or []], self.group):
            try:
                self.check(self.folder / name, verify)
            except UserError as error:
                if rank_of(self.group) == 0:
                    logger.warning("passing over checkpoint %s: %s", name, error)
                continue
            return self.folder / name
        return None

    def check(self, path: Path, verify: bool = True) -> Manifest:
        """The manifest of `path` if it is intact in `find`'s sense; UserError on every rank if not."""
        manifest = together(self.group, read_manifest, path)
        if verify:
            share = manifest.files[rank_of(self.group) :: size_of(self.group)]
            together(self.group, verify_files, path, share)
        return manifest

    def load(self, path: Path, fragments: Iterable[Fragment], missing: Literal["error", "keep"] = "error") -> Manifest:
        """Fill the `values` of all fragments, owned or not, from the checkpoint `path`; return its manifest.

        Collective, at any world size and partition; only the ranges needed are read, dtypes are
        converted. Contents are not hashed: `find` and `check` do that. `missing="keep"` leaves the values
        of tensors that the checkpoint lacks as they are. Raises UserError on every rank for a tensor
        that is missing or has another shape, before any value is touched; for an unreadable file, after
        which the values are undefined.
        """
        manifest = together(self.group, read_manifest, path)
        copies = together(self.group, _plan, path, manifest, fragments, missing)
        together(self.group, read_copies, path, copies)
        self._loaded = path.resolve()
        return manifest

    def _write(self, step: int, fragments: Iterable[Fragment], state: Mapping[str, JsonValue]) -> None:
        rank, group = rank_of(self.group), self.group
        temporary = temporary_path(self.folder, step)
        on_first(group, start_temporary, self.folder, step)
        file, holdings = together(group, write_shard, temporary / f"rank-{rank:05d}.safetensors", fragments)
        report = [file.model_dump(), [_holding_json(holding) for holding in holdings]]
        reports = gather_json(report, group)
        on_first(group, self._commit, step, reports, state)

    def _commit(self, step: int, reports: list[Any], state: Mapping[str, JsonValue]) -> None:
        commit(self.folder, step, manifest_bytes(_merge(step, reports, state)))

    def _tidy(self, step: int) -> None:
        try:
            tidy(self.folder, step, self.keep, self.keep_every, self._loaded)
        except Exception as error:
            # The checkpoint is committed, and rank 0 is alone here: it must not raise.
            logger.warning("%s: old checkpoints were not tidied up: %s", self.folder, error)


def _plan(path: Path, manifest: Manifest, fragments: Iterable[Fragment], missing: str) -> list[Copy]:
    copies: list[Copy] = []
    for fragment in fragments:
        check_fragment(fragment)
        if missing == "keep" and fragment.name not in manifest.tensors:
            continue
        record = tensor_record(path, manifest, fragment.name)
        if record.shape != fragment.shape:
            raise UserError(
                f"{path}: tensor {fragment.name!r} has shape {record.shape} in the checkpoint and "
                f"{fragment.shape} in this run; use the config this checkpoint was written with"
            )
        copies.extend(plan_copies(manifest, fragment))
    return copies


def _holding_json(holding: Holding) -> dict[str, Any]:
    piece = holding.piece.model_dump() if holding.piece else None
    return {**holding._asdict(), "piece": piece}


def _merge(step: int, reports: list[Any], state: Mapping[str, JsonValue]) -> Manifest:
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
            f"step {step}: {first_error(error)}; every element needs one owner, every state entry a JSON type"
        ) from error
