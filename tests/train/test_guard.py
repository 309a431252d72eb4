"""Bad steps change nothing; too many lead back to a checkpoint; what the guard remembers survives a restart."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from kabrn_dist.backend.losses import Losses
from kabrn_dist.checkpoint.store import load_tensor, read_manifest
from kabrn_dist.config import GuardConfig
from kabrn_dist.config.file import load_config
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.mesh import make_mesh, single_process_mesh
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.train.datasets import open_datasets
from kabrn_dist.train.guard import LossGuard, StepSync, sync_step
from kabrn_dist.train.spikes import SpikeWindow
from kabrn_dist.train.trainer import Trainer
from tests.support import fork_server
from tests.support.runs import read_losses, run_sessions, write_small_config
from tests.support.shard_sets import Texts, make_set

STEPS = 6
BAD = 4
# With one micro-batch a rank and step, the number of a step is that of its pass at `loss`.
ONE_PASS = {"training__global_batch_size": 4, "training__steps": STEPS, "validation__eval_sequences": 1}


def checkpoint(folder: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors of a run's checkpoint, and its state."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    manifest = read_manifest(path)
    return {name: load_tensor(path, manifest, name) for name in manifest.tensors}, dict(manifest.state)


CASES = [(zero, "fp32") for zero in (0, 1, 2, 3)] + [(0, "bf16"), (2, "bf16")]


def test_a_step_with_nan_on_one_rank_changes_nothing(shards: Path, tmp_path: Path) -> None:
    """In each case twice: in one session, and in two, of which the second knows nothing of the bad step's gradients."""
    jobs: list[list[object]] = []
    for zero, precision in CASES:
        changes = {
            "parallel__zero_stage": zero,
            "parallel__expert_parallel": 2 if zero % 2 else 1,
            "training__precision": precision,
        }
        often = {"checkpoint__save_interval": 1, "checkpoint__keep_last": STEPS}
        for name, stops in (("whole", [None]), ("parts", [BAD, None])):
            folder = tmp_path / f"{name}{zero}{precision}"
            path = write_small_config(tmp_path / f"{folder.name}.yaml", shards, folder, **changes, **often, **ONE_PASS)
            jobs += [[str(path), "auto", stop] for stop in stops]
    marks = ",".join(f"loss@1#{STEPS * run + BAD}:mark" for run in range(2 * len(CASES)))
    run_sessions(2, jobs, tmp_path, KABRN_FAULT=marks)
    for zero, precision in CASES:
        whole, parts = (tmp_path / f"{name}{zero}{precision}" for name in ("whole", "parts"))
        (before, state_before), (after, state_after) = checkpoint(whole, BAD - 1), checkpoint(whole, BAD)
        for name, values in before.items():
            assert torch.equal(values, after[name]), (zero, precision, name)
        assert state_after["updates"] == state_before["updates"] == BAD - 1
        assert (state_after["step"], state_after["guard"]["skipped"], state_after["guard"]["bad"]) == (BAD, 1, 1)
        assert len(read_losses(whole)) == STEPS - 1 and read_losses(parts) == read_losses(whole), (zero, precision)
        # What DeepSpeed has kept of the bad step's gradients would show in the weights after the next one.
        (first, state), (second, _) = checkpoint(whole, STEPS), checkpoint(parts, STEPS)
        assert all(torch.equal(values, second[name]) for name, values in first.items())
        assert state["updates"] == STEPS - 1


