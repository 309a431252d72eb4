"""Resuming: what is lost, changed or damaged is said or refused, and never replaced in silence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config.file import load_config
from kabrn_dist.inference.run import Run
from kabrn_dist.train.resume import check_state, choose_checkpoint, describe_resume
from kabrn_dist.utils.errors import UserError
from tests.checkpoint.test_store import reseal
from tests.support import fork_server
from tests.support.runs import read_losses, write_small_config

STEPS = 4


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_small_config(
        folder / "c.yaml", shards, folder / "run", training__steps=STEPS, checkpoint__save_interval=2
    )
    check(train(config), 0, "finished at step 4")
    return folder / "run"


@pytest.fixture
def run(finished: Path, shards: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, with its configuration in c.yaml beside it."""
    shutil.copytree(finished, tmp_path / "run")
    write_small_config(
        tmp_path / "c.yaml", shards, tmp_path / "run", training__steps=STEPS, checkpoint__save_interval=2
    )
    return tmp_path / "run"


def train(config: Path, *options: str, world: int = 1) -> fork_server.GroupResult:
    with fork_server.start_ranks("launch.train:main", [["--config", str(config), *options]], world) as group:
        return group.wait(60)


def resume(run: Path, *settings: str, options: tuple[str, ...] = ()) -> fork_server.GroupResult:
    return train(run.parent / "c.yaml", *options, *(f"--set={setting}" for setting in settings))


def check(result: fork_server.GroupResult, code: int, *words: str) -> None:
    assert set(result.exit_codes) == {code}, result.output
    assert "Traceback" not in result.output, result.output
    for word in words:
        assert word in result.output, (word, result.output)


def truncate_manifest(checkpoint: Path) -> None:
    os.truncate(checkpoint / "manifest.json", 10)


def be_newer(checkpoint: Path) -> None:
    reseal(checkpoint, lambda manifest: manifest.update(format_version=99))


def be_link(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.parents[2] / checkpoint.name)
    checkpoint.symlink_to(checkpoint.parents[2] / checkpoint.name)


def be_unreadable(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").mkdir()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate_manifest, "manifest.json"),
        (be_newer, "format_version 99 is of a newer version of MixKABRN"),
        (be_link, "is a link"),
        (be_unreadable, "manifest.json"),
    ],
)
def test_no_fresh_start_where_all_checkpoints_are_damaged(damage: Callable[[Path], None], said: str, run: Path) -> None:
    for name in ("step-00000002", "step-00000004"):
        damage(run / "checkpoints" / name)
    with pytest.raises(UserError) as caught:
        choose_checkpoint(CheckpointStore(run / "checkpoints"), "auto")
    for words in ("none of its checkpoints can be used", said, "step-00000002: ", "step-00000004: ", "run.folder"):
        assert words in str(caught.value)


def test_a_run_without_a_usable_checkpoint_loses_nothing(run: Path) -> None:
    for name in ("step-00000002", "step-00000004"):
        truncate_manifest(run / "checkpoints" / name)
    log, names = (run / "log.jsonl").read_bytes(), sorted(os.listdir(run / "checkpoints"))
    check(resume(run, "training.steps=6"), 2, "none of its checkpoints can be used")
    assert (run / "log.jsonl").read_bytes() == log and sorted(os.listdir(run / "checkpoints")) == names


def test_a_folder_of_checkpoints_that_is_not_there_is_no_fresh_start(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(run / "unmounted")
    with pytest.raises(UserError, match="checkpoints: is not a folder"):
        choose_checkpoint(CheckpointStore(run / "checkpoints"), "auto")


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "int4"},
        {"updates": -5},
        {"step": 3},
        {"guard": {"skipped": "many"}},
        {"guard": {"window": [1.0, "two"]}},
        {"cursor": {"consumed": "x", "seed": 3, "sequence_length": 32, "fingerprint": "", "drawn": {}}},
        {"cursor": {}},
        {"config": {"model": {"hidden_size": -4}}},
        {"config": {}},
    ],
    ids=str,
)
def test_a_state_that_was_resealed_by_hand_counts_as_damage(changes: dict[str, Any], run: Path) -> None:
    reseal(run / "checkpoints" / "step-00000004", lambda manifest: manifest["state"].update(changes))
    found, faults = CheckpointStore(run / "checkpoints").survey(accept=check_state)
    assert found == run / "checkpoints" / "step-00000002"
    assert list(faults) == ["step-00000004"] and "\n" not in faults["step-00000004"]


def test_the_older_checkpoint_is_taken_and_the_log_of_the_newer_one_kept(run: Path) -> None:
    reseal(run / "checkpoints" / "step-00000004", lambda manifest: manifest["state"].update(precision="int4"))
    lines = (run / "log.jsonl").read_text().splitlines()
    result = resume(run)
    check(result, 0, "skipping checkpoint step-00000004", "precision", "at step 2", "finished at step 4")
    kept = run / "log.before-step-00000002.jsonl"
    assert kept.read_text().splitlines() == lines, "the log of a checkpoint that is kept"
    assert len(read_losses(run)) == STEPS and f"are in {kept}" in result.output


