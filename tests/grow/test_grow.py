"""Growing: the loss is unchanged where that is promised, any world grows alike, and what cannot grow is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from kabrn_dist.checkpoint.store import load_tensor, read_manifest
from kabrn_dist.cli.main import main
from kabrn_dist.config import ExpertsConfig
from kabrn_dist.config.file import load_config
from kabrn_dist.data.corpus import open_folder_corpus
from kabrn_dist.data.dataset import TokenDataset
from kabrn_dist.grow.describe import describe_growth
from kabrn_dist.grow.plan import make_growth_plan
from kabrn_dist.grow.run import grow, plan_growth
from kabrn_dist.grow.tensors import GridRefinement, SymmetryBreaking, TensorMapping, refine_part, write_part
from kabrn_dist.inference.run import Run
from kabrn_dist.model.experts.base import ExpertSpec
from kabrn_dist.model.experts.registry import EXPERT_TYPES
from kabrn_dist.ops.grids import knot_insertion_matrix
from kabrn_dist.utils.errors import UserError
from tests.support.runs import read_losses, run_launch_script, run_sessions, write_small_config

SHORT: dict[str, Any] = {"training__steps": 4, "training__micro_batch_size": 4}
PLAIN: dict[str, Any] = {**SHORT, "model__quantize": False}
# Name → a trained run. The dense ones have one mixture or none.
SOURCES: dict[str, dict[str, Any]] = {
    "dense": {**PLAIN, "model__experts__num_dense_layers": 2, "model__experts__dense_hidden_size": 24},
    "half": {
        **PLAIN,
        "model__experts__num_dense_layers": 1,
        "model__experts__dense_hidden_size": 24,
        "model__experts__type": "hat",
        "model__experts__num_shared_experts": 0,
        "model__experts__grid_size": 3,
    },
    "ternary": {**SHORT, "model__experts__num_dense_layers": 2, "model__experts__dense_hidden_size": 24},
    "mixture": PLAIN,
    "softmax": {**PLAIN, "model__router__score_func": "softmax", "model__router__norm_topk_prob": False},
    "one": {**PLAIN, "model__experts__top_k": 1, "model__experts__type": "swiglu", "model__short_conv_size": 3},
    "limited": {
        **PLAIN,
        "model__experts__num_experts": 6,
        "model__experts__num_shared_experts": 0,
        "model__router__n_group": 3,
        "model__router__topk_group": 2,
    },
    "bspline": {**PLAIN, "model__experts__type": "bspline", "model__experts__grid_size": 3},
}
TWICE_ALL = {"model__experts__num_experts": 8, "model__experts__top_k": 4}
TWICE_ONE = {"model__experts__num_experts": 8, "model__router__n_group": 2, "model__router__topk_group": 1}
# Name → source, changes. The loss of each is promised to be unchanged.
GROWN: dict[str, tuple[str, dict[str, Any]]] = {
    "same": ("mixture", {}),
    "upcycled": ("dense", {"model__experts__num_dense_layers": 0, "model__experts__num_shared_experts": 0}),
    "upcycled-above": ("dense", {"model__experts__num_dense_layers": 1, "model__experts__num_shared_experts": 0}),
    "upcycled-beside-shared": (
        "dense",
        {"model__experts__num_dense_layers": 0, "model__experts__num_shared_experts": 2},
    ),
    "upcycled-softmax": ("dense", {"model__experts__num_dense_layers": 0, "model__router__score_func": "softmax"}),
    "upcycled-ternary": ("ternary", {"model__experts__num_dense_layers": 0}),
    "all-copies": ("mixture", TWICE_ALL),
    "one-copy": ("mixture", TWICE_ONE),
    "thrice": ("mixture", {"model__experts__num_experts": 12, "model__experts__top_k": 6}),
    "softmax": ("softmax", TWICE_ALL),
    "top-1": ("one", {"model__experts__num_experts": 8}),
    "groups": (
        "limited",
        {
            "model__experts__num_experts": 12,
            "model__experts__top_k": 4,
            "model__router__n_group": 6,
            "model__router__topk_group": 4,
        },
    ),
    "finer-bspline": ("bspline", {"model__experts__grid_size": 6}),
    "all-at-once": ("half", {**TWICE_ALL, "model__experts__num_dense_layers": 0, "model__experts__grid_size": 9}),
}


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all SOURCES, trained in one process."""
    folder = tmp_path_factory.mktemp("sources")
    paths = {
        name: write_small_config(folder / f"{name}.yaml", shards, folder / name, **changes)
        for name, changes in SOURCES.items()
    }
    run_sessions(1, [[str(path), "never", None] for path in paths.values()], folder)
    return folder


