"""SIGKILL to one rank or all, at every point of a save and a load and at any moment: nothing committed is ever lost.

Each start resumes what the last kill left and is the next one's victim, so one run suffers a whole list of kills. Its
losses must be those of a run that was left in peace, bit for bit.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kabrn_dist.checkpoint.layout import list_checkpoints, step_of
from kabrn_dist.checkpoint.manifest import MANIFEST_NAME
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.utils.errors import UserError
from tests.checkpoint.test_reshard import SMALLER, layout
from tests.support import fork_server
from tests.support.runs import ROOT, write_small_config

WORLD = 2
KEEP = 3
TINY: dict[str, Any] = {
    "data__sequence_length": 16,
    "model__hidden_size": 16,
    "model__layers": 1,
    "model__retention__num_heads": 1,
    "model__experts__expert_hidden_size": 8,
    "training__global_batch_size": 4,
    "parallel__expert_parallel": 2,
    "parallel__experts_per_rank": [3, 1],
    "parallel__zero_stage": 2,
    "validation__eval_sequences": 2,
    "checkpoint__save_interval": 1,
    "checkpoint__keep_last": KEEP,
}
# Points that all ranks pass, and those of the first rank alone.
SAVING = ("save.begin", "save.written")
COMMITTING = ("save.manifest", "save.before_rename", "save.renamed", "save.before_prune", "save.prune")
LOADING = ("load.manifest", "load.tensors", "load.done")
SUPERSEDE = "save.supersede"
COMMITTED = ("save.renamed", "save.before_prune")


@dataclass
class Victim:
    """A run that is started again after each kill.

    Attributes:
        steps: of the whole run. reference: losses of the same run left in peace.
    """

    config: Path
    folder: Path
    steps: int
    reference: list[float]

    def start(
        self, resume: str = "auto", background: bool = True, stop_after: int = 1000, **variables: str
    ) -> fork_server.RankGroup:
        arguments = ["--config", str(self.config), "--resume", resume, "--stop-after", str(stop_after)]
        arguments += ["--set", f"checkpoint.async_save={str(background).lower()}"]
        return fork_server.start_ranks("launch.train:main", [arguments], WORLD, **variables)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def newest(self) -> int:
        """Step of the newest checkpoint that can be loaded; 0 where there is none."""
        found = CheckpointStore(self.checkpoints).find_latest()
        return step_of(found) if found else 0

    def check_log(self) -> int:
        """The losses logged are the reference's, whatever was lost. Returns the last step logged."""
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        entries = [entry for entry in map(json.loads, lines) if "loss/total" in entry]
        steps = [entry["step"] for entry in entries]
        assert steps == list(range(1, len(steps) + 1)), f"a step is missing, or there twice: {steps}"
        assert [entry["loss/total"] for entry in entries] == self.reference[: len(steps)]
        return len(steps)

    def check_resumed(self, ended: fork_server.GroupResult, before: int) -> None:
        """What was committed is where it went on, unless it was killed earlier than that."""
        if before and "resumed from" in ended.output:
            # A long path may be folded.
            assert f" at step {before} " in " ".join(ended.output.split()) + " ", ended.output


def make_victim(shards: Path, folder: Path, steps: int) -> Victim:
    """A run that has taken no step yet, and its reference."""
    changes = TINY | {"training__steps": steps}
    whole = write_small_config(
        folder / "whole.yaml", shards, folder / "whole", **changes | {"checkpoint__save_interval": 0}
    )
    ended = fork_server.run_ranks("launch.train:main", [["--config", str(whole)]], WORLD)
    assert ended.exit_code == 0, ended.output
    lines = (folder / "whole" / "log.jsonl").read_text().splitlines()
    reference = [entry["loss/total"] for entry in map(json.loads, lines) if "loss/total" in entry]
    assert len(reference) == steps and reference[-1] < reference[0] - 0.1
    config = write_small_config(folder / "killed.yaml", shards, folder / "killed", **changes)
    return Victim(config, folder / "killed", steps, reference)


def finish(victim: Victim, resume: Path | None = None) -> None:
    """What is left of the run reaches its end, from its newest checkpoint or from `resume`."""
    last = step_of(resume) if resume else victim.newest()
    with victim.start(str(resume or "must")) as group:
        ended = group.wait()
    assert ended.exit_code == 0, ended.output
    assert victim.check_log() == victim.steps
    # Nothing is left of what was killed half-way. What the session began with stays.
    kept = {f"step-{step:08d}" for step in (last, *range(victim.steps, victim.steps - KEEP, -1))}
    assert {path.name for path in victim.checkpoints.iterdir() if path.suffix != ".superseded"} == {"latest", *kept}


def strike(victim: Victim, point: str, rank: int | None, background: bool, resume: str = "auto") -> None:
    """One start that is killed at `point`, in its second save; `rank` None: all of them."""
    before, count = victim.newest(), 2 if point in SAVING + COMMITTING else 1
    shared = point in SAVING + LOADING
    where = f"{point}@{rank or 0}" if rank is not None or not shared else point
    with victim.start(resume, background, KABRN_FAULT=f"{where}#{count}:kill") as group:
        # The launcher's part: the others follow, at once or when they had their second.
        ended = group.wait(timeout=60, grace=0.2 if rank is not None else 0.0)
    assert ended.exit_code == -signal.SIGKILL, (point, rank, ended.exit_codes, ended.output)
    # Where all ranks are struck, the first of them may end the others before they reach the point themselves.
    struck = ended.exit_codes if rank is None else ended.exit_codes[rank : rank + 1]
    assert -signal.SIGKILL in struck, (point, rank, ended.exit_codes, ended.output)
    if resume == "auto":
        victim.check_resumed(ended, before)
        # Pruning is passed once for each that is removed, twice in one save after a kill before it.
        earliest = before + (count - 1) + (point in COMMITTED)
        assert victim.newest() >= earliest, (point, rank, f"{earliest} was committed", ended.output)
    victim.check_log()


