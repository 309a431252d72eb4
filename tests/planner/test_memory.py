"""The memory that a process can have."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from kabrn_dist.planner.memory import cgroup_memory, process_memory


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (["0::/user/job"], {"user/job/memory.max": "3000\n", "user/memory.max": "max\n"}, 3000),
        (["0::/user/job"], {"user/job/memory.max": "max\n", "user/memory.max": "2000\n"}, 2000),
        # In a container the folder that is named belongs to the host.
        (["0::/docker/1f"], {"memory.max": "1000\n"}, 1000),
        (["9:cpu,memory:/slurm/7", "0::/"], {"memory/slurm/7/memory.limit_in_bytes": "500\n"}, 500),
        (["3:cpuset:/a", "0::/"], {"memory.limit_in_bytes": "1\n", "a/memory.max": "2\n"}, math.inf),
        (["0::/"], {"memory.max": "what\n"}, math.inf),
        ([], {"memory.max": "10\n"}, math.inf),
    ],
)
def test_a_control_group_limits_memory(
    tmp_path: Path, groups: list[str], files: dict[str, str], expected: float
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_memory(groups, tmp_path) == expected


def test_processes_share_the_memory_of_a_machine() -> None:
    whole = process_memory(torch.device("cpu"), 1)
    assert whole > 2**20 and process_memory(torch.device("cpu"), 4) == whole / 4
