"""Ternary matrices shared out over ranks: the same losses as ZeRO 1, the same codes on all ranks, any checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.harness import ranks, read_losses, sessions, write_config
from tests.test_parity import LARGER

STEPS = 20
# World size → (sequence parallelism, expert parallelism, experts per rank, micro-batch, other settings).
LAYOUTS: dict[int, list[tuple[int, int, list[int] | None, int, dict[str, Any]]]] = {
    1: [(1, 1, None, 4, {}), (1, 1, None, 16, {})],
    2: [
        (1, 1, None, 4, {}),
        (1, 2, [1, 3], 8, {"parallel__bitlinear_packing": "base_three"}),
        (2, 1, None, 8, {"model__activations": "recompute"}),
    ],
    4: [(1, 1, None, 2, {}), (1, 2, None, 4, {"parallel__bucket": 3000}), (2, 2, [3, 1], 4, {}), (4, 4, None, 16, {})],
}


def configure(path: Path, shards: Path, layout: tuple[Any, ...], shared: bool) -> Path:
    sequence, expert, counts, micro, others = layout
    settings: dict[str, Any] = {
        "training__steps": STEPS,
        "parallel__sequence": sequence,
        "parallel__expert": expert,
        "parallel__experts_per_rank": counts,
        "parallel__zero": 1,
        "parallel__bitlinear_shards": shared,
        "training__micro_batch": micro,
    }
    return write_config(path, shards, path.with_suffix(""), **{**LARGER, **settings, **others})


def test_losses_are_those_of_zero_1_and_codes_agree(shards: Path, tmp_path: Path) -> None:
    plain = configure(tmp_path / "zero.yaml", shards, LAYOUTS[1][0], False)
    sessions(1, [[str(plain), "never", None]], tmp_path)
    expected = read_losses(tmp_path / "zero")
    assert len(expected) == STEPS
    apart = {}
    for world, layouts in LAYOUTS.items():
        paths = [configure(tmp_path / f"{world}-{i}.yaml", shards, layout, True) for i, layout in enumerate(layouts)]
        (tmp_path / "jobs.json").write_text(json.dumps([str(path) for path in paths]))
        ranks(world, "shards_worker", str(tmp_path / "jobs.json"), timeout=600)
        for path in paths:
            found = read_losses(path.with_suffix(""))
            apart[path.stem] = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    print(apart)
    assert max(apart.values()) <= 1e-3, apart
