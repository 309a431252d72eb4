"""The instruments of ternary weights: by definition, in pieces, in every layout, and their pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kabrn_dist.checkpoint.store import load_tensor, read_manifest
from kabrn_dist.config import Config
from kabrn_dist.config.file import load_config
from kabrn_dist.data.corpus import open_corpus
from kabrn_dist.data.dataset import TokenDataset
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.metrics.activations import watch_saturation
from kabrn_dist.metrics.ternary import TernaryStats, weight_sums, weight_values
from kabrn_dist.model.mixkabrn import build_model
from kabrn_dist.ops.activation_quant import normalize_quantize
from kabrn_dist.ops.weight_quant import absmean_quantize
from kabrn_dist.plots.figure import to_pixels
from kabrn_dist.plots.ternary_figure import BINS, REACH, TernaryFigure, count_latents, make_ternary_figure
from kabrn_dist.plots.weights import draw_weights
from tests.support.runs import read_losses, run_sessions, write_small_config

NAMES = ("minus", "zero", "plus", "flips", "margin", "scale")


def measure_slowly(latents: list[Tensor], befores: list[Tensor]) -> dict[str, float]:
    """Of matrices [O,I] now and before, weight by weight."""
    found = dict.fromkeys(NAMES, 0.0)
    total = sum(latent.numel() for latent in latents)
    for latent, before in zip(latents, befores, strict=True):
        gamma, gamma_before = (sum(abs(w) for w in m.flatten().tolist()) / m.numel() for m in (latent, before))
        for w, old in zip(latent.flatten().tolist(), before.flatten().tolist(), strict=True):
            code = max(-1, min(1, round(w / gamma)))
            found[("minus", "zero", "plus")[code + 1]] += 1 / total
            found["flips"] += (code != max(-1, min(1, round(old / gamma_before)))) / total
            found["margin"] += abs(abs(w) - gamma / 2) / (gamma / 2) / total
            found["scale"] += gamma / total
    return found


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sums_are_those_of_the_definition() -> None:
    now, before = draw(3, 17, 29), draw(3, 17, 29, seed=1) * 0.3 + draw(3, 17, 29)
    codes, gamma = absmean_quantize(now)
    sums = weight_sums(now, codes, gamma, absmean_quantize(before)[0].to(torch.int8))
    slow = measure_slowly(list(now), list(before))
    assert {name: float(value) for name, value in sums.values().items()} == pytest.approx(slow, rel=1e-6)
    assert 0 < slow["flips"] < 1 and float(sums.total) == 3 * 17 * 29
    assert float(weight_sums(now, codes, gamma).flips) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_add_up_to_the_whole(dtype: torch.dtype) -> None:
    """Flat shards that end anywhere, with a scale a weight, as whole stacks with a scale a matrix."""
    now, before = draw(4, 8, 16).to(dtype), absmean_quantize(draw(4, 8, 16, seed=1))[0]
    codes, gamma = absmean_quantize(now)
    whole = weight_sums(now, codes, gamma, before)
    parts = [x.expand_as(now).flatten().split([100, 0, 37, 375]) for x in (now, codes, gamma, before)]
    added = [sum(each) for each in zip(*(weight_sums(*part) for part in zip(*parts, strict=True)), strict=True)]
    assert [float(x) for x in added] == pytest.approx([float(x) for x in whole], rel=1e-12)


def test_gaussian_latents_have_the_margin_and_the_zeros_of_the_docstring() -> None:
    latent = draw(1, 1000, 1000)
    values = weight_sums(latent, *absmean_quantize(latent)).values()
    assert float(values["margin"]) == pytest.approx(1.31, abs=0.01)
    assert float(values["zero"]) == pytest.approx(0.311, abs=0.002)
    assert float(values["scale"]) == pytest.approx(math.sqrt(2 / math.pi), abs=0.002)
    assert float((latent.abs() / (absmean_quantize(latent)[1] / 2)).mean()) == pytest.approx(2, abs=1e-4)


def test_values_by_name() -> None:
    sums = TernaryStats(*torch.tensor([[4.0, 8], [1, 0], [2, 4], [1, 4], [1, 0], [5, 8], [2, 16]]).double())
    values = weight_values(sums)
    assert values["ternary/zero/layer_0"] == 0.5 and values["ternary/plus/layer_1"] == 0.5
    assert values["ternary/flips/layer_0"] == 0.25 and values["ternary/margin/layer_0"] == 1.25
    assert values["ternary/scale/layer_1"] == 2.0 and len(values) == 12
    assert weight_values(None) == {}


LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [
        {"expert_parallel": 2, "zero_stage": 0},
        {"expert_parallel": 2, "zero_stage": 1, "experts_per_rank": [1, 3]},
        {"sequence_parallel": 2, "zero_stage": 2},
        {"expert_parallel": 2, "sequence_parallel": 2, "zero_stage": 3},
    ],
    4: [
        {"expert_parallel": 2, "zero_stage": 2},
        {"expert_parallel": 2, "sequence_parallel": 2, "zero_stage": 3, "experts_per_rank": [3, 1]},
    ],
}


LOGGED = [f"ternary/{name}/layer_{layer}" for name in NAMES for layer in (0, 1)]


def test_every_layout_counts_each_weight_once(shards: Path, tmp_path: Path) -> None:
    """What is logged is what its own checkpoints' whole tensors say, and the same as on one process."""
    runs: list[Path] = []
    for world, layouts in LAYOUTS.items():
        jobs: list[list[object]] = []
        for number, layout in enumerate(layouts):
            folder = tmp_path / f"w{world}-{number}"
            changes = {f"parallel__{key}": value for key, value in layout.items()} | {
                "model__layers": 2,
                "model__experts__num_dense_layers": 1,
                "training__steps": 2,
                "training__micro_batch_size": 1,
                "checkpoint__save_interval": 1,
            }
            jobs.append(
                [str(write_small_config(tmp_path / f"{folder.name}.yaml", shards, folder, **changes)), "never", None]
            )
            runs.append(folder)
        run_sessions(world, jobs, tmp_path)
    first = {name: read_losses(runs[0], name) for name in LOGGED}
    for folder in runs:
        found = {name: read_losses(folder, name) for name in LOGGED}
        for layer in (0, 1):
            now, before = (read_matrices(folder, step, layer) for step in (2, 1))
            slow = measure_slowly(now, before)
            for name in NAMES:
                assert found[f"ternary/{name}/layer_{layer}"][1] == pytest.approx(slow[name], rel=1e-5, abs=1e-4), name
        for name, values in found.items():
            # A latent within rounding of its threshold may fall on either side.
            assert values == pytest.approx(first[name], rel=1e-3, abs=5e-4), (folder.name, name)
    assert min(first["ternary/flips/layer_1"]) > 0.001