def test_the_run_names_step_positions_and_rank(shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", **ONE_PASS)
    ended = train(config, 2, KABRN_FAULT=f"loss@1#{BAD}:mark")
    assert ended.exit_codes == (0, 0), ended.output
    assert f"step      {BAD}  skipped: non-finite loss on rank 1, data positions [12, 16)" in ended.output, ended.output
    assert read_losses(tmp_path / "run", "guard/skipped") == [0.0] * (BAD - 1) + [1.0] * (STEPS - BAD + 1)
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_a_gradient_that_is_not_finite_is_noticed_at_every_stage(shards: Path, tmp_path: Path) -> None:
    """One expert's gradient alone, in one step, while every loss is finite."""
    jobs: list[list[object]] = []
    for zero in (0, 1, 2, 3):
        folder = tmp_path / str(zero)
        changes = {"parallel__zero_stage": zero, "parallel__expert_parallel": 2, **ONE_PASS}
        jobs.append([str(write_small_config(tmp_path / f"{zero}.yaml", shards, folder, **changes)), "never", None])
    ended = fork_server.run_ranks("tests.train.test_guard:spoil_gradients", [jobs, BAD], 2, 100)
    assert ended.exit_code == 0, ended.output
    assert ended.output.count(f"step      {BAD}  skipped: non-finite gradient on rank") == 4, ended.output
    for zero in (0, 1, 2, 3):
        assert len(read_losses(tmp_path / str(zero))) == STEPS
        assert checkpoint(tmp_path / str(zero), STEPS)[1]["updates"] == STEPS - 1


def spoil_gradients(jobs: list[list[Any]], step: int) -> None:
    """Run sessions in which the gradient of rank 1's experts is infinite at `step`. A process of the test above."""
    place = read_launch_env()
    with init_distributed(place) as device:
        for path, resume, stop_after in jobs:
            config = load_config(path)
            mesh = make_mesh(place, device, config.parallel.expert_parallel)
            session = Trainer.create(config, mesh, open_datasets(config), resume)
            spoiled = session.engine.model.select_parameters(lambda p: p.routed)[0]

            def spoil(gradient: torch.Tensor, session: Trainer = session, rank: int = mesh.rank) -> torch.Tensor:
                return gradient * math.inf if (rank, session.step) == (1, step - 1) else gradient

            spoiled.register_hook(spoil)
            with session:
                session.run(stop_after)
            session.engine.close()


def train(config: Path, world: int, **variables: str) -> fork_server.GroupResult:
    """launch/train.py to its end."""
    with fork_server.start_ranks("launch.train:main", [["--config", str(config)]], world, **variables) as group:
        return group.wait(100, grace=None)


@pytest.mark.parametrize("zero", [1, 3])
def test_bad_steps_lead_back_to_the_checkpoint_and_past_the_data(zero: int, shards: Path, tmp_path: Path) -> None:
    changes = {
        "parallel__zero_stage": zero,
        "training__steps": 9,
        "training__global_batch_size": 4,
        "guard__max_bad_steps": 2,
    }
    often = {"checkpoint__save_interval": 3, "checkpoint__keep_last": 9}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    paths = [write_small_config(tmp_path / f"{f.name}.yaml", shards, f, **changes, **often) for f in (whole, parts)]
    # Steps 4 and 5 are bad: back to 3, so the run takes 11 in all, and in the second run the eighth is taken again.
    jobs: list[list[object]] = [
        [str(paths[0]), "never", None],
        [str(paths[1]), "never", 5],
        [str(paths[1]), "must", None],
    ]
    run_sessions(2, jobs, tmp_path, KABRN_FAULT="loss@1#4:mark,loss@0#5:mark,loss@0#15:mark,loss@0#16:mark")
    for step in (6, 9):
        tensors, state = checkpoint(whole, step)
        again, resumed = checkpoint(parts, step)
        assert state["skipped_data_steps"] == 2 and state["cursor"]["consumed"] == (step + 2) * 4
        assert state["guard"] == resumed["guard"] and state["guard"]["rollbacks"] == 1
        assert all(torch.equal(values, again[name]) for name, values in tensors.items())
    entries = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in entries if "loss/total" in entry]
    assert steps == list(range(1, 10)), "what was taken back is not in the log"
    assert read_losses(whole) == read_losses(parts)


def test_a_run_ends_early_where_data_that_was_skipped_is_missing_at_the_end(tmp_path: Path) -> None:
    make_set(tmp_path / "set", Texts("once", train=20, epochs=1))
    changes = {
        "training__global_batch_size": 4,
        "guard__max_bad_steps": 2,
        "checkpoint__save_interval": 3,
        "guard__stop_exit_code": 75,
    }
    config = write_small_config(tmp_path / "c.yaml", tmp_path / "set", tmp_path / "run", **changes)
    sequences = open_datasets(load_config(config)).train.num_positions
    assert sequences is not None
    steps = sequences // 4
    config = write_small_config(
        tmp_path / "c.yaml", tmp_path / "set", tmp_path / "run", training__steps=steps, **changes
    )
    ended = train(config, 2, KABRN_FAULT="loss@1#4:mark,loss@1#5:mark")
    assert ended.exit_codes == (0, 0) and f"finished at step {steps - 2}" in ended.output, ended.output
    again = train(config, 2)
    assert again.exit_codes == (0, 0) and f"finished at step {steps - 2}" in again.output, again.output


