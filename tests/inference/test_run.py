"""What a run's folder holds is found, or what is wrong with it is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.inference.run_checkpoint import find_checkpoint
from kabrn_dist.utils.errors import UserError
from tests.checkpoint.test_store import constant


def test_where_all_checkpoints_are_damaged_each_is_named_with_its_fault(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no intact checkpoint; train until the first one is saved"):
        find_checkpoint(tmp_path)
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=3)
    assert all(store.save(step, constant(step), {}) for step in (1, 2, 3))
    assert find_checkpoint(tmp_path)[1].step == 3
    os.truncate(store.folder / "step-00000003" / "manifest.json", 10)
    (store.folder / "step-00000002").rename(tmp_path / "real")
    (store.folder / "step-00000002").symlink_to(tmp_path / "real")
    weights = store.folder / "step-00000001" / "rank-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError) as refused:
        find_checkpoint(tmp_path)
    words = str(refused.value)
    assert "train until" not in words and "restore one of them" in words
    for name, fault in (("3", "Invalid JSON"), ("2", "is a link"), ("1", "sha256")):
        assert f"step-0000000{name}" in words and fault in words
