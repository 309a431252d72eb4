"""Benchmarks run and write what docs/benchmarks.md says. Nothing here asserts a time: the machine is shared."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import (
    data_prep,
    data_prep_rivals,
    kan_fits,
    kan_rivals,
    moe_inputs,
    moe_rivals,
    quality_recipes,
    quality_run,
)
from benchmarks.moe import peak_bytes
from benchmarks.quality_models import Transformer, measure_ours
from benchmarks.quality_text import read_text
from benchmarks.report import Report, kept_bytes, measure
from kabrn_dist.data.index_io import read_index
from kabrn_dist.ops.activation_quant import rms_norm
from tests.support.runs import start_command, wait_for_exit

NUMBER = (int, float)


def check_form(content: dict[str, Any]) -> None:
    assert set(content) == {"machine", "rows", "aims"}
    assert {"cpu", "cores", "threads", "torch"} <= set(content["machine"])
    for row in content["rows"]:
        assert set(row) == {"name", "ours", "rival", "unit", "ratio"}
        if isinstance(row["rival"], str):
            assert row["rival"].startswith("missing: ") and row["ratio"] is None
        else:
            assert isinstance(row["ours"], NUMBER)
            # A figure of 0, such as "not chosen here", has no ratio.
            assert isinstance(row["ratio"], NUMBER) if row["ours"] else row["ratio"] is None
    for aim in content["aims"].values():
        assert set(aim) == {"measured", "aim", "holds"} and isinstance(aim["holds"], bool)


@pytest.mark.slow
def test_retention(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "retention.json"
    command = [sys.executable, "-m", "benchmarks.retention", "--quick", "--json", str(path)]
    result = wait_for_exit(start_command(command, CUDA_VISIBLE_DEVICES=""), timeout=600)
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    check_form(content)
    names = [row["name"] for row in content["rows"]]
    for rival in ("SDPA", "torchscale", "bare products", "packed", "GPU", "decoding", "kept", "wire"):
        assert any(rival in name for name in names), f"{rival} was left out"
        assert rival in result.output
    # Bytes, unlike times, are the same whatever else the machine does.
    exact = {what: aim for what, aim in content["aims"].items() if "wire" in what or "bytes" in what or "state" in what}
    assert len(exact) >= 2 * 3 * 2 + 4
    assert all(aim["holds"] for aim in exact.values()), exact


@pytest.mark.slow
def test_moe(tmp_path: Path) -> None:
    path = tmp_path / "moe.json"
    command = [sys.executable, "-m", "benchmarks.moe", "--quick", "--json", str(path)]
    result = wait_for_exit(start_command(command, CUDA_VISIBLE_DEVICES=""), timeout=600)
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    check_form(content)
    names = [row["name"] for row in content["rows"]]
    for rival in ("rival: dense", "deepspeed", "fairscale", "transformers", "rational", "kept", "peak", "GPU", "wire"):
        assert any(rival in name for name in names), f"{rival} was left out"
    # Bytes, unlike times, are the same whatever else the machine does.
    exact = {what: aim for what, aim in content["aims"].items() if "bytes" in what}
    assert len(exact) == 4 + 1 + 2
    assert all(aim["holds"] for aim in exact.values()), exact


def small_mixture() -> moe_inputs.Inputs:
    return moe_inputs.Inputs(moe_inputs.Shape(tokens=96, experts=8, top_k=2, hidden=12, width=16), torch.float32)


def test_rivals_of_moe_are_one_function() -> None:
    x = small_mixture()
    by_definition = torch.zeros_like(x.x[0])
    weights, choice = (x.x[0] @ x.router.T).softmax(-1).topk(2)
    for token, (weight, chosen) in enumerate(zip(weights / weights.sum(-1, keepdim=True), choice, strict=True)):
        for share, expert in zip(weight, chosen.tolist(), strict=True):
            by_definition[token] += share * x.experts()[expert](x.x[0, token])
    layers = {"deepspeed": moe_rivals.deepspeed(x, dropless=True)}
    for back_end in ("eager", "grouped_mm", "batched_mm"):
        layer = moe_rivals.transformers(x, back_end)
        if not isinstance(layer, str):
            layers[back_end] = layer
    for name, layer in layers.items():
        torch.testing.assert_close(layer.forward(x.x)[0], by_definition, msg=name)
        assert len(moe_inputs.both_passes(layer, x)()) == 1 + len(layer.parameters)


def test_peak_is_what_lives_at_once() -> None:
    x = torch.ones(1000)
    # Two of the three results at a time.
    assert peak_bytes(lambda: x.exp().sin().cos()) == 2 * 4000


@pytest.mark.slow
def test_kan(tmp_path: Path) -> None:
    path = tmp_path / "kan.json"
    command = [sys.executable, "-m", "benchmarks.kan", "--quick", "--json", str(path)]
    result = wait_for_exit(start_command(command, CUDA_VISIBLE_DEVICES=""), timeout=900)
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    check_form(content)
    names = [row["name"] for row in content["rows"]]
    forms = ("rational", "chebyshev", "hat", "bspline", "swiglu", "relu2")
    rivals = ("products with SiLU", "BitLinear MLP", "pykan", "flashkan", "FastKAN", "GPU", "kept", "fit")
    for part in (*forms, *rivals):
        assert any(part in name for name in names), f"{part} was left out"
    # Bytes, unlike times, are the same whatever else the machine does.
    kept = [row["ratio"] for row in content["rows"] if "kept" in row["name"] and "FastKAN" in row["name"]]
    assert kept and min(kept) > 1


def test_kan_rivals_do_what_they_say() -> None:
    x = kan_rivals.Inputs(40, 16, 3, torch.float32)
    assert sum(x.counts) == 40 and len(set(x.counts)) > 1
    plain, normed = kan_rivals.silu(x, 24), kan_rivals.experts("silu", x, 24, quantized=False)
    assert plain.parameters == normed.parameters == 3 * 2 * 16 * 24
    rows = plain.leaves[0]
    for matrix in (*plain.leaves[1:], *normed.leaves[1:]):
        matrix.data.fill_(1.0)
    hidden = F.silu(rows.sum(-1, keepdim=True)).expand(-1, 24)
    torch.testing.assert_close(plain.forward(), hidden.sum(-1, keepdim=True).expand(-1, 16))
    torch.testing.assert_close(normed.forward(), rms_norm(hidden).sum(-1, keepdim=True).expand(-1, 16))
    assert [g.shape for g in plain()] == [leaf.shape for leaf in plain.leaves]


def test_fastkan_is_its_formula() -> None:
    x = kan_rivals.Inputs(5, 4, 1, torch.float64)
    network = kan_rivals.fastkan(x, 3)
    out, leaves = network.forward(), iter(network.leaves)
    z = next(leaves)
    for _ in range(2):
        gain, shift, spline, base, bias = (next(leaves) for _ in range(5))
        normal = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * gain + shift
        result = F.silu(z) @ base.T + bias
        for i in range(4 if len(spline) == 3 else 3):
            for k in range(8):
                center = -2 + k * 4 / 7
                result = result + torch.exp(-(((normal[:, i] - center) * 7 / 4) ** 2))[:, None] * spline[:, 8 * i + k]
        z = result
    torch.testing.assert_close(out, z)


def test_mlps_have_as_many_parameters() -> None:
    for layers in (1, 2):
        for wanted in (22, 135, 189):
            has = kan_fits.count(kan_fits.mlp(2, wanted, layers))
            assert wanted <= has < wanted + 50


@pytest.mark.slow
def test_data_prep(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    command = [sys.executable, "-m", "benchmarks.data_prep", "--quick", "--json", str(path)]
    result = wait_for_exit(
        start_command(command, CUDA_VISIBLE_DEVICES="", BENCH_FOLDER=str(tmp_path / "bench")), timeout=600
    )
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    # Two figures of the loader have nothing beside them.
    alone = [row for row in content["rows"] if row["rival"] == "–"]
    content["rows"] = [row for row in content["rows"] if row["rival"] != "–"]
    check_form(content)
    names = [row["name"] for row in content["rows"] + alone]
    for part in (*data_prep.CLEANING, "tokenizers alone", "datatrove", "rate", "with start", "read, 64", "waits"):
        assert any(part in name for name in names), f"{part} was left out"
    assert not list((tmp_path / "bench").iterdir())


@pytest.mark.slow
def test_corpus_has_no_document_twice(tmp_path: Path) -> None:
    # More than the library has, so that there are copies.
    count, size = data_prep.make_corpus(tmp_path / "texts", 40_000_000)
    lines = [line for path in sorted((tmp_path / "texts").iterdir()) for line in path.read_text().splitlines()]
    texts = [json.loads(line)["text"].partition("\n")[2] for line in lines]
    # Empty files are empty in all copies but for the number that the first line has.
    texts = [text for text in texts if text.strip()]
    assert len(lines) == count and size >= 40_000_000
    assert len(set(texts)) > 0.97 * len(texts)
    assert len(set(lines)) == count


@pytest.mark.slow
def test_rivals_of_data_prep_make_the_same_tokens(tmp_path: Path) -> None:
    count, _ = data_prep.make_corpus(tmp_path / "texts", 300_000)
    data_prep.make_tokenizer(tmp_path, 512)
    data_prep_rivals.write_recipes(tmp_path, data_prep.CLEANING, shard_mb=0.05)
    core = sorted(os.sched_getaffinity(0))[:1]
    ours, time = data_prep.take_time(tmp_path, "not cleaned", core)
    assert 0 < time.work < time.whole
    assert ours == data_prep.take_time(tmp_path, "tokenizers alone", core)[0]
    index = read_index(data_prep_rivals.set_of(tmp_path, "not cleaned"))
    assert index.documents("train") + index.documents("validation") == count
    # There must be shards for two workers to share.
    assert sum(len(source.train.shards) for source in index.sources) > 1


def quality(*options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.quality", "--quick", "--steps", "2", *options]


@pytest.mark.slow
def test_quality(tmp_path: Path) -> None:
    path, log = tmp_path / "quality.json", tmp_path / "deep" / "log.jsonl"
    options = "--text", "stdlib", "--jobs", "2", "--log", str(log), "--json", str(path)
    result = wait_for_exit(start_command(quality(*options), CUDA_VISIBLE_DEVICES=""), timeout=600)
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    check_form(content)
    for model in "bcdef":
        names = [row["name"] for row in content["rows"] if row["name"].startswith(f"({model}) ")]
        assert len(names) == 5 and f"({model}) validation, rival: (a)" in names
    # Sizes, unlike losses after two steps, are what they will be.
    rows = {row["name"]: row for row in content["rows"]}
    assert all(abs(rows[f"({m}) active parameters, rival: (a)"]["ratio"] - 1) < 0.02 for m in "bcdef")
    assert all(rows[f"({m}) weights, rival: (a)"]["ratio"] > 3 for m in "def")
    (aim,) = content["aims"].values()
    assert aim["measured"] > 0
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(run["model"] for run in runs) == list("abcdefg")
    assert all(0 < run["nats"] < 6 and run["seconds"] > 0 for run in runs)


def test_quality_sweeps_rates_and_repeats_the_best(tmp_path: Path) -> None:
    text, log = tmp_path / "text.txt", tmp_path / "log.jsonl"
    text.write_text("".join(chr(97 + i * i % 23) for i in range(2000)))
    options = "--models", "a", "--rates", "1e-2,1e-9", "--seeds", "3", "--text", str(text), "--log", str(log)
    result = wait_for_exit(start_command(quality(*options, "--jobs", "1"), CUDA_VISIBLE_DEVICES=""))
    assert result.exit_code == 0 and "(a) validation" in result.output, result.output
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    best = min(runs[:2], key=lambda run: run["nats"])["rate"]
    assert [(run["rate"], run["seed"]) for run in runs[2:]] == [(best, 2), (best, 3)]
    assert len({run["nats"] for run in runs}) == 4
    # Nothing is left to do.
    again = wait_for_exit(start_command(quality(*options, "--jobs", "1"), CUDA_VISIBLE_DEVICES=""))
    assert again.exit_code == 0 and "(a) rate" not in again.output and len(log.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "nowhere.txt"], "--text nowhere.txt: cannot be read"),
        (["--text", "Makefile", "--models", "xd"], "--models xd: there are a, b, c, d, e, f, g"),
        (["--text", "stdlib", "--set", "model.convolutions=1"], "model.convolutions"),
        (["--text", "stdlib", "--set", "steps=1"], "write it as model.KEY=VALUE"),
        (["--text", "stdlib", "--rates", "fast"], "'fast' is not a number"),
        (["--text", "stdlib", "--seeds", "0"], "--seeds 0: use 1 or more"),
    ],
)
def test_quality_refuses_before_it_trains(options: list[str], message: str) -> None:
    result = wait_for_exit(start_command(quality(*options), CUDA_VISIBLE_DEVICES=""))
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output, result.output


def test_models_of_quality_are_one_part_apart() -> None:
    runs = [quality_run.Run(model, 1e-3, 1, 100, "", 1) for model in "bcdef"]
    b, c, d, e, f = (quality_run.configure(run, 65).model for run in runs)
    assert b.model_copy(update={"quantize": True}) == c
    assert c.model_copy(update={"experts": d.experts}) == d
    assert d.model_copy(update={"experts": e.experts}) == e and d.model_copy(update={"layers": "RARR"}) == f
    rival = Transformer(65, 128, 4, 4, quality_recipes.RIVAL_HIDDEN, quality_recipes.RIVAL_GATED)
    size = rival.measure()
    assert size.total == sum(p.numel() for p in rival.parameters()) and size.bytes == 2 * size.total
    assert all(abs(measure_ours(model).active / size.active - 1) < 0.01 for model in (b, c, d, e, f))
    tokens = torch.randint(65, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = 0
    assert torch.equal(rival(tokens)[:, :12], rival(changed)[:, :12])


def test_quality_scores_each_character_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(map(chr, range(200, 1200))))
    text = read_text(str(tmp_path / "text.txt"), 8)
    assert (len(text.train), len(text.validation), text.vocabulary) == (900, 100, 1000)
    windows = list(text.windows(5, 8, 1000))
    assert torch.cat([batch.targets.flatten() for batch in windows]).tolist() == list(range(901, 901 + 12 * 8))
    assert len(list(text.windows(5, 8, 3))) == 1
    batch = text.draw(torch.Generator().manual_seed(1), 4, 8)
    assert torch.equal(batch.targets, batch.tokens + 1) and batch.targets.max() < 900
    assert batch.positions.tolist() == [list(range(8))] * 4 and not batch.documents.any()
    assert read_text("stdlib", 64).vocabulary < 110


def test_missing_rivals_are_named(tmp_path: Path) -> None:
    report = Report("title")
    report.compare("ours alone", 2.0, "missing: torchscale", "ms")
    report.compare("nobody", None, "missing: no CUDA card", "ms")
    report.compare("both", 2.0, 3.0, "ms")
    report.compare("a choice that was not made", 0.0, 1.0, "")
    report.compare("no, and no rival", False, "missing: no CUDA card", "")
    report.at_least("speed", None, 2.0)
    report.at_least("fast", 2.0, 2.0)
    report.at_most("small", 3.0, 2.0)
    report.write(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    check_form(content)
    assert [row["ratio"] for row in content["rows"]] == [None, None, 1.5, None, None]
    assert [aim["holds"] for aim in content["aims"].values()] == [False, True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_measure_lets_rivals_take_turns() -> None:
    calls: list[str] = []
    times = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.0, rounds=3)
    assert calls == ["a", "b"] * 3
    assert set(times) == {"a", "b"}


def test_kept_bytes_counts_each_storage_once() -> None:
    x = torch.ones(100, requires_grad=True)
    # exp keeps its result; the product keeps that same result and x.
    assert kept_bytes(lambda: x.exp() * x) == 2 * 100 * 4


@pytest.mark.slow
def test_bitlinear(tmp_path: Path) -> None:
    path = tmp_path / "bitlinear.json"
    command = [sys.executable, "-m", "benchmarks.bitlinear", "--quick", "--json", str(path)]
    result = wait_for_exit(start_command(command, CUDA_VISIBLE_DEVICES=""), timeout=600)
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    check_form(content)
    names = [row["name"] for row in content["rows"]]
    for rival in ("nn.Linear", "fp32 arithmetic", "fake-quantised", "AutoBitLinear", "torchao", "GPU", "kept", "int8"):
        assert any(rival in name for name in names), f"{rival} was left out"
    # Bytes, unlike times, are the same whatever else the machine does.
    exact = {what: aim for what, aim in content["aims"].items() if "kept" in what}
    assert len(exact) == 2 and all(aim["holds"] for aim in exact.values()), exact


@pytest.mark.slow
def test_zero(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    command = [sys.executable, "-m", "benchmarks.zero", "--quick", "--json", str(path)]
    result = wait_for_exit(start_command(command, CUDA_VISIBLE_DEVICES=""), timeout=600)
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    check_form(content)
    names = [row["name"] for row in content["rows"]]
    for rival in ("ZeRO 1", "ZeRO 2", "ZeRO 3", "base 3", "held", "sent", "time", "bf16 all-gather"):
        assert any(rival in name for name in names), f"{rival} was left out"
    assert len(content["aims"]) == 3 and all(aim["holds"] for aim in content["aims"].values()), content["aims"]