def test_a_run_that_keeps_failing_stops_and_saves_nothing(shards: Path, tmp_path: Path) -> None:
    changes = {"training__global_batch_size": 4, "guard__max_bad_steps": 2, "checkpoint__save_interval": 2}
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", **changes)
    ended = train(config, 2, KABRN_FAULT=",".join(f"loss@0#{n}:mark" for n in range(3, 12)))
    assert ended.exit_codes == (2, 2), ended.output
    assert "2 bad steps in a row, up to step 4: back to step-00000002" in ended.output
    assert "the run has gone back to step 2 before" in ended.output
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")) == ["step-00000002"]
    fresh = write_small_config(tmp_path / "d.yaml", shards, tmp_path / "fresh", **changes)
    ended = train(fresh, 2, KABRN_FAULT="loss@0#1:mark,loss@0#2:mark")
    assert ended.exit_codes == (2, 2) and "no checkpoint to go back to" in ended.output, ended.output


def test_two_failed_saves_stop_the_run(shards: Path, tmp_path: Path) -> None:
    for background in (True, False):
        folder = tmp_path / str(background)
        changes = {"training__steps": 500, "checkpoint__save_interval": 2, "checkpoint__async_save": background}
        config = write_small_config(tmp_path / f"{background}.yaml", shards, folder, **changes)
        ended = train(config, 2, KABRN_FAULT="save.written@1#2:full,save.written@1#3:full")
        assert ended.exit_codes == (2, 2), ended.output
        assert "2 checkpoints in a row could not be saved" in ended.output
        assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000002"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_fp16_begins_with_its_own_scale_after_another_precision(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = write_small_config(tmp_path / "a.yaml", shards, folder, training__precision="bf16")
    second = write_small_config(tmp_path / "b.yaml", shards, folder, training__precision="fp16")
    run_sessions(1, [[str(first), "auto", 2], [str(second), "must", 1]], tmp_path)
    _, state = checkpoint(folder, 3)
    # The first step may overflow and halve it.
    assert state["loss_scale"] in (2.0**16, 2.0**15) and state["precision"] == "fp16"


