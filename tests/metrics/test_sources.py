"""Losses source by source: what they are, that masks count, and that no layout and no URL changes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kabrn_dist.backend.losses import StepTotals, compute_losses
from kabrn_dist.config import Config
from kabrn_dist.data.corpus import open_folder_corpus
from kabrn_dist.data.dataset import Batch, TokenDataset
from kabrn_dist.inference.load import build_full_model
from kabrn_dist.metrics.sources import SourceSums, validation_values
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.train.datasets import open_datasets
from kabrn_dist.utils.errors import UserError
from tests.support.runs import SMALL_CONFIG, read_losses, run_sessions, write_small_config
from tests.support.shard_sets import Texts, make_set
from tests.support.web import serve

LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sources") / "set"
    make_set(out, Texts("web"), Texts("math", train=20, masked=True, weight=2), Texts("code", validation=0, epochs=1))
    return out


def settings(folder: Path, **changes: dict[str, Any]) -> Config:
    tree = json.loads(json.dumps(SMALL_CONFIG)) | {"run": {"folder": "unused", "seed": 3}}
    tree["data"]["path"] = str(folder)
    for section, values in changes.items():
        tree[section] |= values
    return Config.model_validate(tree)


def build(folder: Path) -> MixKABRN:
    model = build_full_model(settings(folder))
    model.initialize(3)
    return model


def test_rows_and_sources_add_up_token_by_token(folder: Path) -> None:
    batches, model = TokenDataset(open_folder_corpus(folder), "train", LENGTH, seed=1), build(folder)
    parts = [batches.get(range(first, first + 6)) for first in (0, 6)]
    sums = [model(batch) for batch in parts]
    logits: list[torch.Tensor] = []
    model.head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    wanted = torch.zeros(3, 2, dtype=torch.float64)
    for batch, each in zip(parts, sums, strict=True):
        model(batch)
        for row, source in enumerate(batch.sources.tolist()):
            for column, target in enumerate(batch.targets[row].tolist()):
                if target >= 0:
                    nats = -logits[-1][row, column].double().log_softmax(-1)[target].detach()
                    wanted[source] += torch.stack([nats, torch.ones_like(nats)])
        plain = F.cross_entropy(logits[-1].flatten(0, 1), batch.targets.flatten(), reduction="sum")
        torch.testing.assert_close(each.language, plain, rtol=1e-6, atol=0)
        ours, theirs = (torch.autograd.grad(loss, model.embedding.weight)[0] for loss in (each.language, plain))
        torch.testing.assert_close(ours, theirs)
        assert not each.rows.requires_grad and each.rows.shape == (6,)
    total = SourceSums(3)
    for batch, each in zip(parts, sums, strict=True):
        total.add(batch, each.rows)
    torch.testing.assert_close(total._sums[:, :2], wanted, rtol=1e-6, atol=0)
    assert wanted[1, 1] < 0.5 * sum(int((batch.sources == 1).sum()) for batch in parts) * LENGTH, "math is masked"


def test_a_step_without_a_target_has_no_language_loss(folder: Path) -> None:
    model, batch = build(folder), TokenDataset(open_folder_corpus(folder), "train", LENGTH, seed=1).get(range(4))
    sums = model(batch._replace(targets=torch.full_like(batch.targets, -100)))
    losses = compute_losses(sums, StepTotals(0, 4 * LENGTH, 4, 1), model.config.router)
    assert losses.language == 0 and losses.total.isfinite() and not sums.rows.any()
    losses.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.embedding.weight.grad is not None


def test_one_bad_row_spoils_its_own_source_only() -> None:
    corpus = SourceSums(2)
    targets = torch.tensor([[1, -100], [2, 3]])
    batch = Batch(targets, targets, targets, targets, torch.tensor([1, 0]))
    corpus.add(batch, torch.tensor([float("nan"), 4.0]), torch.tensor([7, 5]))
    values = validation_values(["a", "b"], corpus._sums)
    assert values["validation/a/loss"] == 2 and values["validation/b/loss"] != values["validation/b/loss"]
    assert validation_values(["a"], torch.zeros(1, 3)) == {}


def logged(run: Path) -> list[dict[str, float]]:
    """What a run's log says of sources and validation, line by line."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k.split("/")[0] in ("source", "validation")} for entry in entries]


def test_every_layout_and_a_url_log_the_same(folder: Path, tmp_path: Path) -> None:
    plain = {"model__quantize": False, "training__steps": 6, "validation__eval_sequences": 7}
    with serve(folder) as web:
        runs: dict[int, list[tuple[str, dict[str, Any]]]] = {
            1: [("whole", {}), ("url", {"data__path": web.url, "data__cache_dir": str(tmp_path / "cache")})],
            2: [("data", {}), ("sequence", {"parallel__sequence_parallel": 2, "training__micro_batch_size": 4})],
            4: [
                ("both", {"parallel__sequence_parallel": 2, "parallel__expert_parallel": 4, "parallel__zero_stage": 2})
            ],
        }
        for world, layouts in runs.items():
            jobs: list[list[object]] = []
            for name, layout in layouts:
                path = write_small_config(tmp_path / f"{name}.yaml", folder, tmp_path / name, **{**plain, **layout})
                jobs.append([str(path), "never", None])
            run_sessions(world, jobs, tmp_path)
    whole = logged(tmp_path / "whole")
    assert read_losses(tmp_path / "url") == read_losses(tmp_path / "whole")
    assert logged(tmp_path / "url") == whole
    for name in ("data", "sequence", "both"):
        for ours, theirs in zip(logged(tmp_path / name), whole, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5), name
    language = read_losses(tmp_path / "whole", "loss/language")
    for step, loss in zip(whole[:6], language, strict=True):
        parts = [step[f"source/{n}/loss"] * step[f"source/{n}/share"] for n in ("web", "math", "code")]
        assert sum(parts) == pytest.approx(loss, rel=1e-6)
    assert sum(whole[5][f"source/{name}/tokens"] for name in ("web", "math", "code")) == 6 * 8 * LENGTH
    assert set(whole[6]) >= {"validation/math/loss", "validation/web/bits_per_byte"}
    assert "validation/code/loss" not in whole[6]


def test_a_run_that_would_outlast_its_data_is_refused_at_the_start(folder: Path) -> None:
    data = {"weights": {"web": 0.0, "math": 0.0}}
    open_datasets(settings(folder, data=data))
    with pytest.raises(
        UserError, match=r"800,000 sequences, the data has \d+ \(epochs: code 1\); lower training.steps"
    ):
        open_datasets(settings(folder, data=data, training={"steps": 100_000}))
