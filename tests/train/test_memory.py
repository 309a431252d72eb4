"""A step leaves nothing behind: what it made is gone when the next one begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.runs import ranks, write_config


def test_no_tensor_outlives_its_step(shards: Path, tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "experts": {"expert": 2, "experts_per_rank": [1, 3], "zero": 2},
        "slices": {"sequence": 2, "expert": 2, "zero": 3},
        "shares": {"expert": 2, "zero": 1, "bitlinear_shards": True},
        "again": {"sequence": 2, "zero": 1},
    }
    paths = []
    for name, layout in cases.items():
        changes = {f"parallel__{key}": value for key, value in layout.items()}
        if name == "again":
            changes |= {"model__activations": "recompute", "model__layers": "RA", "model__convolution": 2}
        changes |= {"training__log_every": 100, "guard__spike": "off"}
        paths.append(str(write_config(tmp_path / f"{name}.yaml", shards, tmp_path / name, **changes)))
    (tmp_path / "jobs.json").write_text(json.dumps(paths))
    ranks(2, "memory_worker", str(tmp_path / "jobs.json"))
