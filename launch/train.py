"""Train a MixKABRN. Start it with deepspeed, torchrun or mpirun for several processes, or plainly for one."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kabrn_dist.config import Config
from kabrn_dist.config.file import load_config
from kabrn_dist.utils.errors import UserError

AFTERMATH_SECONDS, HEARD_SECONDS = 2.0, 0.5

EXAMPLES = """examples:
  deepspeed --num_gpus 2 launch/train.py --config configs/tiny.yaml
  torchrun --nproc_per_node 2 launch/train.py --config configs/tiny.yaml
  mpirun -n 2 python launch/train.py --config configs/tiny.yaml
  python launch/train.py --config configs/tiny.yaml --set training.steps=50 --set run.folder=runs/short
  python launch/train.py --config configs/big.yaml --dry-run --world 64

To stop a run cleanly, create the file STOP in its folder, press Ctrl-C, or send SIGTERM or SIGUSR1 to any of its
processes: it saves, and the same command resumes.
"""


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        config = load_config(options.config, options.set)
        if options.dry_run:
            return dry_run(config, options.world or int(os.environ.get("WORLD_SIZE", 1)))
        # DeepSpeed and torch take seconds to import: a mistake in the configuration has been reported by now.
        from kabrn_dist.distributed.launch_env import read_launch_env
        from kabrn_dist.train.trainer import train

        place = read_launch_env()
        # Of calls that DeepSpeed makes: nobody who trains can do anything about it.
        warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        finished = train(config, place, options.resume, options.stop_after)
    except UserError as error:
        return report(error)
    except Exception as error:
        give_up(error)
    return 0 if finished else config.guard.stop_exit_code


def dry_run(config: Config, world: int) -> int:
    from kabrn_dist.planner.estimate import describe_plan
    from kabrn_dist.train.datasets import open_datasets

    config.check_world_size(world)
    print(describe_plan(config, world))
    splits = open_datasets(config)
    train, total = splits.train, config.training.steps * config.training.global_batch_size
    corpus = train.corpus
    print(
        f"data                 {corpus.num_tokens('train'):,} training tokens = {train.num_sequences:,} sequences, "
        f"{total / train.num_sequences:.2f} passes over them; {corpus.num_tokens('validation'):,} validation tokens"
    )
    if len(train.sequences_per_source) > 1:
        for name, count, drawn in zip(
            corpus.names, train.sequences_per_source, train.sequences_drawn(total), strict=True
        ):
            passes = f", {drawn / count:.2f} passes" if count else ""
            print(f"  {name:<19}{count:,} sequences, {drawn / total:.1%} of what is drawn{passes}")
    print("nothing was started or written (--dry-run)")
    return 0


def report(error: UserError) -> int:
    """The same message would come from every process of a machine; one of them prints it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        # The first to end has its launcher end the others, which must have been heard by then.
        time.sleep(HEARD_SECONDS)
    return 2


def give_up(error: Exception) -> NoReturn:
    """End this process after a failure that the others do not share.

    The rank that failed shows its traceback and then goes, which is how the others learn of it: what they have to say
    of it would only hide the cause.
    """
    from kabrn_dist.distributed.process_group import is_peer_failure

    rank = os.environ.get("RANK", "0")
    if is_peer_failure(error):
        # Whatever the launcher shows of several ranks, the cause comes first.
        time.sleep(AFTERMATH_SECONDS)
        print(f"rank {rank} ends, as another rank has gone", file=sys.stderr, flush=True)
    else:
        trace = "".join(traceback.format_exception(error))
        print(f"error on rank {rank}, which ends the run:\n{trace}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Leaving the process groups in order would wait for ranks that wait for this one.
    os._exit(1)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, type=Path, help="the YAML file; its fields are described in README.md"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override one value; may be repeated"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|must|never|PATH",
        help="auto (default): from the newest intact checkpoint of run.folder if any; must: fail without one; never: "
        "fail with one; or a checkpoint's folder",
    )
    parser.add_argument(
        "--stop-after", type=int, metavar="N", help="train N steps, save and end; the same command goes on"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print layout and parameters, and end")
    parser.add_argument("--world", type=int, metavar="N", help="with --dry-run: the number of processes to plan for")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
