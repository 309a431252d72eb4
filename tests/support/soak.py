"""`make soak`: a run on four processes is killed, stopped, hung and damaged for half an hour, and must lose nothing.

Laps take turns. In one kind the layout stays, and the losses must be those of an uninterrupted run bit for bit; in the
other each start has another layout (ZeRO stage, slices, experts of each rank), and the losses must be at parity.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from kabrn_dist.checkpoint.layout import list_checkpoints, step_of
from kabrn_dist.checkpoint.store import CheckpointStore
from tests.checkpoint.test_reshard import SMALLER, layout
from tests.support import fork_server
from tests.support.runs import make_shards, write_small_config

WORLD = 4
# Between layouts, with the quantisers off. Differences of summation order grow with every step, so laps that change
# their layout are shorter.
PARITY = 1e-5
STEPS = {False: 120, True: 60}
HANG_SECONDS = 10.0
# As long as a launcher that has lost a rank leaves the others.
GRACE = 1.0
COMMON: dict[str, Any] = SMALLER | {
    "checkpoint__save_interval": 2,
    "checkpoint__keep_last": 3,
    "guard__hang_timeout_s": HANG_SECONDS,
}
POINTS = ("save.begin", "save.written", "save.manifest", "save.before_rename", "save.renamed", "save.before_prune")


class Lap:
    """One run, from its first step to its last, in as many sessions as it takes.

    Attributes:
        moves: each session has another layout; else the layout of `zero` stays.
        steps: of the whole run.
    """

    def __init__(self, number: int, moves: bool, zero: int, shards: Path, folder: Path) -> None:
        self.name, self.moves, self.zero, self.steps = f"lap-{number}", moves, zero, STEPS[moves]
        self.shards, self.folder = shards, folder
        self.run = folder / self.name
        self.store = CheckpointStore(self.run / "checkpoints")

    def start(self, chance: random.Random, **variables: str) -> fork_server.RankGroup:
        zero = chance.randrange(4) if self.moves else self.zero
        changes = COMMON | layout(WORLD, zero) | {"training__steps": self.steps}
        changes["checkpoint__async_save"] = chance.random() < 0.7
        config = write_small_config(self.folder / f"{self.name}.yaml", self.shards, self.run, **changes)
        return fork_server.start_ranks("launch.train:main", [["--config", str(config)]], WORLD, **variables)

    def newest(self) -> int:
        """Step of the newest checkpoint that is intact; 0 where there is none."""
        found = self.store.find_latest()
        return step_of(found) if found else 0

    def losses(self) -> dict[int, float]:
        """Step → loss, of what is logged now."""
        log = self.run / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return {entry["step"]: entry["loss/total"] for entry in map(json.loads, lines) if "loss/total" in entry}


class Soak:
    """Laps, what was done to them, and what must not have happened."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.chance = folder, random.Random(seed)
        self.shards = make_shards(folder / "data")
        # Its start is no part of a run's length.
        fork_server.shared_server().request(poll=[])
        self.began = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.lost, self.unequal, self.apart = 0, 0, 0.0
        self.violations: list[str] = []
        self.references: dict[tuple[bool, int], dict[int, float]] = {}
        self.length = 0.0

    def reference(self, moves: bool, zero: int) -> dict[int, float]:
        """Losses of such a run that is left in peace in one layout."""
        if (moves, zero) not in self.references:
            lap = Lap(-1 - len(self.references), moves, zero, self.shards, self.folder)
            lap.moves = False
            began = time.monotonic()
            with lap.start(self.chance) as group:
                ended = group.wait(timeout=600)
            assert ended.exit_code == 0, ended.output
            self.length = self.length or time.monotonic() - began
            losses = self.references[moves, zero] = lap.losses()
            self.tell(f"reference of ZeRO {zero}: {lap.steps} steps, loss {losses[lap.steps]:.4f}")
        return self.references[moves, zero]

    def lap(self, number: int, until: float) -> None:
        """One lap, or as much of it as time allows."""
        lap = Lap(number, number % 2 == 1, number // 2 % 4, self.shards, self.folder)
        reference = self.reference(lap.moves, 0 if lap.moves else lap.zero)
        events: list[Callable[[Lap], str]] = [
            self.kill_one, self.kill_all, self.kill_at_point, self.stop, self.hang, self.flip, self.leave
        ]  # fmt: skip
        while time.monotonic() < until:
            before = lap.newest()
            what = self.chance.choices(events, weights=[4, 4, 4, 2, 1, 2, 2])[0](lap)
            self.check(lap, reference, before, what)
            if lap.newest() == lap.steps:
                self.counts["laps"] += 1
                break
        if not self.violations:
            shutil.rmtree(lap.run, ignore_errors=True)

    # Each event is one session: it starts the run, does something to it, and says what.

    def kill_one(self, lap: Lap) -> str:
        rank = self.chance.randrange(WORLD)
        return self.session(lap, lambda group: group.kill(rank), f"SIGKILL of rank {rank}", "kill")

    def kill_all(self, lap: Lap) -> str:
        return self.session(lap, lambda group: group.kill(), "SIGKILL of all", "kill")

    def kill_at_point(self, lap: Lap) -> str:
        fault = f"{self.chance.choice(POINTS)}#{self.chance.randint(1, 4)}:kill"
        return self.session(lap, None, f"fault {fault}", "kill", KABRN_FAULT=fault)

    def stop(self, lap: Lap) -> str:
        rank = self.chance.randrange(WORLD)

        def term(group: fork_server.RankGroup) -> None:
            self.wait_for_step(lap, group)
            group.kill(rank, signal.SIGTERM)

        return self.session(lap, term, f"SIGTERM to rank {rank}", "stop")

    def hang(self, lap: Lap) -> str:
        rank = self.chance.randrange(WORLD)

        def freeze(group: fork_server.RankGroup) -> None:
            self.wait_for_step(lap, group)
            group.kill(rank, signal.SIGSTOP)

        return self.session(lap, freeze, f"SIGSTOP of rank {rank}", "hang")

    def flip(self, lap: Lap) -> str:
        """One bit of the newest checkpoint, and then a kill as any other."""
        found = lap.store.find_latest()
        files = sorted(found.iterdir()) if found else []
        if found is None or len(list_checkpoints(lap.store.folder)) < 2:
            return self.kill_all(lap)
        file = self.chance.choice(files)
        data = bytearray(file.read_bytes())
        place = self.chance.randrange(len(data))
        data[place] ^= 1 << self.chance.randrange(8)
        file.write_bytes(data)
        self.counts["flips"] += 1
        return f"bit of {found.name}/{file.name} flipped; " + self.kill_one(lap)

    def leave(self, lap: Lap) -> str:
        """What a crash may leave."""
        step = lap.newest() + self.chance.choice([1, 2, 4])
        leftover = lap.store.folder / f"step-{step:08d}.tmp"
        leftover.mkdir(parents=True, exist_ok=True)
        (leftover / "rank-00000.safetensors").write_bytes(self.chance.randbytes(1000))
        self.counts["leftovers"] += 1
        return f"{leftover.name} left; " + self.kill_all(lap)

    def session(
        self, lap: Lap, do: Callable[[fork_server.RankGroup], None] | None, what: str, kind: str, **variables: str
    ) -> str:
        """One start of the run, at whose random moment `do` is done. Returns what happened, for people."""
        expected = lap.newest()
        with lap.start(self.chance, **variables) as group:
            delay = self.chance.uniform(0.02, 0.5) * self.length
            deadline = time.monotonic() + delay
            while time.monotonic() < deadline and None in group.exit_codes():
                time.sleep(0.01)
            if do is not None and None in group.exit_codes():
                do(group)
            # The watchdogs of the others speak first; only then the launcher would end the one that hangs.
            ended = group.wait(timeout=60 + 3 * HANG_SECONDS, grace=GRACE)
        self.counts["sessions"] += 1
        if self.check_session(lap, ended, expected, kind):
            return f"{what} after {delay:.1f} s"
        return f"no {what}, finished first"

    def check_session(self, lap: Lap, ended: fork_server.GroupResult, expected: int, kind: str) -> bool:
        """Where it went on, and how it ended; False where it finished before anything was done to it."""
        out = " ".join(ended.output.split())
        if "resumed from" in out:
            self.counts["resumes"] += 1
            resumed = int(out.split(" at step ")[1].split()[0])
            self.lost += max(0, expected - resumed)
            self.demand(resumed == expected, f"{lap.name}: resumed at {resumed}, {expected} was committed", ended)
        # After its end nothing listens to a signal any more, and nothing is left to lose.
        if "finished at step" in out and (ended.exit_code == 0 or kind in ("stop", "hang")):
            self.counts["finished first"] += 1
            return False
        if kind == "stop":
            self.counts["stops"] += 1
            self.demand(
                ended.exit_codes == (0,) * WORLD and "stopped at step" in out, f"{lap.name}: no clean stop", ended
            )
        elif kind == "hang":
            self.counts["hangs"] += 1
            self.demand(ended.exit_code == 70 and "made no progress" in out, f"{lap.name}: no watchdog", ended)
        else:
            self.counts["kills"] += 1
            self.demand(
                ended.exit_code == -signal.SIGKILL, f"{lap.name}: ended by itself with {ended.exit_codes}", ended
            )
        return True

    def check(self, lap: Lap, reference: dict[int, float], before: int, what: str) -> None:
        """What is on disk now: nothing that was committed is lost, and every loss is the reference's."""
        newest, losses = lap.newest(), lap.losses()
        flipped = "flipped" in what
        self.demand(newest >= before or flipped, f"{lap.name}: step {before} was committed, {newest} is the newest")
        self.demand(list(losses) == list(range(1, len(losses) + 1)), f"{lap.name}: steps logged {list(losses)}")
        apart = max((abs(loss - reference[step]) for step, loss in losses.items()), default=0.0)
        if lap.moves:
            self.apart = max(self.apart, apart)
            self.demand(apart <= PARITY, f"{lap.name}: losses {apart:.2g} apart")
        else:
            self.unequal += apart > 0
            self.demand(apart == 0, f"{lap.name}: losses are not bit-equal, {apart:.2g} apart")
        self.tell(f"{lap.name}{' moving' if lap.moves else ''}  {what}: step {len(losses)} logged, {newest} safe")

    def wait_for_step(self, lap: Lap, group: fork_server.RankGroup) -> None:
        """Before it the signal would find a process that does not listen yet."""
        while "  loss " not in group.output() and None in group.exit_codes():
            time.sleep(0.02)

    def demand(self, holds: bool, what: str, ended: fork_server.GroupResult | None = None) -> None:
        if not holds:
            self.violations.append(what)
            self.tell(f"VIOLATION {what}" + (f"\n{ended.exit_codes}\n{ended.output}" if ended else ""))

    def tell(self, text: str) -> None:
        seconds = int(time.monotonic() - self.began)
        print(f"[{seconds // 60:3d}:{seconds % 60:02d}] {self.counts['kills']:4d} kills  {text}", flush=True)

    def report(self) -> Report:
        report = Report("Soak: random kills on four processes")
        report.compare("minutes", (time.monotonic() - self.began) / 60, "–", "min")
        for name, count in sorted(self.counts.items()):
            report.compare(name, count, "–", "")
        report.at_most("steps lost beyond the last commit", self.lost, 0)
        report.at_most("sessions not bit-equal in the same layout", self.unequal, 0)
        report.at_most("largest difference of a loss in changing layouts", self.apart, PARITY)
        report.at_most("violations", len(self.violations), 0)
        return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of all chances; 0 (default) takes the clock's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts and aims there")
    options = parser.parse_args()
    seed = options.seed or int(time.time())
    folder = Path(tempfile.mkdtemp(prefix="kabrn-soak-"))
    print(f"seed {seed}, in {folder}", flush=True)
    # The checkpoints that it damages are no news.
    logging.getLogger("kabrn_dist").setLevel(logging.ERROR)
    soak = Soak(folder, seed)
    until, number = time.monotonic() + 60 * options.minutes, 0
    while time.monotonic() < until:
        soak.lap(number, until)
        number += 1
    report = soak.report()
    report.show()
    if options.json:
        report.write(options.json)
    if soak.violations:
        print("\n".join(soak.violations), f"\nkept in {folder}", sep="\n", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
