"""Reading a run: experts' loads, learned functions and their names, from a real run of two processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import yaml
from torch import Tensor

from kabrn_dist.analysis.elementary import write_formula
from kabrn_dist.analysis.function_inputs import measure_reach
from kabrn_dist.analysis.log import read_expert_log
from kabrn_dist.analysis.networks import list_networks
from kabrn_dist.analysis.symbolic import fit_symbolic
from kabrn_dist.analysis.weights import measure_matrices
from kabrn_dist.config import Config
from kabrn_dist.data.corpus import open_corpus
from kabrn_dist.data.dataset import Batch, TokenDataset
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.inference.load import load_weights
from kabrn_dist.inference.run import Run
from kabrn_dist.model.mixkabrn import BatchStats, MixKABRN, build_model
from kabrn_dist.model.moe import MixtureOfExperts
from kabrn_dist.ops.activation_quant import Quantized, normalize_quantize
from kabrn_dist.ops.weight_quant import absmean_quantize
from launch.report import main
from tests.checkpoint.test_store import reseal
from tests.support.runs import make_shards, run_launch_script, run_training, write_small_config

# Layer 0 is dense, layers 1 and 2 are mixtures, their experts spread over two ranks.
CHANGES: dict[str, Any] = {
    "model__layers": 3,
    "model__experts__num_dense_layers": 1,
    "parallel__expert_parallel": 2,
    "training__steps": 5,
    "optimizer__learning_rate": 0.02,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    path = write_small_config(folder / "run.yaml", make_shards(folder), folder / "run", **CHANGES)
    result = run_training(2, "--config", str(path))
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The run's own copy for a test that spoils it."""
    return Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("report")))


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def rows(out: str) -> list[list[str]]:
    """The cells of all tables' rows."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


def assert_picture(path: Path) -> None:
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) >= 200 and len({tuple(p) for p in pixels[::7, ::7, :3].reshape(-1, 3)}) > 5, path


def test_experts_from_the_command_line(trained: Path) -> None:
    result = run_launch_script("report", "experts", "--run", str(trained), "--last", "3")
    assert result.exit_code == 0, result.output
    at_end, mean = rows(result.output)[:2], rows(result.output)[2:]
    assert [row[0] for row in at_end] == [row[0] for row in mean] == ["1", "2"]
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    last = [entry for entry in log if "experts/load" in entry][-3:]
    for row, layer, load in zip(at_end, (1, 2), last[-1]["experts/load"], strict=True):
        ideal = sum(load) / 4
        assert sum(load) == 8 * 32 * 2, "every copy of the step is counted"
        assert row[1:3] == [f"{max(load) / ideal:.3f}", f"{min(load) / ideal:.3f}"]
        assert row[4] == f"{max(load) / ideal - 1:.3f}"
        assert row[7] == f"{last[-1][f'experts/router_entropy/layer_{layer}']:.3f}"
    means = [sum(max(e["experts/load"][i]) for e in last) / 3 / 128 for i in (0, 1)]
    assert [row[1] for row in mean] == [f"{value:.3f}" for value in means]
    copies = [rank[0] for rank in last[-1]["experts/copies"]]
    halves = [sum(last[-1]["experts/load"][0][half]) for half in (slice(0, 2), slice(2, 4))]
    assert copies == halves, "what arrives at a rank are the copies that chose its experts"
    assert at_end[0][10] == "–".join(str(n) for n in sorted(set(copies)))
    assert all(float(text) > 0 for text in at_end[0][11].split("–") + at_end[0][12].split("–"))
    for name in ("load.png", "maxvio.png"):
        assert_picture(trained / "report" / name)
    (history,) = (trained / "report").glob("load_layer_*.png")
    assert_picture(history)


def test_the_layer_whose_history_is_drawn_can_be_chosen(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, "experts", "--run", copied, "--layer", 2)
    assert (copied / "report" / "load_layer_2.png").exists()
    assert "are 1, 2" in refusal(capsys, "experts", "--run", copied, "--layer", 0)


def test_a_line_that_a_crash_cut_short_is_passed_over(copied: Path) -> None:
    whole = read_expert_log(copied)
    with (copied / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "experts/load": [[1')
    assert read_expert_log(copied).steps == whole.steps == [1, 2, 3, 4, 5]
    assert whole.last(2).load.equal(whole.load[-2:]) and whole.last(2).steps == [4, 5]


def test_functions(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(report(capsys, "functions", "--run", trained, "--sequences", 3))
    kinds = [("0", "dense"), ("1", "routed"), ("1", "shared"), ("2", "routed"), ("2", "shared")]
    assert [tuple(row[:3]) for row in table] == [(*kind, role) for kind in kinds for role in ("inner", "outer")]
    assert all(float(row[4]) > 0 and float(row[5]) >= float(row[4]) for row in table), "all have learned something"
    assert table[2][3] == "4 × 4" and all(0 <= float(row[7]) <= float(row[8]) <= 100 for row in table)
    for layer, kind in kinds:
        assert_picture(trained / "report" / f"functions_layer_{layer}_{kind}.png")
    for name in ("change.png", "outside.png"):
        assert_picture(trained / "report" / name)


def test_functions_without_data(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = yaml.safe_load((copied / "config.yaml").read_text())
    tree["data"]["path"] = str(copied / "gone")
    (copied / "config.yaml").write_text(yaml.safe_dump(tree))
    out = report(capsys, "functions", "--run", copied)
    assert "the range of inputs is left out" in out and "gone" in out and rows(out)[0][7:] == ["–", "–", "–"]
    assert (copied / "report" / "change.png").exists() and not (copied / "report" / "outside.png").exists()


def test_symbolic(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(report(capsys, "symbolic", "--run", trained, "--layer", 1, "--expert", 3))
    assert [row[:5] for row in table] == [
        ["1", "routed", "3", role, str(i)] for role in ("inner", "outer") for i in range(4)
    ]
    told = json.loads((trained / "report" / "symbolic.json").read_text())
    assert told["step"] == 5 and told["form"] == "rational" and len(told["functions"]) == 8
    for row, function in zip(table, told["functions"], strict=True):
        best = function["fits"][0]
        assert row[5:7] == [best["name"], f"{best['r2']:.5f}"] and 0.5 < best["r2"] <= 1
        assert len(function["fits"]) == 5 and (function["role"], function["expert"]) == (row[3], 3)
    assert "0 to 3" in refusal(capsys, "symbolic", "--run", trained, "--expert", 4)


def test_ternary_weights(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(report(capsys, "weights", "--run", trained, "--out", tmp_path / "pictures"))
    run = Run.open(trained)
    model, path = run.initial_model(), run.checkpoint
    start = [matrix.parameter.detach().clone() for matrix in model.ternary_weights()]
    load_weights(model, path)
    weights = list(model.ternary_weights())
    assert [row[0] for row in table] == [str(matrix.layer) for matrix in weights]
    assert [row[1] for row in table[:6]] == [
        *(f"mixer.inputs.{part}" for part in ("query", "key", "value", "gate")),
        "mixer.output.out",
        "mixture.shared.up",
    ]
    for row, (_, _, weight, _), first in zip(table, weights, start, strict=True):
        (codes, gamma), (before, _) = (absmean_quantize(w.detach().view(-1, *w.shape[-2:])) for w in (weight, first))
        assert row[2] == " × ".join(map(str, weight.shape))
        means = [cell.split(" ")[0] for cell in row[3:]]
        assert means[:3] == [f"{100 * float((codes == code).double().mean()):.1f}" for code in (-1, 0, 1)]
        assert float(means[3]) == pytest.approx(1.3, abs=0.1)
        assert float(means[4]) == pytest.approx(float(gamma.mean()), abs=1e-4)
        assert float(means[5]) == pytest.approx(100 * float((codes != before).double().mean()), abs=0.06)
        assert ("–" in row[4]) == (len(codes) > 1)
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == [f"weights_layer_{layer}.png" for layer in range(3)]
    for name in pictures:
        assert_picture(tmp_path / "pictures" / name)


def test_codes_are_those_of_the_working_copies(copied: Path) -> None:
    tree = yaml.safe_load((copied / "config.yaml").read_text())
    tree["training"]["precision"] = "bf16"
    (copied / "config.yaml").write_text(yaml.safe_dump(tree))
    run = Run.open(copied)
    _, matrices = measure_matrices(run)
    model = run.initial_model()
    load_weights(model, run.checkpoint)
    zeros, of_masters = [], []
    for _, _, weight, _ in model.ternary_weights():
        latent = weight.detach().view(-1, *weight.shape[-2:])
        zeros.append(float((absmean_quantize(latent.bfloat16().float())[0] == 0).sum()))
        of_masters.append(float((absmean_quantize(latent)[0] == 0).sum()))
    assert [float(matrix.sums.zero.sum()) for matrix in matrices] == zeros != of_masters


def test_a_run_without_ternary_weights_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = yaml.safe_load((copied / "config.yaml").read_text())
    tree["model"]["quantize"] = False
    (copied / "config.yaml").write_text(yaml.safe_dump(tree))
    # The checkpoint must say the same: the model is taken from there.
    for path in (copied / "checkpoints").glob("step-*"):
        reseal(path, lambda manifest: manifest["state"].update(config=tree))
    assert "model.quantize is false" in refusal(capsys, "weights", "--run", copied)


def test_weights_come_from_the_checkpoint(trained: Path) -> None:
    run = Run.open(trained)
    model, path = run.initial_model(), run.checkpoint
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    load_weights(model, path)
    assert model.routers.step == 5
    changed = [name for name, p in model.named_parameters() if not p.equal(before[name])]
    assert len(changed) == len(before) and model.routers.bias.abs().max() > 0


def test_what_is_missing_is_named(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("experts", "functions", "symbolic", "weights"):
        assert "no such folder" in refusal(capsys, what, "--run", tmp_path / "none")
    assert "log.jsonl" in refusal(capsys, "experts", "--run", tmp_path)
    assert "config.yaml" in refusal(capsys, "functions", "--run", tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss/total": 5.0}\n')
    assert "no entry about experts" in refusal(capsys, "experts", "--run", tmp_path)
    shutil.copy(trained / "config.yaml", tmp_path)
    assert "no intact checkpoint" in refusal(capsys, "functions", "--run", tmp_path)


def small(form: str, trained: Path) -> MixKABRN:
    """A whole model with a convolution in front of each feed-forward that does something, half-way into ternary."""
    tree = yaml.safe_load((trained / "config.yaml").read_text())
    tree["model"]["experts"]["type"] = form
    tree["model"]["short_conv_size"] = 3
    tree["parallel"]["expert_parallel"] = 1
    model = build_model(Config.model_validate(tree), single_process_mesh("cpu")).eval()
    torch.manual_seed(4)
    for weight in model.select_parameters(lambda p: p.role == "conv"):
        weight.data.normal_()
    return model


def see_inputs(model: MixKABRN, batch: Batch) -> tuple[list[Tensor], list[Tensor], BatchStats]:
    """What the forward pass hands to each feed-forward, the experts that each router chooses, and its sums."""
    inputs: list[Tensor] = []
    chosen: list[Tensor] = []
    hooks = []
    for block in model.blocks:
        hooks.append(block.mixture.register_forward_pre_hook(lambda _, given: inputs.append(given[0])))
        if isinstance(block.mixture, MixtureOfExperts):
            hooks.append(block.mixture.router.register_forward_hook(lambda _, __, out: chosen.append(out.expert_ids)))
    with torch.no_grad():
        stats = model(batch)
    for hook in hooks:
        hook.remove()
    return inputs, chosen, stats


@pytest.mark.parametrize("lam", [1.0, 0.5])
@pytest.mark.parametrize("form", ["rational", "hat", "relu2"])
def test_reach_follows_the_models_own_stream(form: str, lam: float, trained: Path) -> None:
    """Each network reads what the forward pass gives it, whatever the quantizer's state; few inputs leave the range."""
    model = small(form, trained)
    model.set_quantization(lam)
    config = Run.open(trained).config
    batch = TokenDataset(open_corpus(config.data), "validation", 32, 3, ordered=False).get([0, 1, 2])
    inputs, chosen, stats = see_inputs(model, batch)
    reaches = measure_reach(model, batch)
    networks = list_networks(model)
    assert [(n.layer, n.kind) for n in networks] == [
        (0, "dense"),
        (1, "routed"),
        (1, "shared"),
        (2, "routed"),
        (2, "shared"),
    ]
    for row, place in enumerate((1, 3)):
        assert reaches[place].tokens_per_expert.tolist() == stats.tokens_per_expert[row].tolist()
    for network, reach in zip(networks, reaches, strict=True):
        x = normalize_quantize(inputs[network.layer], lam).rows()
        experts = len(network.experts.expert_ids)
        everyone = torch.arange(experts).repeat(len(x.codes), 1)
        visits = chosen[network.layer - 1] if network.kind == "routed" else everyone
        tokens = [(visits == expert).any(1).nonzero().flatten() for expert in range(experts)]
        assert reach.tokens_per_expert.tolist() == [len(part) for part in tokens]
        rows = Quantized(x.codes[torch.cat(tokens)], x.scale[torch.cat(tokens)])
        values = (rows.codes / rows.scale).abs()
        assert reach.quantile == float(values.flatten().kthvalue(round(0.999 * values.numel())).values)
        assert (values <= reach.quantile).float().mean() == pytest.approx(0.999, abs=2e-3)
        assert set(reach.outside) == (set() if form == "relu2" else {"inner", "outer"})
        expected = network.experts.outside(rows, [len(part) for part in tokens])
        for role, fraction in reach.outside.items():
            known = reach.tokens_per_expert > 0
            torch.testing.assert_close(fraction[known], expected[role][known], atol=1e-6, rtol=0)
            assert fraction[~known].isnan().all() and ((fraction[known] >= 0) & (fraction[known] < 0.2)).all()


