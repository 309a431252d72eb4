"""Real training in tests: a small set of shards, a small configuration, and processes as a launcher starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from kabrn_dist.distributed.launch_env import free_port
from tests.support import fork_server

ROOT = Path(__file__).parents[2]

SMALL_CONFIG: dict[str, Any] = {
    "data": {"sequence_length": 32},
    "model": {
        "vocab_size": 257,
        "hidden_size": 32,
        "layers": 2,
        "retention": {"num_heads": 2, "key_dim": 8, "value_dim": 16, "decay": [1.5, 7], "chunk_size": 8},
        "experts": {
            "type": "rational",
            "num_experts": 4,
            "num_shared_experts": 1,
            "top_k": 2,
            "expert_hidden_size": 24,
            "function_groups": 4,
        },
    },
    # Elements whose gradient is summation noise would otherwise move by a full learning rate, in either direction.
    "optimizer": {"learning_rate": 3.0e-3, "warmup_steps": 2, "max_grad_norm": 0.5, "eps": 1.0e-5},
    "training": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "log_interval": 1},
    "validation": {"eval_interval": 0, "eval_sequences": 5, "sample_tokens": 0},
    "checkpoint": {"save_interval": 0},
}


@dataclass(frozen=True)
class CommandResult:
    """Result of a finished command.

    Attributes:
        exit_code: its exit code; negative: the signal that ended it.
        output: stdout and stderr together.
    """

    exit_code: int
    output: str


def start_command(command: list[str], **variables: str) -> subprocess.Popen[str]:
    """Start a command in the repository's root, one thread per process, stdout and stderr in one pipe."""
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_exit(process: subprocess.Popen[str], timeout: int = 300) -> CommandResult:
    """Wait for a started command to end; kill it after `timeout` seconds, which fails the test."""
    try:
        out, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return CommandResult(process.returncode, out)


def run_command(command: list[str], timeout: int = 300, **variables: str) -> CommandResult:
    """Run a command and wait for its end."""
    return wait_for_exit(start_command(command, **variables), timeout)


def wait_for_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> None:
    """Wait until a training run in `folder` has logged `steps` steps."""
    log = folder / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= steps):
        assert process.poll() is None and time.monotonic() < deadline, "the run did not start"
        time.sleep(0.05)


def torchrun_command(world: int, script: str, *arguments: str) -> list[str]:
    """Return the command that starts `world` processes of a script with torchrun."""
    # It finds its own port: one that was free a second ago may be taken by another test's process by now.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    return [*launcher, script, *arguments]


def deepspeed_command(world: int, script: str, *arguments: str) -> list[str]:
    """Return the command that starts `world` processes of a script with the deepspeed launcher."""
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_gpus", str(world), "--master_port", str(free_port()), script, *arguments]


def make_shards(folder: Path, *options: str) -> Path:
    """Prepare shards of a few files of the standard library with the real command, byte-level by default."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [str(library / name) for name in ("textwrap.py", "bisect.py", "heapq.py", "string.py", "keyword.py")]
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for file in files:
        (texts / Path(file).with_suffix(".txt").name).write_text(Path(file).read_text(encoding="utf-8"))
    tokenizer = options or ("--tokenizer", "bytes")
    share = ("--validation-share", "0.2")
    command = [sys.executable, "-m", "data_prep", "--source", "text", "--input", str(texts), "--out"]
    result = run_command([*command, str(folder / "shards"), *tokenizer, *share])
    assert result.exit_code == 0, result.output
    return folder / "shards"


def write_small_config(path: Path, shards: Path, folder: Path, **changes: Any) -> Path:
    """Write SMALL_CONFIG with `changes` as YAML; `training__steps=3` sets training.steps, None leaves a key out."""
    tree = json.loads(json.dumps(SMALL_CONFIG)) | {"run": {"folder": str(folder), "seed": 3}}
    tree["data"]["path"] = str(shards)
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    tree = {key: value for key, value in tree.items() if value is not None}
    path.write_text(yaml.safe_dump(tree))
    return path


def read_losses(folder: Path, key: str = "loss/total") -> list[float]:
    """Read one value per step from the log of a run."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [entry[key] for entry in map(json.loads, lines) if key in entry]


def check_ternary_losses(found: list[float], expected: list[float], name: str) -> None:
    """Losses of two layouts with ternary matrices, which part a little once a rounding has flipped a first code.

    Which code it is, and when, is the processor's to say: a bound for one step must be wide, that of the mean need not.
    """
    apart = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    assert max(apart) <= 5e-3 and sum(apart) <= 1e-3 * len(apart), (name, apart)


def run_sessions(world: int, jobs: list[list[object]], folder: Path, timeout: int = 300, **variables: str) -> None:
    """Run [configuration file, resume, stop_after] jobs one after another in one group of `world` processes."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_worker(world, "tests.workers.sessions", str(folder / "jobs.json"), timeout=timeout, **variables)


def run_training(world: int, *options: str, timeout: int = 300, **variables: str) -> CommandResult:
    """Run `launch/train.py` with `options` in `world` processes, as `run_launch_script` does."""
    return run_launch_script("train", *options, world=world, timeout=timeout, **variables)


def run_launch_script(name: str, *options: str, world: int = 1, timeout: int = 300, **variables: str) -> CommandResult:
    """Run a script of launch/ in processes that are forked from one that has imported what they need.

    A launcher's own processes, and imports in each rank, cost seconds: tests that are not about these do without.
    """
    if torch.cuda.is_available():
        return run_command(torchrun_command(world, f"launch/{name}.py", *options), timeout, **variables)
    ended = fork_server.run_ranks(f"launch.{name}:main", [list(options)], world, timeout, **variables)
    return CommandResult(ended.exit_code, ended.output)


def run_worker(world: int, worker: str, *arguments: str, timeout: int = 300, **variables: str) -> None:
    """Run `main` of the module `worker` in `world` processes, all of which must succeed."""
    if torch.cuda.is_available():
        # DeepSpeed looks for cards when it is imported, and a process that has looked cannot share one with its forks.
        result = run_command(
            torchrun_command(world, worker.replace(".", "/") + ".py", *arguments), timeout, **variables
        )
        assert result.exit_code == 0, result.output
        return
    result = fork_server.run_ranks(f"{worker}:main", arguments, world, timeout, **variables)
    assert result.exit_code == 0, result.output