def configure(trained: Path, shards: Path, folder: Path, source: str, changes: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    return write_small_config(folder / "grown.yaml", shards, folder / "grown", **(SOURCES[source] | changes))


def load(path: Path, name: str) -> Tensor:
    return load_tensor(path, read_manifest(path), name)


def score(folder: Path, shards: Path) -> Tensor:
    """Mean loss of a few validation sequences in nats, of the run's newest checkpoint."""
    model = Run.open(folder).model()
    batch = TokenDataset(open_folder_corpus(shards), "validation", 32, 3, ordered=False).get(range(16))
    with torch.no_grad():
        return model(batch).language / batch.targets.numel()


@pytest.mark.parametrize("name", GROWN)
def test_the_loss_is_unchanged_where_that_is_promised(name: str, trained: Path, shards: Path, tmp_path: Path) -> None:
    source, changes = GROWN[name]
    config = load_config(configure(trained, shards, tmp_path, source, changes))
    plan = make_growth_plan(load_config(trained / f"{source}.yaml").model, config.model)
    assert plan.disturbances(0.0, 0.0) == []
    path = grow(trained / source, config, noise=0.0)
    before, after = score(trained / source, shards), score(config.run.folder, shards)
    assert abs(before - after) < 1e-6, (before, after)
    state = read_manifest(path).state
    assert (state["step"], state["updates"]) == (0, 4)
    assert not (config.run.folder / "growing").exists()


def test_noise_moves_the_loss_a_little_and_redrawing_more(trained: Path, shards: Path, tmp_path: Path) -> None:
    before, after = score(trained / "mixture", shards), []
    for noise, redraw in ((None, 0.0), (0.0, 0.5)):
        config = load_config(configure(trained, shards, tmp_path / f"{redraw}", "mixture", TWICE_ALL))
        grow(trained / "mixture", config, noise, redraw)
        after.append(float(abs(score(config.run.folder, shards) - before)))
    assert 0 < after[0] < 1e-3 < after[1] < 0.5


def test_copies_share_their_moments_and_router(trained: Path, shards: Path, tmp_path: Path) -> None:
    config = load_config(configure(trained, shards, tmp_path, "mixture", TWICE_ONE))
    new = grow(trained / "mixture", config)
    old = trained / "mixture" / "checkpoints" / "step-00000004"
    for name in ("routed.up", "routed.outer_numerator", "router.weight"):
        first, second = (f"blocks.1.mixture.{name}/{part}" for part in ("exp_avg", "exp_avg_sq"))
        assert torch.equal(load(new, first), load(old, first).repeat(2, *[1] * (load(old, first).ndim - 1)) / 2)
        assert torch.equal(load(new, second)[:4], load(new, second)[4:])
        assert torch.equal(load(new, second)[:4], load(old, second) / 2)
    assert torch.equal(load(new, "router/bias"), load(old, "router/bias").repeat(1, 2))
    assert load(new, "router/share").sum(1).tolist() == pytest.approx([1, 1])
    up = load(new, "blocks.1.mixture.routed.up/master")
    noise = (up[:4] - up[4:]).std() / up.std()
    assert 0.7 < noise / (0.01 * 2**0.5) < 1.4
    assert torch.equal(load(new, "embedding.weight/exp_avg"), load(old, "embedding.weight/exp_avg"))


def test_two_processes_grow_alike_and_train_on(trained: Path, shards: Path, tmp_path: Path) -> None:
    start, changes = (
        str(trained / "dense"),
        {"model__experts__num_dense_layers": 0, "training__steps": 8, "checkpoint__keep_last": 9},
    )
    alone = configure(trained, shards, tmp_path / "alone", "dense", changes)
    result = run_launch_script("grow", "--from", start, "--config", str(alone), "--redraw", "0.0")
    assert result.exit_code == 0 and "loss at the start: unchanged" in result.output, result.output
    more = {"run__init_from": start, "parallel__expert_parallel": 2, "parallel__zero_stage": 2}
    pair = configure(trained, shards, tmp_path / "pair", "dense", changes | more)
    run_sessions(1, [[str(alone), "must", None]], tmp_path / "alone")
    run_sessions(2, [[str(pair), "auto", 5], [str(pair), "auto", None]], tmp_path / "pair")
    one, two = (read_losses(tmp_path / name / "grown") for name in ("alone", "pair"))
    assert len(one) == 8 and two == pytest.approx(one, abs=1e-5)
    starts = [tmp_path / name / "grown" / "checkpoints" / "step-00000000" for name in ("alone", "pair")]
    tensors = read_manifest(starts[0]).tensors
    assert tensors.keys() == read_manifest(starts[1]).tensors.keys()
    assert all(torch.equal(load(starts[0], name), load(starts[1], name)) for name in tensors)
    # It goes on from what was learnt: a fresh model starts at log 257.
    assert one[0] < read_losses(trained / "dense")[0] - 0.1


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "mixture",
        {"model__hidden_size": 48},
        "model.hidden_size is 32 in the run to start from and 48 here; .* set it to 32",
    ),
    ("mixture", {"model__experts__expert_hidden_size": 48}, "model.experts.expert_hidden_size is 24 .* 48"),
    (
        "one",
        {"model__short_conv_size": 4},
        "model.short_conv_size is 3 in the run to start from and 4 here; .* set it to 3",
    ),
    ("mixture", {"model__experts__num_experts": 6}, "num_experts is 4 .* 6 here.* set it to 4, 8, 12"),
    (
        "mixture",
        {"model__experts__num_experts": 8},
        "top_k 2 → 2.* do not add up.*top_k 4 .*, or top_k 2 with router.n_group 2",
    ),
    ("mixture", {"model__experts__num_dense_layers": 1}, "layers 0 had a mixture .* set them back to 1 and 0"),
    ("mixture", {"model__experts__num_shared_experts": 2}, "model.experts.num_shared_experts is 1 .* 2 here"),
    (
        "softmax",
        TWICE_ONE,
        "do not add up .*; use model.experts.top_k 4 with no group limit .a token visits all copies.$",
    ),
    (
        "limited",
        {"model__experts__num_experts": 12, "model__experts__top_k": 4},
        "use model.experts.top_k 4 with n_group 6 and topk_group 4",
    ),
    (
        "dense",
        {"model__experts__num_dense_layers": 0, "model__experts__expert_hidden_size": 48},
        "expert_hidden_size 48 is not the .* 24",
    ),
    ("dense", {"model__experts__num_dense_layers": 0, "model__router__norm_topk_prob": False}, "norm_topk_prob false"),
    ("dense", {"model__experts__dense_hidden_size": 48}, "model.experts.dense_hidden_size is 24 .* 48 here"),
    ("bspline", {"model__experts__grid_size": 4}, "model.experts.grid_size is 3 .* set it to 3, 6, 9"),
    ("bspline", {"model__experts__grid_size": 6, "model__experts__spline_order": 2}, "model.experts.spline_order is 3"),
]


