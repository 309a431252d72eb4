"""`mixkabrn train`: train a model, in this process or in several."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from kabrn_dist.cli import plan
from kabrn_dist.cli.arguments import Subparsers, add_command, add_config, non_negative_int, positive_int, whole_number

# A rank that fails prints its traceback first: what the other ranks print after that would hide the cause.
PEER_FAILURE_SECONDS = 2.0

DESCRIPTION = """Writes checkpoints, log.jsonl and TensorBoard events to run.folder, and resumes from the newest intact
checkpoint there. To stop a run cleanly, create the file STOP in its folder, press Ctrl-C, or send SIGTERM, SIGUSR1 or
SIGHUP to any of its processes: it saves, and the same command resumes.

`mixkabrn config` describes the keys of CONFIG. Several processes are started with --processes on one machine, or by a
launcher, as in the examples. In a checkout of the sources, launch/train.py --config CONFIG is the same command."""

EXAMPLES = """  mixkabrn train configs/tiny.yaml
  mixkabrn train configs/tiny.yaml --processes 2
  mixkabrn train configs/tiny.yaml --set training.steps=50 --set run.folder=runs/short
  mixkabrn train configs/tiny.yaml --stop-after 100
  mixkabrn train configs/finetune.yaml --set finetune.base=runs/tiny
  deepspeed --num_gpus 2 --module kabrn_dist train configs/tiny.yaml
  torchrun --nproc_per_node 2 -m kabrn_dist train configs/tiny.yaml
  mpirun -n 2 mixkabrn train configs/tiny.yaml
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn train`."""
    parser = add_command(
        subparsers, "train", run, "train a model as a configuration file describes", DESCRIPTION, EXAMPLES
    )
    add_config(parser, "YAML file of the run")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|must|never|PATH",
        help="auto (default): continue from the newest intact checkpoint in run.folder, if there is one; must: fail "
        "without one; never: fail with one; or the folder of a checkpoint, or of a run for its newest one",
    )
    parser.add_argument(
        "--stop-after",
        type=non_negative_int,
        metavar="N",
        help="train N steps, save and stop; the same command continues",
    )
    parser.add_argument(
        "--processes",
        type=positive_int,
        metavar="N",
        help="start N processes on this machine with DeepSpeed's launcher, one per GPU if there are GPUs "
        "(default: this process alone, or what a launcher has started)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the configuration, print the plan and stop")
    parser.add_argument("--world", type=positive_int, metavar="N", help="with --dry-run: number of processes")
    parser.add_argument("--local_rank", type=whole_number, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Train, or with --dry-run print the plan; return the exit code."""
    # DeepSpeed and torch take seconds to import: a mistake in the configuration is reported before that.
    config = plan.load(options)
    if options.dry_run:
        return plan.print_plan(config, options.world or options.processes)
    from kabrn_dist.data.locations import check_locations

    check_locations(config.data, config.model.vocab_size)
    if options.processes is not None and "RANK" not in os.environ:
        _start_processes(options.processes)
    from kabrn_dist.distributed.launch_env import read_launch_env
    from kabrn_dist.train.trainer import train
    from kabrn_dist.utils.errors import UserError

    # Caused by calls inside DeepSpeed: a user can do nothing about them.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    try:
        finished = train(config, read_launch_env(), options.resume, options.stop_after)
    except UserError:
        raise
    except Exception as error:
        _abort_rank(error)
    return 0 if finished else config.guard.stop_exit_code


def _start_processes(count: int) -> NoReturn:
    """Replace this process by DeepSpeed's launcher, which starts this command `count` times and passes signals on."""
    from kabrn_dist.distributed.launch_env import free_port

    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", str(count)]
    if not any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dri")):
        # The launcher would tell twice that it has found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    command = [*launcher, "--master_port", str(free_port()), "--module", "kabrn_dist", *sys.argv[1:]]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _abort_rank(error: Exception) -> NoReturn:
    """End this process after a failure that the other ranks do not share.

    They learn of it by the end of this process, and their own errors would only hide the cause.
    """
    from kabrn_dist.distributed.process_group import is_peer_failure

    rank = os.environ.get("RANK", "0")
    if is_peer_failure(error):
        # Whatever the launcher shows of several ranks, the cause comes first.
        time.sleep(PEER_FAILURE_SECONDS)
        print(f"rank {rank} exits because another rank failed", file=sys.stderr, flush=True)
    else:
        trace = "".join(traceback.format_exception(error))
        print(f"error on rank {rank}, which ends the run:\n{trace}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Leaving the process groups in order would wait for ranks that wait for this one.
    os._exit(1)