def test_every_layout_has_the_same_saturation(shards: Path, tmp_path: Path) -> None:
    """Five rows: ranks without one of their own pass a copy that must not count. The rate leaves the weights alone."""
    names: list[str] = []
    for world, layouts in LAYOUTS.items():
        jobs: list[list[object]] = []
        for number, layout in enumerate(layouts):
            name = f"w{world}-{number}"
            changes = {f"parallel__{key}": value for key, value in layout.items()} | {
                "model__experts__num_dense_layers": 1,
                "optimizer__learning_rate": 1e-12,
                "training__steps": 1,
                "training__micro_batch_size": 1 + world % 2,
            }
            jobs.append(
                [str(write_small_config(tmp_path / f"{name}.yaml", shards, tmp_path / name, **changes)), "never", None]
            )
            names.append(name)
        run_sessions(world, jobs, tmp_path)
    keys = [f"ternary/saturation/layer_{layer}" for layer in (0, 1)]
    found = {name: [value for key in keys for value in read_losses(tmp_path / name, key)] for name in names}
    assert len(found["w1-0"]) == 2
    for name in names:
        assert found[name] == pytest.approx(found["w1-0"], rel=2e-3), name


def read_matrices(folder: Path, step: int, layer: int) -> list[Tensor]:
    """Every ternary matrix [O,I] of a layer, from the checkpoint's logical tensors."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    manifest = read_manifest(path)
    names = [
        name
        for name in sorted(manifest.tensors)
        if name.startswith(f"blocks.{layer}.") and name.endswith(("up/master", "down/master", "weight/master"))
    ]
    found = [load_tensor(path, manifest, name) for name in names if "router" not in name]
    return [matrix for tensor in found for matrix in tensor.view(-1, *tensor.shape[-2:])]


def test_measuring_changes_nothing(shards: Path, tmp_path: Path) -> None:
    """Logged steps gather weights between backward and update; the losses are those of a run that logs at the end."""
    jobs: list[list[object]] = []
    for zero in (0, 3):
        for every in (1, 100):
            name = f"z{zero}-{every}"
            layout = {"parallel__expert_parallel": 2, "parallel__zero_stage": zero, "training__log_interval": every}
            path = write_small_config(tmp_path / f"{name}.yaml", shards, tmp_path / name, training__steps=4, **layout)
            jobs.append([str(path), "never", None])
    run_sessions(2, jobs, tmp_path)
    for zero in (0, 3):
        often, rarely = (tmp_path / f"z{zero}-{every}" for every in (1, 100))
        for key in ("loss/total", "validation/loss", "ternary/flips/layer_1", "ternary/margin/layer_0"):
            assert read_losses(often, key)[-1:] == read_losses(rarely, key)


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Config:
    return load_config(write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", model__layers="RA"))


def test_saturation_by_hand(config: Config) -> None:
    """Each distinct input of a layer once, rows that do not count left out; the pass itself is untouched."""
    model = build_model(config, single_process_mesh())
    batch = TokenDataset(open_corpus(config.data), "validation", 32, 3, ordered=False).get([0, 1, 2])
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    def keep(layer: int, values: Callable[[Any], Tensor]) -> Callable[..., None]:
        return lambda module, inputs: seen[layer].append(values(inputs[0]))

    for layer, block in enumerate(model.blocks):
        block.mixer.inputs.query.register_forward_pre_hook(keep(layer, lambda x: x.codes))
        block.mixer.output.out.register_forward_pre_hook(keep(layer, lambda x: x.codes))
        block.mixture.register_forward_pre_hook(keep(layer, lambda x: normalize_quantize(x).codes))
    with torch.no_grad():
        plain = model(batch).language
        for codes in seen.values():
            codes.clear()
        with watch_saturation(model) as saturation:
            saturation.rows = torch.tensor([True, False, True])
            assert model(batch).language.equal(plain)
        values = saturation.values(single_process_mesh())
        model(batch)
        assert saturation.values(single_process_mesh()) == values, "no hook is left"
    for layer, codes in seen.items():
        kept = [x[[0, 2]] for x in codes[:3]]
        ends = sum(int((x.abs() == 127).sum()) for x in kept)
        assert values[f"ternary/saturation/layer_{layer}"] == ends / sum(x.numel() for x in kept)
        assert ends / sum(x.numel() for x in kept) > 1 / 40


def test_nothing_ternary_has_no_instruments(shards: Path, tmp_path: Path) -> None:
    path = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", model__quantize=False, training__steps=2)
    run_sessions(1, [[str(path), "never", None]], tmp_path)
    assert "ternary/" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_portraits(config: Config) -> None:
    model = build_model(config, single_process_mesh())
    named = list(model.ternary_weights())
    assert [name for layer, name, *_ in named if layer == 1] == [
        *(f"mixer.inputs.{part}" for part in ("query", "key", "value", "gate")),
        "mixer.output.out",
        *(f"mixture.{kind}.{part}" for kind in ("routed", "shared") for part in ("up", "down")),
    ]
    _, name, weight, routed = next(entry for entry in named if entry[1] == "mixture.routed.up")
    codes, gamma = absmean_quantize(weight.detach())
    portrait = make_ternary_figure(name, tuple(weight.shape), weight.detach(), codes, gamma)
    assert routed and portrait.shape == (4, 24, 32) and portrait.codes.equal(codes[0])
    assert portrait.histogram.sum() == weight.numel()
    low, high = (round((REACH + threshold) * BINS / (2 * REACH)) for threshold in (-0.5, 0.5))
    counts = [int(part.sum()) for part in portrait.histogram.split([low, high - low, BINS - high])]
    assert counts == [int((codes == code).sum()) for code in (-1, 0, 1)]
    assert portrait.histogram.equal(sum(count_latents(w, g) for w, g in zip(weight, gamma, strict=True)))


def test_latents_beyond_the_histogram_are_in_its_outermost_bins() -> None:
    counts = count_latents(torch.tensor([-90.0, -4.1, 0.0, 3.99, 90.0]), torch.tensor(1.0))
    assert (counts[0], counts[BINS // 2], counts[-1], counts.sum()) == (2, 1, 2, 5)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_the_picture_shows_all_matrices_alike(count: int) -> None:
    latent = draw(2, 40, 20)
    codes, gamma = absmean_quantize(latent)
    portrait = TernaryFigure("mixture.routed.up", count_latents(latent, gamma), codes[0], (2, 40, 20))
    figure = draw_weights([portrait] * count, "layer 0, step 5")
    assert len(figure.axes) == 2 * count
    assert {axes.get_ylim() for axes in figure.axes[::2]} == {figure.axes[0].get_ylim()}
    shares = [text.get_text() for text in figure.axes[0].texts]
    assert shares == [f"{100 * float((codes == code).double().mean()):.1f} %" for code in (-1, 0, 1)]
    assert figure.axes[1].get_ylabel() == "expert 0: 40 outputs"
    assert to_pixels(figure).shape[0] > 300
