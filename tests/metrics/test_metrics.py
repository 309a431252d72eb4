"""What a run says of itself: the figures of a mixture, log.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kabrn_dist.metrics.logger import MetricsLogger
from kabrn_dist.metrics.moe import MoEStepStats, expert_lists, expert_values, measure_balance
from kabrn_dist.plots.experts import draw_load

LOAD = torch.tensor([[6.0, 2.0, 4.0, 0.0], [3.0, 3.0, 3.0, 3.0]])


def watch(dropped: tuple[float, float] = (0.0, 0.0), traffic: torch.Tensor | None = None) -> MoEStepStats:
    bias = torch.tensor([[0.25, -0.5, 0.0, 0.25], [0.0, 0.0, 0.0, 0.0]])
    return MoEStepStats((1, 3), 6, LOAD, torch.tensor([9.0, 6.0]), torch.tensor(dropped), bias, traffic)


def test_balance_by_hand() -> None:
    balance = measure_balance(LOAD)
    assert balance.most.tolist() == [2.0, 1.0] and balance.least.tolist() == [0.0, 1.0]
    assert balance.violation.tolist() == [1.0, 0.0]
    assert balance.variation.tolist() == pytest.approx([math.sqrt(5) / 3, 0.0])
    assert balance.dead.tolist() == [1, 0] and balance.underused.tolist() == [1, 0]
    nearly = measure_balance(torch.tensor([1.0, 20.0, 20.0]))
    assert (nearly.dead.item(), nearly.underused.item()) == (0, 1)


def test_a_layer_without_a_copy_is_no_nan() -> None:
    balance = measure_balance(torch.zeros(1, 4))
    assert all(part.isfinite().all() for part in balance) and balance.dead.tolist() == [4]


def test_values_carry_the_layers_own_numbers() -> None:
    values = expert_values(watch())
    assert values["experts/load_max/layer_1"] == 2.0 and values["experts/load_min/layer_3"] == 1.0
    assert values["experts/maxvio/layer_1"] == 1.0 and values["experts/dead/layer_1"] == 1
    assert values["experts/router_entropy/layer_1"] == 1.5 and values["experts/bias_range/layer_1"] == 0.75
    assert {name.rsplit("/", 1)[1] for name in values} == {"layer_1", "layer_3"}


def test_scalars_do_not_grow_with_the_experts_and_drops_show_only_when_there_are_any() -> None:
    assert len(expert_values(watch())) == 2 * 6
    values = expert_values(watch(dropped=(3.0, 0.0)))
    assert values["experts/dropped/layer_1"] == 0.25 and values["experts/dropped/layer_3"] == 0.0


def test_lists_are_whole_loads_and_each_ranks_traffic() -> None:
    assert expert_lists(watch()) == {"experts/layers": [1, 3], "experts/load": [[6, 2, 4, 0], [3, 3, 3, 3]]}
    traffic = torch.tensor([[[7.0, 1000.0, 0.5], [5.0, 900.0, 0.25]]], dtype=torch.float64)
    lists = expert_lists(watch(traffic=traffic))
    assert lists["experts/copies"] == [[7, 5]] and lists["experts/bytes"] == [[1000, 900]]
    assert lists["experts/seconds"] == [[0.5, 0.25]]


def test_lists_go_to_the_log_only_and_the_picture_to_tensorboard_only(tmp_path: Path) -> None:
    metrics = MetricsLogger(tmp_path, True, 0, 10)
    metrics.write(5, expert_values(watch()), "step 5", expert_lists(watch()))
    metrics.write_figure(5, "experts/load", lambda: draw_load(LOAD, (1, 3), 5))
    metrics.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["step"] == 5 and entry["experts/load"] == [[6, 2, 4, 0], [3, 3, 3, 3]]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(expert_values(watch()))
    (image,) = board.Images("experts/load")
    assert image.step == 5 and image.encoded_image_string.startswith(b"\x89PNG") and image.width > 300


def test_other_ranks_write_and_draw_nothing(tmp_path: Path) -> None:
    def refuse() -> Figure:
        raise AssertionError("drawn where nothing is written")

    metrics = MetricsLogger(tmp_path / "run", False, 0, 10)
    metrics.write(5, {"loss/total": 1.0}, "step 5", {"experts/layers": [0]})
    metrics.write_figure(5, "experts/load", refuse)
    metrics.close()
    assert not (tmp_path / "run").exists()
