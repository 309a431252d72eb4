"""One model of `benchmarks/step.py` alone in its process, or in one of several: its memory, and its time.

As a program, `MODEL CASE`, the case as JSON: takes a few steps and prints the most memory that this process ever held
beyond what it held before the model was built, in bytes, and the seconds of the fastest step.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence

import torch.distributed as dist

from benchmarks.step_models import MODELS, Case
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.utils.malloc import keep_freed_memory

STEPS = 3


def peak_bytes() -> int:
    """Return the most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str]) -> int:
    """Take the steps and print both figures on rank 0.

    Returns:
        The exit code.
    """
    name, case = arguments[0], Case(**json.loads(arguments[1]))
    keep_freed_memory()
    with init_distributed(read_launch_env()):
        before = peak_bytes()
        trainee = MODELS[name](case)
        if isinstance(trainee, str):
            raise RuntimeError(trainee)
        best = float("inf")
        for _ in range(STEPS):
            begin = time.perf_counter()
            trainee.forward_backward()
            trainee.update()
            best = min(best, time.perf_counter() - begin)
        if dist.get_rank() == 0:
            print(f"\n{peak_bytes() - before} {best:.6f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
