"""What cannot be fine-tuned is refused in one line, before anything is trained; replay draws what it was asked for."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from kabrn_dist.data.index_io import write_index
from kabrn_dist.data.run_config import load_run_config
from kabrn_dist.distributed.launch_env import LaunchEnv
from kabrn_dist.inference.export import lay_out_export, list_ternary, plan_export, write_export
from kabrn_dist.inference.loaded_weights import LoadedWeights
from kabrn_dist.inference.run import Run
from kabrn_dist.train.datasets import open_datasets
from kabrn_dist.train.trainer import train
from kabrn_dist.utils.errors import UserError
from tests.support.finetunes import train_base, write_finetune
from tests.support.runs import run_sessions
from tests.support.shard_sets import Texts, make_set

# Of these conversations nothing that is learned lies within the first 60 tokens, but the token that begins the next.
LATE = Texts("chats", sizes=(90, 120), masked=True, targets=0.0)


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tuning of it that was stopped after a step, and what does not belong to them."""
    folder = tmp_path_factory.mktemp("finetune")
    base = train_base(folder, training__steps=2)
    config = write_finetune(folder / "lora.yaml", shards, base, "lora")
    run_sessions(1, [[str(config), "never", 1]], folder)
    _write_other_bases(folder, Run.open(base))
    index = make_set(folder / "late", LATE)
    whole = [source.model_copy(update={"whole": True}) for source in index.sources]
    write_index(folder / "late", index.model_copy(update={"sources": tuple(whole), "fingerprint": ""}))
    index = make_set(folder / "silent", LATE)
    silent = [
        source.model_copy(update={"train": source.train.model_copy(update={"loss_tokens": 0})})
        for source in index.sources
    ]
    write_index(folder / "silent", index.model_copy(update={"sources": tuple(silent), "fingerprint": ""}))
    return folder


def _write_other_bases(folder: Path, run: Run) -> None:
    plan, config = plan_export(run.folder), run.config
    weights = LoadedWeights(run.initial_model(), {})
    origin = config, run.folder, run.step, run.tokenizer()
    other = lay_out_export(*origin, weights, weights.dtypes, list_ternary(config, weights))
    write_export(other, folder / "other")
    late = {
        "model": config.model.model_copy(update={"quantize_start_step": 100}),
        "training": config.training.model_copy(update={"steps": 200}),
    }
    write_export(replace(plan, config=config.model_copy(update=late)), folder / "unfinished")
    write_export(plan, folder / "foreign")
    tokenizer = folder / "foreign" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")