def test_every_point_that_the_code_names_is_struck() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "kabrn_dist" / "checkpoint").glob("*.py"))
    named = set(re.findall(r'"((?:save|load)\.[a-z_]+)"', sources))
    assert named == {*SAVING, *COMMITTING, *LOADING, SUPERSEDE}


@pytest.mark.parametrize("background", [False, True])
def test_a_kill_at_any_point_loses_nothing_that_was_committed(background: bool, shards: Path, tmp_path: Path) -> None:
    victim = make_victim(shards, tmp_path, steps=90)
    with victim.start(background=background) as group:
        while victim.newest() < KEEP:
            assert None in group.exit_codes(), group.output()
    # Loading is the same in both.
    for point in SAVING if background else SAVING + LOADING:
        for rank in (0, 1, None):
            strike(victim, point, rank, background)
    for point in COMMITTING:
        for rank in (0, None):
            strike(victim, point, rank, background)
    # Back behind what is there: newer checkpoints are superseded, and one of the same step is replaced.
    older = [path for path in list_checkpoints(victim.checkpoints) if (path / MANIFEST_NAME).exists()][-1]
    for rank in (0, None):
        strike(victim, SUPERSEDE, rank, background, str(older))
    finish(victim, older)


def test_a_kill_at_any_moment_loses_nothing_that_was_committed(shards: Path, tmp_path: Path) -> None:
    """Sessions of three steps, each ended at some moment between the start of its processes and their end."""
    victim, chance = make_victim(shards, tmp_path, steps=110), random.Random(5)
    kills, length = 0, 0.0
    while kills < 30:
        before, rank = victim.newest(), chance.choice([0, 1, None])
        assert before < victim.steps, f"{kills} kills only"
        began = time.monotonic()
        with victim.start(background=kills % 2 == 0, stop_after=3) as group:
            if length:
                time.sleep(chance.uniform(0.05, 0.95) * length)
                group.kill(rank)
            ended = group.wait(timeout=60, grace=0.2)
        # The first tells how long they take.
        length = length or time.monotonic() - began
        kills += ended.exit_code != 0
        victim.check_resumed(ended, before)
        assert victim.newest() >= before
        victim.check_log()
    finish(victim)


def test_who_is_left_alone_ends(shards: Path, tmp_path: Path) -> None:
    """Without a launcher: a rank whose neighbour was killed notices it, in training and in a save beside it."""
    victim = make_victim(shards, tmp_path, steps=40)
    for point, rank in itertools.product(("step.begin", "save.written"), (0, 1)):
        with victim.start(KABRN_FAULT=f"{point}@{rank}#4:kill") as group:
            ended = group.wait(timeout=60, grace=None)
        assert ended.exit_codes[rank] == -signal.SIGKILL and ended.exit_codes[1 - rank] > 0, ended.output
        assert "exits because another rank failed" in ended.output, ended.output
        victim.check_log()


def test_each_rig_that_comes_back_is_another_one(shards: Path, tmp_path: Path) -> None:
    """World 4 → 2 → 3 → 1 → 6, another placement, slicing and ZeRO stage each time, and each but the last killed."""
    folder, steps = tmp_path / "run", 20
    common = SMALLER | {"training__steps": steps, "checkpoint__save_interval": 1, "checkpoint__keep_last": 2}
    whole = write_small_config(tmp_path / "whole.yaml", shards, tmp_path / "whole", **common | layout(1, 1))
    assert fork_server.run_ranks("launch.train:main", [["--config", str(whole)]]).exit_code == 0
    losses: dict[int, float] = {}
    for world, zero in ((4, 1), (2, 3), (3, 2), (1, 0), (6, 2)):
        config = write_small_config(tmp_path / f"{world}.yaml", shards, folder, **common | layout(world, zero))
        fault = {} if world == 6 else {"KABRN_FAULT": "step.begin#5:kill"}
        with fork_server.start_ranks("launch.train:main", [["--config", str(config)]], world, **fault) as group:
            ended = group.wait(timeout=120, grace=0.2)
        assert ended.exit_code == (-signal.SIGKILL if fault else 0), ended.output
        for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
            if "loss/total" in entry:
                losses[entry["step"]] = entry["loss/total"]
    reference = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    expected = {entry["step"]: entry["loss/total"] for entry in reference if "loss/total" in entry}
    assert set(losses) == set(expected) == set(range(1, steps + 1))
    assert max(abs(losses[step] - expected[step]) for step in expected) <= 1e-5
    manifest = CheckpointStore(folder / "checkpoints").check(folder / "checkpoints" / f"step-{steps:08d}")
    assert manifest.state["cursor"]["consumed"] == steps * common["training__global_batch_size"]
    with pytest.raises(UserError):
        CheckpointStore(folder / "checkpoints").check(folder / "checkpoints" / "step-00000001")