@pytest.mark.parametrize(
    "setting",
    [
        "model.layers=RA",
        "model.quantize=false",
        "model.retention.decay=[4, 9]",
        "model.experts.top_k=1",
        "model.router.score_func=softmax",
        "model.router.norm_topk_prob=false",
        "model.experts.capacity_factor=1.5",
        "model.hidden_size=64",
    ],
)
def test_another_model_of_the_same_weights_is_refused(setting: str, finished: Path) -> None:
    config = load_config(finished.parent / "c.yaml", [setting, "training.steps=6"])
    with pytest.raises(UserError) as caught:
        describe_resume(finished / "checkpoints" / "step-00000004", config)
    key = setting.partition("=")[0]
    for words in (f"{key} is ", " in the checkpoint and ", f"set {key} to ", "run.folder"):
        assert words in str(caught.value)


def test_a_refused_change_leaves_everything_as_it_was(run: Path) -> None:
    before = (run / "config.yaml").read_bytes(), (run / "log.jsonl").read_bytes()
    result = resume(run, "model.layers=RA", "training.steps=6")
    check(result, 2, "model.layers is RR in the checkpoint and RA here", "set model.layers to RR")
    assert ((run / "config.yaml").read_bytes(), (run / "log.jsonl").read_bytes()) == before


def test_changes_that_a_resume_may_make_are_told(run: Path) -> None:
    settings = ("training.steps=6", "optimizer.weight_decay=0.05", "model.retention.chunk_size=16")
    before = (run / "config.yaml").read_bytes()
    check(resume(run, *settings, options=("--stop-after", "0")), 0)
    assert (run / "config.yaml").read_bytes() == before, "a session that saves nothing leaves the old configuration"
    result = resume(run, *settings)
    for change in ("training.steps 4 → 6", "optimizer.weight_decay 0.1 → 0.05", "model.retention.chunk_size 8 → 16"):
        assert f"changed since the checkpoint: {change}" in result.output, result.output
    check(result, 0, "the learning rate of step 5 is ", "finished at step 6")
    assert load_config(run / "config.yaml").training.steps == 6 and Run.open(run).step == 6


def test_growing_into_a_run_that_has_begun_is_named_as_without_effect(finished: Path) -> None:
    checkpoint = finished / "checkpoints" / "step-00000004"
    lines = describe_resume(checkpoint, load_config(finished.parent / "c.yaml", ["run.init_from=runs/other"]))
    assert "changed since the checkpoint: run.init_from null → runs/other" in lines
    assert any(line.startswith("run.init_from has no effect, as this run has begun") for line in lines)
    assert not any("init_from" in line for line in describe_resume(checkpoint, load_config(finished.parent / "c.yaml")))


def test_a_run_that_is_longer_than_asked_for_is_finished(run: Path) -> None:
    for _ in range(2):
        result = resume(run, "training.steps=3", "guard.stop_exit_code=75")
        check(result, 0, "training.steps 3 is less than the 4 steps done", "finished at step 4")


@pytest.mark.parametrize("given", ["", "checkpoints", "checkpoints/latest", "latest", "checkpoints/step-00000004"])
def test_a_run_and_its_latest_are_paths_to_resume_from(given: str, finished: Path, tmp_path: Path) -> None:
    newest = finished / "checkpoints" / "step-00000004"
    assert choose_checkpoint(CheckpointStore(tmp_path), str(finished / given)) == newest


def test_a_path_without_a_checkpoint_is_named(run: Path) -> None:
    store = CheckpointStore(run / "checkpoints")
    with pytest.raises(UserError, match="--resume atuo: no such checkpoint; use auto, must or never"):
        choose_checkpoint(store, "atuo")
    with pytest.raises(UserError, match=f"a run or a checkpoint; {run.parent} contains run$"):
        choose_checkpoint(store, str(run.parent / "none"))
    with pytest.raises(UserError, match=f"{store.folder} contains step-00000002, step-00000004$"):
        choose_checkpoint(store, str(store.folder / "step-00000077"))
    for name in ("step-00000002", "step-00000004"):
        truncate_manifest(run / "checkpoints" / name)
    with pytest.raises(UserError, match=r"can be used: .*step-00000002: "):
        choose_checkpoint(store, str(run))
    for resume_mode in ("must", "never"):
        with pytest.raises(UserError, match="step-00000004"):
            choose_checkpoint(store, resume_mode)


def test_a_resume_from_a_run_works_as_a_command(run: Path) -> None:
    check(resume(run, options=("--resume", str(run / "latest"))), 0, "step-00000004 at step 4", "finished at step 4")


def test_weights_that_are_not_finite_are_no_result(shards: Path, tmp_path: Path) -> None:
    wild = {"optimizer__learning_rate": 1e30, "optimizer__weight_decay": 1e10, "training__steps": 2}
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", **wild)
    result = train(config)
    check(result, 2, "the weights are not finite after step 2", "optimizer.learning_rate")
    assert "finished" not in result.output and not (tmp_path / "run" / "checkpoints").exists()


def test_a_grown_run_says_that_it_grew(run: Path, shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "g.yaml", shards, tmp_path / "grown", run__init_from=str(run))
    result = train(config, "--stop-after", "1")
    check(result, 0, f"grown from the run in {run}, as step 0 of this run")
    assert "resumed" not in result.output
    entries = [json.loads(line) for line in (tmp_path / "grown" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1]
