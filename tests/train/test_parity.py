"""Losses, gradients and weights agree for every layout (docs/architecture.md): world × sequence × expert × ZeRO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from kabrn_dist.checkpoint.store import load_tensor, read_manifest
from tests.support.runs import check_ternary_losses, read_losses, run_sessions, write_small_config

STEPS = 10
# World size → (sequence parallelism, expert parallelism, experts per rank).
PLACEMENTS: dict[int, list[tuple[int, int, list[int] | None]]] = {
    1: [(1, 1, None)],
    2: [(1, 1, None), (1, 2, None), (1, 2, [1, 3]), (2, 1, None), (2, 2, None)],
    4: [(1, 1, None), (1, 2, None), (1, 4, None), (1, 2, [3, 1]), (2, 2, None), (4, 1, None), (2, 4, None)],
}


def layouts(world: int, quantized: bool) -> list[dict[str, Any]]:
    """Every placement of a world, in tiny buckets; quantised, with one ZeRO stage each in turn.

    Otherwise with every stage, but four processes with stage 3 and another in turn: they take most of the time.
    """
    found = []
    for number, (sequence, expert, counts) in enumerate(PLACEMENTS[world]):
        stages = (number % 3, 3) if world == 4 else (0, 1, 2, 3)
        for zero in (number % 4,) if quantized else stages:
            layout = {
                "parallel__sequence_parallel": sequence,
                "parallel__expert_parallel": expert,
                "parallel__experts_per_rank": counts,
                "parallel__zero_stage": zero,
                "parallel__bucket_size": 3000,
            }
            if counts is not None and not quantized:
                # Gradients add up over several micro-batches in each world.
                layout["training__micro_batch_size"] = 1
            found.append(layout)
    return found


# One flipped code weighs less where more tokens share the loss, and grows less where the rate is lower.
LARGER: dict[str, Any] = {
    "data__sequence_length": 64,
    "model__hidden_size": 64,
    "model__experts__expert_hidden_size": 48,
    "optimizer__learning_rate": 3.0e-4,
    # A bias moves by the sign of its load: where one token more decides that, a larger rate is a larger jump.
    "model__router__bias_update_rate": 1.0e-3,
    "training__global_batch_size": 16,
    "training__micro_batch_size": 4,
}


def train_all(world: int, sizes: dict[str, Any], shards: Path, folder: Path) -> list[Path]:
    """Folders of the runs of all layouts."""
    folder.mkdir()
    jobs: list[list[object]] = []
    runs = []
    for layout in layouts(world, sizes.get("model__quantize", True)):
        name = f"w{world}-" + "-".join(f"{key.split('__')[1]}{value}" for key, value in layout.items())
        path = write_small_config(folder / f"{name}.yaml", shards, folder / name, **sizes, **layout)
        jobs.append([str(path), "never", None])
        runs.append(folder / name)
    run_sessions(world, jobs, folder, timeout=900)
    return runs


def read_checkpoint(folder: Path, step: int) -> dict[str, Tensor]:
    """Every logical tensor: masters, both moments, routers' states."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    manifest = read_manifest(path)
    return {name: load_tensor(path, manifest, name) for name in manifest.tensors}


def farthest(tensors: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest difference of an element, as a share of its tensor's largest."""
    assert set(tensors) == set(reference)
    return max(
        float((tensors[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-30))
        for name, tensor in reference.items()
    )


def losses_apart(runs: list[Path], steps: int = STEPS) -> dict[str, float]:
    """How far each run's losses are from the first one's, by name."""
    reference = read_losses(runs[0])
    assert len(reference) == steps
    assert reference[-1] < reference[0] - 0.1, "the model must learn for parity to mean anything"
    return {
        folder.name: max(abs(a - b) for a, b in zip(read_losses(folder), reference, strict=True)) for folder in runs
    }


def test_every_layout_has_the_same_losses_gradients_and_weights(shards: Path, tmp_path: Path) -> None:
    """After the first step the first moment is a tenth of the clipped gradient, gathered here from all ranks."""
    steps = 5
    sizes = {
        "model__quantize": False,
        "training__steps": steps,
        "checkpoint__save_interval": 1,
        "checkpoint__keep_last": steps,
    }
    runs = [folder for world in PLACEMENTS for folder in train_all(world, sizes, shards, tmp_path / str(world))]
    assert len(runs) == 4 + 20 + 14
    losses = losses_apart(runs, steps)
    print(json.dumps(losses, indent=1))
    assert max(losses.values()) <= 1e-5, losses
    # Of small products MKL sums some otherwise on AVX-512: moments of 4e-4 then differ by 6e-9.
    for step, tolerance in ((1, 3e-5), (steps, 2e-3)):
        reference = read_checkpoint(runs[0], step)
        assert any(name.endswith("/exp_avg") and tensor.any() for name, tensor in reference.items())
        apart = {folder.name: farthest(read_checkpoint(folder, step), reference) for folder in runs}
        print(step, json.dumps(apart, indent=1))
        assert max(apart.values()) <= tolerance, (step, apart)


def test_every_placement_has_the_same_losses_quantized(shards: Path, tmp_path: Path) -> None:
    runs = [folder for world in PLACEMENTS for folder in train_all(world, LARGER, shards, tmp_path / str(world))]
    losses_apart(runs)
    for folder in runs:
        check_ternary_losses(read_losses(folder), read_losses(runs[0]), folder.name)


def test_hybrid_layers_and_recomputed_activations_keep_parity(shards: Path, tmp_path: Path) -> None:
    """Attention among the retentions, convolutions before both, and activations computed again, over slices and even
    and uneven expert groups."""
    hybrid = {
        "model__quantize": False,
        "model__layers": "RA",
        "model__short_conv_size": 4,
        "parallel__bucket_size": 3000,
    }
    cases: dict[int, list[dict[str, Any]]] = {
        1: [{}],
        2: [
            {"sequence_parallel": 2, "zero_stage": 3},
            {
                "sequence_parallel": 2,
                "expert_parallel": 2,
                "experts_per_rank": [3, 1],
                "zero_stage": 2,
                "state_exchange": "ring",
            },
        ],
        4: [
            {
                "sequence_parallel": 4,
                "expert_parallel": 2,
                "experts_per_rank": [1, 3],
                "zero_stage": 2,
                "state_exchange": "scan",
            },
            {
                "sequence_parallel": 2,
                "expert_parallel": 2,
                "experts_per_rank": [1, 3],
                "zero_stage": 3,
                "state_exchange": "allgather",
            },
            {"sequence_parallel": 2, "expert_parallel": 4, "zero_stage": 1},
        ],
    }
    runs: list[Path] = []
    for world, layouts_of_world in cases.items():
        jobs: list[list[object]] = []
        for number, layout in enumerate(layouts_of_world):
            for kept in ("keep", "recompute", "offload") if world == 1 else ("recompute", "offload"):
                name = f"w{world}-{number}-{kept}"
                changes = {f"parallel__{key}": value for key, value in layout.items()}
                path = write_small_config(
                    tmp_path / f"{name}.yaml",
                    shards,
                    tmp_path / name,
                    **hybrid,
                    **changes,
                    model__activation_checkpointing=kept,
                )
                jobs.append([str(path), "never", None])
                runs.append(tmp_path / name)
        run_sessions(world, jobs, tmp_path, timeout=900)
    losses = losses_apart(runs)
    assert max(losses.values()) <= 1e-5, losses
