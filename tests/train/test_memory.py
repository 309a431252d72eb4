"""A step leaves nothing behind: what it made is gone when the next one begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.runs import run_worker, write_small_config


def test_no_tensor_outlives_its_step(shards: Path, tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "experts": {"expert_parallel": 2, "experts_per_rank": [1, 3], "zero_stage": 2},
        "slices": {"sequence_parallel": 2, "expert_parallel": 2, "zero_stage": 3},
        "shares": {"expert_parallel": 2, "zero_stage": 1, "shard_ternary": True},
        "again": {"sequence_parallel": 2, "zero_stage": 1},
    }
    paths = []
    for name, layout in cases.items():
        changes = {f"parallel__{key}": value for key, value in layout.items()}
        if name == "again":
            changes |= {
                "model__activation_checkpointing": "recompute",
                "model__layers": "RA",
                "model__short_conv_size": 3,
            }
        changes |= {"training__log_interval": 100, "guard__spike": "off"}
        paths.append(str(write_small_config(tmp_path / f"{name}.yaml", shards, tmp_path / name, **changes)))
    (tmp_path / "jobs.json").write_text(json.dumps(paths))
    run_worker(2, "tests.workers.memory", str(tmp_path / "jobs.json"))
