"""The loss stream is the same for every layout (design §2): world × sequence × expert parallelism × ZeRO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import read_losses, run, torchrun, write_config

STEPS = 10
# World size → (sequence parallelism, expert parallelism, experts per rank).
PLACEMENTS: dict[int, list[tuple[int, int, list[int] | None]]] = {
    1: [(1, 1, None)],
    2: [(1, 1, None), (1, 2, None), (1, 2, [1, 3]), (2, 1, None), (2, 2, None)],
    4: [(1, 1, None), (1, 2, None), (1, 4, None), (1, 2, [3, 1]), (2, 2, None), (4, 1, None), (2, 4, None)],
}


def layouts(world: int, quantised: bool) -> list[dict[str, Any]]:
    """All allowed layouts of a world, with a tiny bucket and every way of splitting the batch that fits."""
    found = []
    for sequence, expert, counts in PLACEMENTS[world]:
        for zero in (0, 1, 2, 3):
            if counts is not None and zero > 1:
                continue
            if quantised and sequence > 1 and zero != 1:
                continue
            found.append(
                {
                    "parallel__sequence": sequence,
                    "parallel__expert": expert,
                    "parallel__experts_per_rank": counts,
                    "parallel__zero": zero,
                    "parallel__bucket": 3000,
                }
            )
    return found


# One flipped code weighs less where more tokens share the loss, and grows less where the rate is lower.
LARGER: dict[str, Any] = {
    "data__sequence_length": 64,
    "model__width": 64,
    "model__experts__hidden": 48,
    "optimizer__learning_rate": 5.0e-4,
    "training__batch": 16,
    "training__micro_batch": 4,
}


def train_all(world: int, sizes: dict[str, Any], shards: Path, folder: Path) -> dict[str, list[float]]:
    jobs, names = [], []
    for layout in layouts(world, sizes.get("model__quantise", True)):
        name = f"w{world}-" + "-".join(f"{key.split('__')[1]}{value}" for key, value in layout.items())
        path = write_config(folder / f"{name}.yaml", shards, folder / name, **sizes, **layout)
        jobs.append((str(path), "never", None))
        names.append(name)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    result = run(torchrun(world, "tests/sessions_worker.py", str(folder / "jobs.json")), timeout=600)
    assert result.code == 0, result.out
    return {name: read_losses(folder / name) for name in names}


@pytest.mark.parametrize(("sizes", "tolerance"), [({"model__quantise": False}, 1e-5), (LARGER, 1e-3)])
def test_loss_stream_is_the_same_for_every_layout(
    sizes: dict[str, Any], tolerance: float, shards: Path, tmp_path: Path
) -> None:
    streams: dict[str, list[float]] = {}
    for world in PLACEMENTS:
        (tmp_path / str(world)).mkdir()
        streams |= train_all(world, sizes, shards, tmp_path / str(world))
    reference = next(iter(streams.values()))
    assert len(streams) == (4 + 12 + 17 if sizes is LARGER else 4 + 18 + 26)
    assert len(reference) == STEPS
    assert reference[-1] < reference[0] - 0.1, "the model must learn for parity to mean anything"
    apart = {name: max(abs(a - b) for a, b in zip(stream, reference, strict=True)) for name, stream in streams.items()}
    print(json.dumps(apart, indent=1))
    assert max(apart.values()) <= tolerance, apart


def test_hybrid_layers_and_recomputed_activations_keep_parity(shards: Path, tmp_path: Path) -> None:
    """Attention among the retentions, and every way of keeping activations, over slices and expert groups."""
    hybrid = {"model__quantise": False, "model__layers": "RA"}
    cases: dict[int, list[dict[str, Any]]] = {
        1: [{}],
        2: [{"sequence": 2, "zero": 3}, {"sequence": 2, "expert": 2, "exchange": "ring"}],
        4: [
            {"sequence": 4, "expert": 2, "zero": 2, "exchange": "scan"},
            {"sequence": 2, "expert": 4, "zero": 3, "exchange": "allgather"},
        ],
    }
    streams: dict[str, list[float]] = {}
    for world, layouts_of_world in cases.items():
        jobs: list[tuple[str, str, None]] = []
        for number, layout in enumerate(layouts_of_world):
            for kept in ("keep", "recompute", "offload"):
                name = f"w{world}-{number}-{kept}"
                changes = {f"parallel__{key}": value for key, value in layout.items()}
                changes |= {"model__activations": kept, "parallel__bucket": 3000}
                path = write_config(tmp_path / f"{name}.yaml", shards, tmp_path / name, **hybrid, **changes)
                jobs.append((str(path), "never", None))
                streams[name] = []
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        result = run(torchrun(world, "tests/sessions_worker.py", str(tmp_path / "jobs.json")), timeout=600)
        assert result.code == 0, result.out
    streams = {name: read_losses(tmp_path / name) for name in streams}
    reference = streams["w1-0-keep"]
    assert len(reference) == STEPS
    apart = {name: max(abs(a - b) for a, b in zip(stream, reference, strict=True)) for name, stream in streams.items()}
    assert max(apart.values()) <= 1e-5, apart