def refuse(config: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        train(load_run_config(config, overrides), LaunchEnv(0, 1, 0, 1))
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 500
    return message


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that a process without a launcher sets for itself are gone after the test.

    So are groups that an earlier test in this process has left, as ranks do that end with an error.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("LOCAL_RANK", "0"), ("LOCAL_SIZE", "1"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("finetune.base={0}/nowhere", "finetune.base {0}/nowhere: no such folder; name the folder of a run or"),
        ("finetune.base={0}/late", "finetune.base {0}/late: holds no config.yaml, so neither a run nor an export"),
        ("finetune.base={0}/base/checkpoints", "set it to the run's folder, {0}/base"),
        ("finetune.base={0}/lora", "{0}/lora: trained an adapter (lora) of another model"),
        ("finetune.base={0}/foreign", "its tokenizer is not that of finetune.base {0}/foreign, so the embedding"),
        ("finetune.base={0}/unfinished", "its step 2 is before step 100, from which on it is wholly quantized"),
        ("run.init_from={0}/base", "both say what the run starts from; leave one of them out"),
        ("parallel.shard_ternary=true", "finetune.method lora trains none; set shard_ternary to false"),
        ("finetune.method=state model.layers=AA", "no layer of model.layers AA is retention; set finetune.method to"),
        ("finetune.method=state finetune.rank=9", "finetune.rank: 9 is larger than a state of 8 × 16; set it to 8 or"),
        ("finetune.method=ternary_lora model.quantize=false", "flips ternary codes, and model.quantize is false"),
        ("finetune.method=ternary_lora finetune.targets=[mixer,router]", "finetune.targets router: never ternary"),
        ("model.hidden_size=48", "model.hidden_size is 48, and 32 in what was trained; leave these keys out"),
        ("model.quantize_start_step=5", "the model of finetune.base is quantized already; leave both out"),
        ("finetune.targets=[qurey]", "finetune.targets: 'qurey' matches no matrix of the base; did you mean 'query'"),
        ("finetune.rank=25", "finetune.rank: 25 is larger than 'blocks.0."),
        ("data.path={0}/silent", "training tokens carries loss, so there is nothing to learn"),
        ("data.path={0}/late data.sequence_length=60", "nothing that carries loss is left of them"),
        ("finetune.base_data={0}/nowhere", "finetune.base_data: "),
    ],
)
def test_what_cannot_start_is_refused(overrides: str, words: str, folder: Path, tmp_path: Path) -> None:
    given = [text.format(folder) for text in overrides.split()]
    message = refuse(folder / "lora.yaml", f"run.folder={tmp_path}/run", *given)
    assert words.format(folder) in message, message
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("finetune.method=state", "finetune.method is lora in the checkpoint and state here, and a run keeps what it"),
        ("finetune.rank=3", "finetune.rank is 4 in the checkpoint and 3 here, and a run keeps what it trains; set"),
        ("finetune.alpha=8", "set finetune.alpha to 32.0, or set run.folder to another folder to start anew"),
        ("finetune.targets=[mixer]", "set finetune.targets to ['mixer', 'shared', 'routed'], or"),
        ("finetune.base={0}/other", "than the one that this run has begun with, its step 2 ("),
    ],
)
def test_a_run_goes_on_with_what_it_has_begun(overrides: str, words: str, folder: Path) -> None:
    assert words in refuse(folder / "lora.yaml", *(text.format(folder) for text in overrides.split()))


def test_a_part_of_the_model_may_be_given(folder: Path) -> None:
    trained = Run.open(folder / "base").config.model
    given = load_run_config(folder / "lora.yaml", ["model.router.bias_update_rate=0.0", "model.hidden_size=32"]).model
    router = trained.router.model_copy(update={"bias_update_rate": 0.0})
    assert given == trained.model_copy(update={"router": router}) != trained


def test_replay_draws_its_share_without_end(folder: Path, tmp_path: Path) -> None:
    make_set(tmp_path / "old", Texts("noise", epochs=1.0), Texts("more", epochs=1.0, weight=0.5))
    config = load_run_config(folder / "lora.yaml", ["finetune.replay=0.3", f"finetune.base_data={tmp_path}/old"])
    data = open_datasets(config)
    own, total = len(data.validation.corpus.sources) if data.validation else 0, 4096 * 20
    drawn = data.train.sequences_drawn(total)
    assert own and sum(drawn) == total and abs(sum(drawn[own:]) / total - 0.3) < 1 / 4096
    assert drawn[-2] / drawn[-1] == pytest.approx(2, abs=0.01)
    # What a batch holds is what was counted: only the base's data is of random letters.
    counts = [data.train.sequences_drawn(step)[own:] for step in (0, 10, 100, 1000)]
    assert [round(sum(each)) for each in counts] == pytest.approx([0, 3, 30, 300], abs=2)


def test_data_of_the_base_that_is_gone_is_told_or_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    config = tmp_path / "base" / "config.yaml"
    config.write_text(config.read_text().replace(str(folder / "old"), str(tmp_path / "gone")))
    path = folder / "lora.yaml"
    data = open_datasets(load_run_config(path, [f"finetune.base={tmp_path}/base"]))
    assert data.base is None and len(data.warnings) == 1
    assert data.warnings[0].startswith("warning: what is forgotten is not measured") and "\n" not in data.warnings[0]
    assert open_datasets(load_run_config(path)).base is not None
    with pytest.raises(UserError, match=r"finetune.replay 0.2 needs what the base was trained on .* or replay to 0"):
        open_datasets(load_run_config(path, [f"finetune.base={tmp_path}/base", "finetune.replay=0.2"]))
    with pytest.raises(UserError, match=r"finetune.base_data: .*nowhere"):
        open_datasets(load_run_config(path, [f"finetune.base_data={tmp_path}/nowhere"]))