@pytest.mark.parametrize(("mode", "skipped"), [("off", 0), ("warn", 0), ("skip", 1)])
def test_spikes(mode: str, skipped: int) -> None:
    guard = LossGuard(GuardConfig(spike=mode, spike_window=8, spike_sigma=4.0))
    losses = [3 + 0.01 * (n % 3) for n in range(10)]
    for loss in [*losses, 5.0, *losses]:
        verdict = guard.decide(agreed(loss))
        assert (verdict.kind == "spike") == (mode != "off" and loss == 5.0)
        guard.record(verdict, agreed(loss), applied=not verdict.skip)
    assert (guard.skipped, guard.spikes, guard.bad) == (skipped, int(mode != "off"), 0)
    assert (5.0 in guard.window.losses) is False
    other = LossGuard(guard.config)
    other.restore(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state() and other.window.limit() == guard.window.limit()


def agreed(loss: float, bad: list[int] | None = None) -> StepSync:
    return StepSync(dict.fromkeys(Losses._fields, loss), bad or [], [], stop=False, save_done=False)


def test_spikes_are_skipped_alike_after_a_resume(shards: Path, tmp_path: Path) -> None:
    # A rate of next to nothing: what differs from step to step is the data, and half a deviation is soon exceeded.
    guard = {"spike": "skip", "spike_window": 8, "spike_sigma": 0.5}
    changes = {
        "training__steps": 18,
        "training__global_batch_size": 4,
        "optimizer__learning_rate": 1e-9,
        "guard": guard,
    }
    folders = [tmp_path / "whole", tmp_path / "parts"]
    whole, parts = (
        str(write_small_config(tmp_path / f"{f.name}.yaml", shards, f, validation__eval_sequences=1, **changes))
        for f in folders
    )
    run_sessions(2, [[whole, "never", None], [parts, "never", 11], [parts, "must", None]], tmp_path)
    states = [checkpoint(folder, 18)[1] for folder in folders]
    assert states[0]["guard"] == states[1]["guard"] and read_losses(folders[0]) == read_losses(folders[1])
    skipped = states[0]["guard"]["skipped"]
    assert skipped == states[0]["guard"]["spikes"] > 0 == states[0]["guard"]["bad"]
    assert states[0]["updates"] == 18 - skipped and len(read_losses(folders[0])) == 18


def test_a_window_of_absurd_losses_has_a_limit() -> None:
    # A checkpoint may come from a stranger, and JSON holds numbers whose sum or square overflows.
    for losses in ([1e308] * 8, [-1e308, 1e308] * 4, [1e200, 1.0] * 4):
        window = SpikeWindow(8, 3.0, patience=3)
        window.restore(losses, 0)
        assert math.isfinite(window.limit()) and not window.is_spike(5.0)


def test_the_limit_of_a_spike_and_a_new_level() -> None:
    window = SpikeWindow(8, 3.0, patience=3)
    losses = [2.0 + 0.1 * math.sin(n) for n in range(20)]
    for number, loss in enumerate(losses):
        last = losses[max(0, number - 8) : number]
        assert window.limit() == (
            math.inf if number < 8 else pytest.approx(statistics.fmean(last) + 3 * statistics.pstdev(last))
        )
        assert not window.is_spike(loss)
        window.add(loss)
    assert [window.is_spike(4.0) for _ in range(4)] == [True, True, True, False]
    assert window.limit() == math.inf


def test_bad_steps_are_counted_in_a_row_only() -> None:
    guard = LossGuard(GuardConfig(max_bad_steps=2))
    for bad, exhausted in (([1], False), ([], False), ([0], False), ([0, 3], True)):
        verdict = guard.decide(agreed(1.0, bad))
        assert verdict.skip == bool(bad) and guard.exhausted == exhausted
    assert verdict.reason == "non-finite loss on ranks 0, 3"
    guard.roll_back(7, {"skipped": 0, "bad": 1})
    assert (guard.bad, guard.rollbacks, guard.returned_to) == (0, 1, 7)


def test_what_one_rank_says() -> None:
    fine, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    losses = torch.arange(5.0)
    assert sync_step(single_process_mesh(), losses, fine, False, True) == StepSync(
        dict(zip(Losses._fields, range(5), strict=True)), [], [], False, True
    )
    assert sync_step(single_process_mesh(), losses, bad, True, False)[1:] == ([], [0], True, False)
    assert sync_step(single_process_mesh(), losses * bad, bad, False, False)[1:3] == ([0], [])


def test_steps_without_targets_change_nothing_and_show_no_figures(tmp_path: Path) -> None:
    make_set(tmp_path / "set", Texts("qa", 4, 2, (4000, 5000), masked=True, targets=0.0))
    config = write_small_config(
        tmp_path / "c.yaml", tmp_path / "set", tmp_path / "run", **ONE_PASS, guard__spike="skip"
    )
    with fork_server.start_ranks("launch.train:main", [["--config", str(config)]], 2) as group:
        ended = group.wait(60)
    assert ended.exit_codes == (0, 0), ended.output
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "optimizer/learning_rate" in entry]
    empty = [entry["step"] for entry in steps if "loss/language" not in entry]
    assert len(empty) >= STEPS - 2 and ended.output.count("loss -") == len(empty)
    assert all(("loss/total" in entry) == (entry["step"] not in empty) for entry in steps)
    assert ended.output.count(f"step{empty[0]:7d}  warning: none of its 128 tokens is a target") == 1
    assert ended.output.count("is a target") == 1 + ended.output.count("none of its tokens is a target")
    assert "0.0000" not in ended.output and not any("validation/loss" in entry for entry in entries)
    state = checkpoint(tmp_path / "run", STEPS)[1]
    assert state["updates"] == STEPS - len(empty) == len(state["guard"]["window"])
    assert state["guard"]["skipped"] == len(empty) and state["guard"]["bad"] == 0


@pytest.mark.parametrize("world", [1, 2])
def test_a_model_that_diverged_says_so_to_the_end(shards: Path, tmp_path: Path, world: int) -> None:
    """Outputs that are not finite have no sample, and their loss is told as what it is."""
    config = write_small_config(
        tmp_path / "c.yaml",
        shards,
        tmp_path / "run",
        training__steps=3,
        training__log_interval=1,
        optimizer__learning_rate=1e12,
        optimizer__warmup_steps=0,
        validation__eval_interval=3,
        validation__sample_tokens=4,
    )
    ended = fork_server.run_ranks("launch.train:main", [["--config", str(config)]], world)
    assert ended.exit_code == 0 and "Traceback" not in ended.output, ended.output
    assert "validation: the loss is not finite; lower optimizer.learning_rate" in ended.output
    assert "sample: (none: the model's outputs are not finite)" in ended.output
    assert "the last 2 steps were bad ones and changed nothing; lower optimizer.learning_rate 1e+12" in ended.output
