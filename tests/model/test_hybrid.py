"""Whole models with retention and attention: decoding equals training's forward pass, and no collective runs twice."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kabrn_dist.config import ExpertsConfig, ModelConfig, RetentionConfig
from kabrn_dist.data.dataset import Batch, sequence_slice
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.launch_env import LaunchEnv, free_port
from kabrn_dist.distributed.mesh import make_mesh, single_process_mesh
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.model.mixkabrn import MixKABRN

COLLECTIVES = ("batch_isend_irecv", "all_gather", "all_reduce", "all_to_all_single")


def settings(layers: str, kept: str = "keep", convolution: int = 3) -> ModelConfig:
    retention = RetentionConfig(num_heads=2, key_dim=4, value_dim=6, decay=(1.5, 7.0), chunk_size=8)
    experts = ExpertsConfig(num_experts=4, top_k=2, expert_hidden_size=8, function_groups=2)
    return ModelConfig(
        vocab_size=11,
        hidden_size=8,
        layers=layers,
        short_conv_size=convolution and convolution + 1,
        retention=retention,
        experts=experts,
        quantize=False,
        activation_checkpointing=kept,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("layers", ["A", "RA", "ARRA"])
@pytest.mark.parametrize("pieces", [[40], [1] * 40, [17, 1, 22]])
@pytest.mark.parametrize("convolution", [0, 3])
def test_reading_in_pieces_is_one_pass(layers: str, pieces: list[int], convolution: int) -> None:
    model = MixKABRN(settings(layers, convolution=convolution), ExpertPlacement.single(4), single_process_mesh())
    model.initialize(1)
    for name, weight in model.named_parameters():
        if "convolution" in name:
            # At the zeros it starts with it would do nothing.
            weight.data.normal_()
    tokens = torch.randint(0, 11, (1, 40), generator=torch.Generator().manual_seed(2))
    documents, positions = torch.zeros_like(tokens), torch.arange(40)[None]
    whole, _ = model.decode(tokens, documents, positions, None)
    states: list[Any] | None = None
    for start, stop in zip([sum(pieces[:i]) for i in range(len(pieces))], torch.tensor(pieces).cumsum(0), strict=True):
        here = slice(start, int(stop))
        logits, states = model.decode(tokens[:, here], documents[:, here], positions[:, here], states)
    torch.testing.assert_close(logits, whole, atol=2e-5, rtol=0)


def count_collectives(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    place = LaunchEnv(rank, 2, rank, 2)

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    counts: Counter[str] = Counter()

    def counted(name: str, call: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return call(*arguments, **options)

        return wrapper

    for name in COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name)))
    with init_distributed(place) as device:
        mesh = make_mesh(place, device, expert_parallel=2, sequence_parallel=2)
        tokens = torch.randint(0, 11, (1, 16), generator=torch.Generator().manual_seed(3))
        whole = Batch(
            tokens, tokens.roll(-1, 1), torch.zeros_like(tokens), torch.arange(16)[None], torch.zeros_like(tokens[:, 0])
        )
        batch = sequence_slice(whole, mesh.sequence_rank, 2)
        found = []
        for kept in ("keep", "recompute", "offload"):
            model = MixKABRN(settings("RRA", kept), ExpertPlacement((2, 2), mesh.expert_rank), mesh)
            model.initialize(1)
            counts.clear()
            model(batch).language.backward()
            found.append(dict(counts))
        exchanges = "forward and backward: one a retention, and two convolutions a layer"
        assert found[0]["batch_isend_irecv"] == 2 * (2 + 6), exchanges
        assert found[1] == found[0] and found[2] == found[0], found


def test_no_collective_runs_twice_under_activation_checkpointing() -> None:
    mp.spawn(count_collectives, (free_port(),), nprocs=2)
