"""The checkpoint store: saves in the foreground or the background, finds and loads, at any world size, without pickle.

A checkpoint exists from one rename on; what a crash leaves before it is never read.

Extra memory of a rank: `save` stages CHUNK_BYTES (nothing on a CPU, where it writes from the live values);
`save_async` keeps a copy in host memory of all that the rank owns; `load` stages CHUNK_BYTES where dtype or device
differ, `find_latest` HASH_CHUNK_BYTES for each file that it reads at a time.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from pydantic import JsonValue

from kabrn_dist.checkpoint.background import HostBuffers, PendingSave, Snapshot
from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.layout import (
    check_name,
    commit,
    list_checkpoints,
    list_links,
    make_temporary,
    prune,
    remove_temporary,
    temporary_path,
    write_latest,
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
from kabrn_dist.checkpoint.survey import Survey
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

Result = TypeVar("Result")


class CheckpointStore:
    """The checkpoints of one run, in one folder on a file system that all ranks share.

    Args:
        folder: Folder of the checkpoints; made by the first save.
        keep_last: Number of newest intact checkpoints to keep, at least 2, as the newest may turn out damaged.
        keep_every: Steps divisible by it are kept for ever; 0 for none.
        group: Ranks that save and load together; None for the default group, or for a single process where
            torch.distributed is not initialized. Its timeout must exceed the time of the slowest rank's writing.
        background_group: A second group of the same ranks, over the CPU, for the thread of `save_async` alone: two
            threads in one group would take each other's messages.

    Raises:
        UserError: if `keep_last` is below 2 or `keep_every` negative.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = CheckpointStore(Path(folder.name))
        >>> weights = torch.arange(4.0)
        >>> store.save(1, [Fragment("weights", (4,), 0, weights, owned=True)], {"epoch": 0})
        True
        >>> weights.zero_()
        tensor([0., 0., 0., 0.])
        >>> store.load(store.find_latest(), [Fragment("weights", (4,), 0, weights, owned=True)]).state
        {'epoch': 0}
        >>> weights
        tensor([0., 1., 2., 3.])
    """

    def __init__(
        self, folder: Path, keep_last: int = 2, keep_every: int = 0, group: Group = None, background_group: Group = None
    ) -> None:
        if keep_last < 2:
            raise UserError(f"keep_last: {keep_last} checkpoints are too few, the newest may be damaged; use 2 or more")
        if keep_every < 0:
            raise UserError(f"keep_every: {keep_every} is negative; use 0 to keep none for ever")
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.group = group
        self.background_group = background_group
        self._buffers = HostBuffers()
        self._pending: PendingSave | None = None
        self._loaded: Path | None = None

    def save(self, step: int, fragments: Iterable[Fragment], state: Mapping[str, JsonValue]) -> bool:
        """Commit the owned fragments of all ranks and the state of rank 0 as the checkpoint of `step`.

        Collective.

        Args:
            step: Step of the run.
            fragments: Fragments of this rank. The owned ones of all ranks together must cover each logical tensor
                exactly once.
            state: JSON types only (lists, not tuples) and finite numbers; it comes back unchanged from the manifest.

        Returns:
            True once the checkpoint is durable. False on every rank if any rank failed: one line is logged, nothing
            is left behind, older checkpoints are untouched and training can continue.

        Raises:
            ValueError: if the result of a save in the background has not been retrieved.
        """
        self._refuse_second_save()
        return self._save(self.group, step, Snapshot(fragments, state))

    def save_async(self, step: int, fragments: Iterable[Fragment], state: Mapping[str, JsonValue]) -> PendingSave:
        """Start `save` in a thread, and return as soon as what this rank owns is copied to host memory.

        All ranks must call it; they do not wait for each other in it. Values and state may change afterwards. A rank
        that fails to copy fails the save on all ranks, which the result then says.

        Args:
            step: As for `save`.
            fragments: As for `save`.
            state: As for `save`.

        Returns:
            The save, whose `result` all ranks must retrieve before the next one.

        Raises:
            ValueError: if the result of an earlier save has not been retrieved, or several ranks have no
                `background_group`.
        """
        self._refuse_second_save()
        if dist.is_initialized() and self.background_group is None:
            raise ValueError("save_async: give the store a background_group; training uses the other one meanwhile")
        snapshot = self._copy(fragments, state)
        self._pending = PendingSave(lambda: self._save(self.background_group, step, snapshot))
        return self._pending

    def find_latest(self, verify: bool = True) -> Path | None:
        """Return the newest intact checkpoint, the same on every rank; None if there is none.

        Collective. See `survey`.
        """
        return self.survey(verify).path

    def survey(self, verify: bool = True, accept: Callable[[Path, Manifest], object] | None = None) -> Survey:
        """Return the newest intact checkpoint and what is wrong with newer ones, the same on every rank.

        Collective. Checks manifests, file sizes and headers, and with `verify` the sha256 of every file, of which each
        rank reads its part. Logs each checkpoint that it skips, with the reason.

        Args:
            verify: Check the hashes of the files.
            accept: Raises UserError for a manifest whose state the caller cannot use; such a checkpoint is skipped.

        Raises:
            UserError: if the folder cannot be listed.
        """
        found = run_on_main(self.group, _list_names, self.folder)
        names, links = broadcast_json(found, self.group)
        faults = dict.fromkeys(links, "is a link or a file, which is never read; move the folder itself here")
        for name in names:
            try:
                manifest = self.check(self.folder / name, verify)
                if accept is not None:
                    run_on_all(self.group, accept, self.folder / name, manifest)
            except UserError as error:
                faults[name] = str(error)
                if group_rank(self.group) == 0:
                    logger.warning("skipping checkpoint %s: %s", name, error)
                continue
            return Survey(self.folder / name, faults)
        return Survey(None, faults)

    def check(self, path: Path, verify: bool = True) -> Manifest:
        """Return the manifest of `path` if the checkpoint is intact in the sense of `survey`.

        Collective.

        Raises:
            UserError: on every rank if it is not intact.
        """
        manifest = run_on_all(self.group, read_manifest, path)
        run_on_all(self.group, check_name, path, manifest.step)
        files = manifest.files[group_rank(self.group) :: group_size(self.group)]
        run_on_all(self.group, check_headers, path, manifest, files)
        if verify:
            run_on_all(self.group, verify_files, path, files)
        return manifest

    def load(self, path: Path, fragments: Iterable[Fragment], missing: Literal["error", "keep"] = "error") -> Manifest:
        """Fill the values of all fragments, owned or not, from the checkpoint `path`.

        Collective, at any world size and partition. Only the ranges needed are read, and dtypes are converted.
        Contents are not hashed: `find_latest` and `check` do that.

        Args:
            path: Folder of the checkpoint.
            fragments: Fragments of this rank, whose values are overwritten.
            missing: "keep" leaves the values of tensors that the checkpoint lacks as they are.

        Returns:
            The manifest of the checkpoint.

        Raises:
            UserError: on every rank, for a tensor that is missing or has another shape, before any value is touched;
                for an unreadable file, after which the values are undefined.
        """
        manifest = run_on_all(self.group, _after_fault_point, "load.manifest", read_manifest, path)
        reads = run_on_all(self.group, plan_reads, path, manifest, fragments, missing == "keep")
        run_on_all(self.group, _after_fault_point, "load.tensors", read_ranges, path, reads)
        run_on_all(self.group, inject_fault, "load.done")
        self._loaded = path.resolve()
        return manifest

    def _refuse_second_save(self) -> None:
        if self._pending is not None and not self._pending.retrieved:
            raise ValueError("a save in the background is under way; call its result() first")

    def _copy(self, fragments: Iterable[Fragment], state: Mapping[str, JsonValue]) -> Snapshot:
        try:
            return Snapshot(self._buffers.copy(fragments), copy.deepcopy(dict(state)))
        except Exception as error:
            return Snapshot((), {}, error)

    def _save(self, group: Group, step: int, snapshot: Snapshot) -> bool:
        """Run the whole save, in whichever thread, over `group`."""
        try:
            self._write(group, step, snapshot)
        except UserError as error:
            run_on_main(group, remove_temporary, self.folder, step)
            if group_rank(group) == 0:
                logger.error("checkpoint of step %d was not saved: %s", step, error)
            return False
        if group_rank(group) == 0:
            self._prune(step)
        return True

    def _write(self, group: Group, step: int, snapshot: Snapshot) -> None:
        run_on_all(group, self._begin, group, step, snapshot)
        file = temporary_path(self.folder, step) / f"rank-{group_rank(group):05d}.safetensors"
        record, ranges = run_on_all(group, _write_rank_file, file, snapshot.fragments)
        reports = gather_json(make_rank_report(record, ranges), group)
        run_on_main(group, self._commit, step, reports, snapshot.state)

    def _begin(self, group: Group, step: int, snapshot: Snapshot) -> None:
        inject_fault("save.begin")
        if group_rank(group) == 0:
            make_temporary(self.folder, step)
        if snapshot.error is not None:
            raise snapshot.error

    def _commit(self, step: int, reports: list[Any], state: Mapping[str, JsonValue]) -> None:
        commit(self.folder, step, encode_manifest(merge_reports(step, reports, state)))

    def _prune(self, step: int) -> None:
        try:
            prune(self.folder, step, self.keep_last, self.keep_every, self._loaded)
            # After pruning, which a disk too full for these few bytes needs most.
            write_latest(self.folder, step)
        except Exception as error:
            # The checkpoint is committed, and only rank 0 is here: it must not raise.
            logger.warning("%s: old checkpoints were not pruned: %s", self.folder, error)


def _list_names(folder: Path) -> tuple[list[str], list[str]]:
    return [path.name for path in list_checkpoints(folder)], list_links(folder)


def _write_rank_file(file: Path, fragments: Iterable[Fragment]) -> tuple[FileRecord, list[WrittenRange]]:
    written = write_rank_file(file, fragments)
    inject_fault("save.written")
    return written


def _after_fault_point(point: str, work: Callable[..., Result], *arguments: Any) -> Result:
    inject_fault(point)
    return work(*arguments)
