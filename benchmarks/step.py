"""How fast is a whole training step, beside Transformers of as many active parameters, and where does its time go?

Forward, backward and optimizer step of three models (`benchmarks/step_models.py`), in turns, on the same tokens, in one
process with all cores; then in two processes, where ours shares its experts and the dense one averages its gradients.
The bound is the machine's own: a model needs six FLOPs for each active parameter and token, taken here at the rate of
large square products in the same precision. What a step takes beyond that is its distance to the floor.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.report import Report, measure, run
from benchmarks.step_models import MODELS, Case, Ours, Trainee
from benchmarks.step_parts import measure_parts
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.train.throughput import time_matmul
from kabrn_dist.utils.precision import TORCH_DTYPES

ROOT = Path(__file__).parent.parent
TIMED = ("ours", "dense", "Mixtral")
BATCH_TOKENS = 4096
MATMUL_SHAPE = (1024, 1024, 1024)
MEGA = 1e-6


def list_cases(quick: bool) -> Iterator[Case]:
    """Yield the shapes that are measured."""
    if quick:
        for precision in ("fp32", "bf16"):
            yield Case(128, 2, 256, 4, 8, 2, precision)
        return
    for width, layers in ((256, 4), (512, 8), (1024, 8)):
        for context in (512, 1024, 4096):
            for experts, top_k in ((8, 2), (64, 6)):
                for precision in ("fp32", "bf16"):
                    yield Case(width, layers, context, BATCH_TOKENS // context, experts, top_k, precision)


def questions(report: Report, quick: bool) -> None:
    """Fill the report: time, parts and memory of each shape."""
    with init_distributed(read_launch_env()):
        for case in list_cases(quick):
            one_process(report, case, 0.5 if quick else 40.0)
    # Each of these processes imports everything first: --quick has time for one shape.
    for case in list(list_cases(quick))[: 1 if quick else None]:
        apart(report, case)


def one_process(report: Report, case: Case, seconds: float) -> None:
    """Time one shape in this process, with all its cores."""
    built = {name: MODELS[name](case) for name in TIMED}
    trainees = {name: found for name, found in built.items() if not isinstance(found, str)}
    times = measure({name: _step(trainee) for name, trainee in trainees.items()}, seconds, rounds=2)
    ours = trainees["ours"]
    for name in TIMED[1:]:
        found = built[name]
        figure = found if isinstance(found, str) else case.tokens / times[name]
        report.compare(f"{case}, rate, rival: {name}", case.tokens / times["ours"], figure, "tokens/s")
    floor = 6 * ours.active * case.tokens / _matmul_rate(case.precision, seconds / 10)
    report.compare(f"{case}, step, rival: the floor", times["ours"], floor, "s")
    report.compare(f"{case}, all parameters, rival: active ones", ours.total, ours.active, "")
    assert isinstance(ours, Ours)
    parts = measure_parts(ours.parts(), ours.forward_backward, ours.update)
    whole = sum(parts.values())
    for part, spent in sorted(parts.items(), key=lambda item: -item[1]):
        report.compare(f"{case}, {part}, rival: whole step under the profiler", spent, whole, "s")
    _aim_at_speed(report, case, times)
    report.at_most(f"{case}: optimizer's share of a step", parts["optimizer"] / whole, 0.05)
    report.at_most(f"{case}: share of copies between types", parts.get("copies", 0.0) / whole, 0.03)
    ours.engine.close()


def _aim_at_speed(report: Report, case: Case, times: dict[str, float]) -> None:
    if case.precision == "fp32":
        aim = 1.3 if case.context >= 4096 else 1.0
    else:
        aim = 0.9 if torch.cpu._is_amx_tile_supported() else 1.0
    report.at_least(f"{case}: times the dense one's speed", times["dense"] / times["ours"], aim)
    mixtral = times.get("Mixtral")
    report.at_least(f"{case}: times Mixtral's speed", mixtral and mixtral / times["ours"], 1.5)


def _step(trainee: Trainee) -> Callable[[], None]:
    def step() -> None:
        trainee.forward_backward()
        trainee.update()

    return step


def _matmul_rate(precision: str, seconds: float) -> float:
    return time_matmul(torch.device("cpu"), TORCH_DTYPES[precision], MATMUL_SHAPE, seconds)


def apart(report: Report, case: Case) -> None:
    """Memory of each model in a process of its own, and the time of two processes together."""
    large = "dense of as many parameters in all"
    peaks = {name: _in_processes(name, case, 1) for name in ("ours", large, "Mixtral")}
    for name in (large, "Mixtral"):
        found = peaks[name]
        figure = found if isinstance(found, str) else found[0] * MEGA
        ours = peaks["ours"]
        report.compare(
            f"{case}, peak memory, rival: {name}", None if isinstance(ours, str) else ours[0] * MEGA, figure, "MB"
        )
    ours, rival = peaks["ours"], peaks[large]
    share = None if isinstance(ours, str) or isinstance(rival, str) else ours[0] / rival[0]
    report.at_most(f"{case}: peak memory over that of a dense one of as many parameters", share, 0.8)
    if case.rows < 2:
        return
    both = {name: _in_processes(name, case, 2) for name in ("ours", "dense")}
    rates = {name: each if isinstance(each, str) else case.tokens / each[1] for name, each in both.items()}
    mine = rates["ours"]
    report.compare(
        f"{case}, rate of two processes, rival: dense",
        None if isinstance(mine, str) else mine,
        rates["dense"],
        "tokens/s",
    )


def _in_processes(name: str, case: Case, world: int) -> tuple[int, float] | str:
    """The most bytes of rank 0 and the seconds of a step, or why there are none."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command += ["-m", "benchmarks.step_worker", name, json.dumps(asdict(case))]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if "Error: " in line]
        reason = (reasons or ["it failed"])[0].split("Error: ", 1)[-1]
        return f"missing: {reason.removeprefix('missing: ')[:80]}"
    peak, seconds = done.stdout.split()[-2:]
    return int(peak), float(seconds)


if __name__ == "__main__":
    run("Whole training steps", questions)
