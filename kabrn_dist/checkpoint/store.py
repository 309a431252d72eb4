"""The checkpoint store: save at once or in the background, find, load. Collective, world-size free, no pickle.

A checkpoint exists from one rename on; whatever a crash leaves before it is never looked at.

Extra memory of a rank: `save` stages CHUNK_BYTES (nothing on a CPU, where it writes from the live values);
`start` keeps a copy in host memory of all that the rank owns; `load` stages CHUNK_BYTES where dtype or device differ,
`find` HASH_CHUNK_BYTES for each file it reads at a time.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from pydantic import JsonValue

from kabrn_dist.checkpoint.background import Background, HostBuffers
from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.layout import (
    commit,
    drop_temporary,
    list_checkpoints,
    start_temporary,
    temporary_path,
    tidy,
)
from kabrn_dist.checkpoint.manifest import (
    FileRecord,
    Manifest,
    encode_manifest,
    read_manifest,
    verify_files,
)
from kabrn_dist.checkpoint.merge import make_rank_report, merge_reports
from kabrn_dist.checkpoint.reader import check_headers, load_tensor, plan_reads, read_ranges
from kabrn_dist.checkpoint.writer import WrittenRange, write_rank_file
from kabrn_dist.distributed.collectives import (
    Group,
    broadcast_json,
    gather_json,
    group_rank,
    group_size,
    run_on_all,
    run_on_main,
)
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.fault_injection import inject_fault

__all__ = ["CheckpointStore", "load_tensor", "read_manifest"]

logger = logging.getLogger(__name__)

Taken = tuple[Iterable[Fragment], Mapping[str, JsonValue]]
Result = TypeVar("Result")


class CheckpointStore:
    """The checkpoints of one run, in `folder`, on a file system that all ranks share.

    keep: how many of the newest intact ones are kept, at least 2, as the newest may turn out damaged.
    keep_every: steps divisible by it are kept for ever; 0 for none.
    group: the ranks that save and load together; None for the default group, or for a single process
    where torch.distributed is not initialised. Its timeout must exceed the slowest rank's writing.
    background_group: the same ranks over the CPU once more, for the thread of `start` alone: two threads in one
    group would take each other's messages.

    Raises UserError for keep < 2 or keep_every < 0.
    """

    def __init__(
        self, folder: Path, keep: int = 2, keep_every: int = 0, group: Group = None, background_group: Group = None
    ) -> None:
        if keep < 2:
            raise UserError(f"keep: {keep} checkpoints are too few, the newest may be damaged; use 2 or more")
        if keep_every < 0:
            raise UserError(f"keep_every: {keep_every} is negative; use 0 to keep none for ever")
        self.folder = folder
        self.keep_last = keep
        self.keep_every = keep_every
        self.group = group
        self.background_group = background_group
        self._copies = HostBuffers()
        self._background: Background | None = None
        self._loaded: Path | None = None

    def save(self, step: int, fragments: Iterable[Fragment], state: Mapping[str, JsonValue]) -> bool:
        """Commit the owned fragments of all ranks, and rank 0's `state`, as the checkpoint of `step`.

        Collective. True once it is durable. False on every rank if any rank failed: one line is logged,
        nothing is left behind, older checkpoints are untouched and training can go on. Together the
        owned fragments must cover each logical tensor exactly once. `state` comes back unchanged from
        the manifest, so it holds only JSON types (lists, not tuples) and finite numbers.

        Raises ValueError while a save of `start` is under way.
        """
        self._refuse_two()
        return self._attempt(self.group, step, lambda: (fragments, state))

    def start(self, step: int, fragments: Iterable[Fragment], state: Mapping[str, JsonValue]) -> None:
        """Begin `save` in a thread, and return as soon as what this rank owns is copied to host memory.

        To be called by all ranks, which do not wait for each other in it. Values and state may change
        afterwards. A rank that fails to copy fails the save for all, as `collect` then says.

        Raises ValueError while another save is under way, or without a background group among several.
        """
        self._refuse_two()
        if dist.is_initialized() and self.background_group is None:
            raise ValueError("start: give the store a background_group, the training uses the other one meanwhile")
        taken = _outcome_of(self._copy, fragments, state)
        self._background = Background(lambda: self._attempt(self.background_group, step, taken))

    @property
    def under_way(self) -> bool:
        """True from `start` to `collect`: the same on all ranks."""
        return self._background is not None

    def ended(self) -> bool:
        """True where this rank's part of the save under way is over, or none is. Never blocks; ranks may differ."""
        return self._background is None or self._background.ended()

    def collect(self) -> bool:
        """Wait for the save under way and return what `save` would have: the same on all ranks.

        Raises ValueError without a save under way; what broke the group, where a rank died.
        """
        if self._background is None:
            raise ValueError("collect: no save is under way; call start first")
        background, self._background = self._background, None
        return background.wait()

    def find(self, verify: bool = True) -> Path | None:
        """The newest checkpoint that is intact, the same on every rank; None if there is none.

        Collective. Checks manifests, file sizes and headers, and with `verify` the sha256 of every file,
        each rank reading its share. Each one passed over is logged with what is wrong with it. Raises
        UserError if the folder cannot be listed.
        """
        listed = run_on_main(self.group, list_checkpoints, self.folder)
        for name in broadcast_json([path.name for path in listed or []], self.group):
            try:
                self.check(self.folder / name, verify)
            except UserError as error:
                if group_rank(self.group) == 0:
                    logger.warning("passing over checkpoint %s: %s", name, error)
                continue
            return self.folder / name
        return None

    def check(self, path: Path, verify: bool = True) -> Manifest:
        """The manifest of `path` if it is intact in `find`'s sense; UserError on every rank if not."""
        manifest = run_on_all(self.group, read_manifest, path)
        share = manifest.files[group_rank(self.group) :: group_size(self.group)]
        run_on_all(self.group, check_headers, path, manifest, share)
        if verify:
            run_on_all(self.group, verify_files, path, share)
        return manifest

    def load(self, path: Path, fragments: Iterable[Fragment], missing: Literal["error", "keep"] = "error") -> Manifest:
        """Fill the `values` of all fragments, owned or not, from the checkpoint `path`; return its manifest.

        Collective, at any world size and partition; only the ranges needed are read, dtypes are
        converted. Contents are not hashed: `find` and `check` do that. `missing="keep"` leaves the values
        of tensors that the checkpoint lacks as they are. Raises UserError on every rank for a tensor
        that is missing or has another shape, before any value is touched; for an unreadable file, after
        which the values are undefined.
        """
        manifest = run_on_all(self.group, _passing, "load.manifest", read_manifest, path)
        copies = run_on_all(self.group, plan_reads, path, manifest, fragments, missing == "keep")
        run_on_all(self.group, _passing, "load.tensors", read_ranges, path, copies)
        run_on_all(self.group, inject_fault, "load.done")
        self._loaded = path.resolve()
        return manifest

    def _refuse_two(self) -> None:
        if self._background is not None:
            raise ValueError("a save is under way; collect it first")

    def _copy(self, fragments: Iterable[Fragment], state: Mapping[str, JsonValue]) -> Taken:
        return self._copies.copy(fragments), copy.deepcopy(dict(state))

    def _attempt(self, group: Group, step: int, taken: Callable[[], Taken]) -> bool:
        """The whole save, by whichever thread, over `group`."""
        try:
            self._write(group, step, taken)
        except UserError as error:
            run_on_main(group, drop_temporary, self.folder, step)
            if group_rank(group) == 0:
                logger.error("checkpoint of step %d was not saved: %s", step, error)
            return False
        if group_rank(group) == 0:
            self._tidy(step)
        return True

    def _write(self, group: Group, step: int, taken: Callable[[], Taken]) -> None:
        fragments, state = run_on_all(group, self._begin, group, step, taken)
        file = temporary_path(self.folder, step) / f"rank-{group_rank(group):05d}.safetensors"
        record, holdings = run_on_all(group, _write_own, file, fragments)
        reports = gather_json(make_rank_report(record, holdings), group)
        run_on_main(group, self._commit, step, reports, state)

    def _begin(self, group: Group, step: int, taken: Callable[[], Taken]) -> Taken:
        inject_fault("save.begin")
        if group_rank(group) == 0:
            start_temporary(self.folder, step)
        return taken()

    def _commit(self, step: int, reports: list[Any], state: Mapping[str, JsonValue]) -> None:
        commit(self.folder, step, encode_manifest(merge_reports(step, reports, state)))

    def _tidy(self, step: int) -> None:
        try:
            tidy(self.folder, step, self.keep_last, self.keep_every, self._loaded)
        except Exception as error:
            # The checkpoint is committed, and rank 0 is alone here: it must not raise.
            logger.warning("%s: old checkpoints were not tidied up: %s", self.folder, error)


def _outcome_of(work: Callable[..., Result], *arguments: Any) -> Callable[[], Result]:
    """Do it now; whoever calls what is returned gets the result, or the exception."""
    try:
        result = work(*arguments)
    except Exception as error:
        failure = error

        def fail() -> Result:
            raise failure

        return fail
    return lambda: result


def _write_own(file: Path, fragments: Iterable[Fragment]) -> tuple[FileRecord, list[WrittenRange]]:
    written = write_rank_file(file, fragments)
    inject_fault("save.written")
    return written


def _passing(point: str, work: Callable[..., Result], *arguments: Any) -> Result:
    inject_fault(point)
    return work(*arguments)