@pytest.mark.parametrize(("source", "changes", "message"), REFUSED)
def test_what_cannot_grow_is_refused(
    source: str, changes: dict[str, Any], message: str, trained: Path, shards: Path, tmp_path: Path
) -> None:
    config = load_config(configure(trained, shards, tmp_path, source, changes))
    with pytest.raises(UserError, match=message):
        grow(trained / source, config)
    assert not config.run.folder.exists()


def test_a_run_that_has_begun_is_not_grown_over(trained: Path, shards: Path, tmp_path: Path) -> None:
    config = load_config(configure(trained, shards, tmp_path, "mixture", {}))
    with pytest.raises(UserError, match=r"redraw 2 is not a fraction .* such as 0.5"):
        grow(trained / "mixture", config, redraw=2)
    with pytest.raises(UserError, match="no intact checkpoint"):
        grow(tmp_path, config)
    grow(trained / "mixture", config)
    with pytest.raises(UserError, match="has begun already"):
        grow(trained / "mixture", config)


def test_the_command_takes_the_vocabulary_of_the_shards_where_it_is_left_out(
    trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configure(trained, shards, tmp_path, "mixture", TWICE_ALL)
    tree = yaml.safe_load(path.read_text())
    expected = tree["model"].pop("vocab_size")
    path.write_text(yaml.safe_dump(tree))
    assert main(["grow", str(trained / "mixture"), str(path)]) == 0, capsys.readouterr().err
    assert load_config(tmp_path / "grown" / "config.yaml").model.vocab_size == expected


def test_the_table_says_what_becomes_of_each_tensor(trained: Path, shards: Path, tmp_path: Path) -> None:
    changes = GROWN["all-at-once"][1] | {"model__experts__num_shared_experts": 0}
    config = load_config(configure(trained, shards, tmp_path, "half", changes))
    table = describe_growth(plan_growth(trained / "half", config), None, 0.0).splitlines()
    rows = {" ".join(line.split()) for line in table}
    assert "mixture.routed.inner_spline 0 1×24×128 8×24×320 8 copies of the dense layer's, grid 3 → 9" in rows
    assert "mixture.routed.inner_spline 1 4×24×128 8×24×320 2 copies of each, grid 3 → 9" in rows
    assert "mixture.router.weight 0 8×32 newly initialized" in rows
    assert "head.weight 257×32 257×32 unchanged" in rows
    assert table[-1] == "loss at the start: changed by noise of 0.01 on the copies"
    assert not config.run.folder.exists()


def test_a_difference_without_shapes_is_named_and_silent_ones_are_not(trained: Path) -> None:
    old = load_config(trained / "mixture.yaml").model
    new = old.model_copy(
        update={
            "quantize": True,
            "experts": old.experts.model_copy(update={"top_k": 3}),
            "router": old.router.model_copy(update={"z_loss_weight": 0.5}),
        }
    )
    plan = make_growth_plan(old, new)
    assert plan.changes == ("model.experts.top_k 2 → 3", "model.quantize False → True")
    assert len(plan.disturbances(0.1, 0.5)) == 2


def test_redrawn_units_are_the_same_in_all_matrices_of_a_copy() -> None:
    breaking = SymmetryBreaking(0.0, 0.5, seed=1)
    up, down = torch.randn(1, 6, 4), torch.randn(1, 4, 6 * 3)
    touched = []
    for leaf, old in (("up", up), ("down", down)):
        shape = (2, *old.shape[1:])
        mapping = TensorMapping(
            f"routed.{leaf}", shape, "shared", "", copies=2, hidden_size=6, is_output=leaf == "down"
        )
        new, moment = torch.empty(shape), torch.empty(shape)
        write_part(new, old, mapping, "master", breaking)
        write_part(moment, torch.ones_like(old), mapping, "exp_avg", breaking)
        rows = (new != old) if leaf == "up" else (new != old).unflatten(-1, (6, 3)).transpose(1, 2).flatten(2)
        assert torch.equal(rows.any(-1), rows.all(-1))
        assert torch.equal(new != old, moment == 0)
        touched.append(rows.any(-1))
    assert torch.equal(*touched) and touched[0].sum(1).tolist() == [3, 3]
    assert not torch.equal(touched[0][0], touched[0][1])


@pytest.mark.parametrize(("grid", "finer", "degree"), [(3, 6, 1), (5, 10, 3), (4, 12, 2), (2, 10, 3)])
def test_moments_of_a_finer_grid_make_no_longer_steps(grid: int, finer: int, degree: int) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(200, 1, generator=generator)
    mean = torch.randn(200, 2 * (grid + degree), generator=generator) * spread
    square = mean.square() * (1 + torch.rand(mean.shape, generator=generator))
    refined = [
        refine_part(values, GridRefinement(grid, finer, degree), part)
        for values, part in ((mean, "exp_avg"), (square, "exp_avg_sq"))
    ]
    assert (refined[1] > 0).all()
    assert (refined[0] / refined[1].sqrt()).abs().max() <= 1.0
    ones = refine_part(torch.ones(1, grid + degree), GridRefinement(grid, finer, degree), "master")
    assert torch.allclose(ones, torch.ones_like(ones), atol=1e-12)
    assert knot_insertion_matrix(grid, finer, degree).shape == (finer + degree, grid + degree)


def test_every_form_names_the_matrices_that_read_hidden_units() -> None:
    for name, form in EXPERT_TYPES.items():
        config = ExpertsConfig(type=name, num_experts=2, top_k=1, expert_hidden_size=24)
        experts = form(ExpertSpec(8, 24, config, range(1)))
        assert experts.matrix_specs.keys() == experts.stds.keys()
        for leaf, matrix in experts.matrix_specs.items():
            rows, columns = experts.get_parameter(leaf).shape[1:]
            assert (rows, columns % 24) == (8, 0) if matrix.reads_hidden else rows == 24, (name, leaf)