X, POSITIVE = torch.linspace(-2, 2, 81, dtype=torch.float64), torch.linspace(0.5, 3, 81, dtype=torch.float64)
KNOWN = {
    "x": X,
    "x^2": X**2,
    "x^3": (X - 0.5) ** 3,
    "x^4": X**4,
    "1/x": 1 / (POSITIVE + 0.3),
    "sqrt": POSITIVE.sqrt(),
    "exp": (-1.3 * X).exp(),
    "log": (2 * POSITIVE - 0.5).log(),
    "abs": (X + 0.4).abs(),
    "sin": (3 * X + 1).sin(),
    "cos": (1.7 * X).cos(),
    "tan": (0.7 * X).tan(),
    "tanh": (1.5 * X).tanh(),
    "sigmoid": X.sigmoid(),
    "gaussian": (-X * X).exp(),
    "silu": torch.nn.functional.silu(1.5 * X - 0.5),
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_known_functions_get_their_names(name: str) -> None:
    x = X if len(X) and name not in ("1/x", "sqrt", "log") else POSITIVE
    for y in (KNOWN[name], 0.3 - 1.7 * KNOWN[name]):
        best = fit_symbolic(x, y)[0]
        assert best.r2 > 0.99999
        # tanh(x) and 2·sigmoid(2x) − 1 are one function, and so is sin with its shifted cosine.
        assert best.name == name or {best.name, name} in ({"tanh", "sigmoid"}, {"sin", "cos"}), best
    assert fit_symbolic(x, KNOWN[name])[0].name == name


@pytest.mark.parametrize("y", [KNOWN["sin"], KNOWN["cos"], KNOWN["tanh"], KNOWN["sigmoid"], X.exp() + X**3])
def test_two_names_of_one_function_are_no_rivals(y: torch.Tensor) -> None:
    names = [fit.name for fit in fit_symbolic(X, y)]
    assert len({"sin", "cos"} & {*names}) == len({"tanh", "sigmoid"} & {*names}) == 1
    assert len(names) == len({*names})


def test_a_fit_is_what_its_numbers_say() -> None:
    y = torch.tanh(0.8 * X - 0.3) * 2 + X**2 / 5
    for fit in fit_symbolic(X, y):
        functions = {"x^2": torch.square, "x^3": lambda u: u**3, "sin": torch.sin, "tanh": torch.tanh, "exp": torch.exp}
        if fit.name in functions:
            error = y - fit.c * functions[fit.name](fit.a * X + fit.b) - fit.d
            assert fit.r2 == pytest.approx(1 - float(error.square().sum() / (y - y.mean()).square().sum()), abs=1e-9)
    assert sorted(-fit.r2 for fit in fit_symbolic(X, y)[1:]) == [-fit.r2 for fit in fit_symbolic(X, y)[1:]]


def test_noise_has_no_good_name_and_a_constant_is_one() -> None:
    noise = torch.randn(81, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert fit_symbolic(X, noise)[0].r2 < 0.5
    (only,) = fit_symbolic(X, torch.full_like(X, 2.5))
    assert (only.name, only.d, only.r2) == ("constant", 2.5, 1.0)


def test_formulas_for_people() -> None:
    assert write_formula("sin", 2.0, -0.5, 1.5, 0.25) == "1.5·sin(2·x − 0.5) + 0.25"
    assert write_formula("x^2", 1.0, 0.5, -1.0, 0.0) == "-1·(x + 0.5)^2"
    assert write_formula("1/x", 1.0, 0.0, 3.0, -1.0) == "3·1/x − 1"
    assert write_formula("exp", 0.5, 0.0, 1.0, 0.0) == "1·exp(0.5·x)"
