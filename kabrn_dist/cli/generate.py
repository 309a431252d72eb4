"""`mixkabrn generate`: text from a trained run or an export."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kabrn_dist.cli.adapter import add_adapter_option, read_weighted, refuse_adapter_run
from kabrn_dist.cli.arguments import Subparsers, add_command, given_path, number, positive_int, whole_number
from kabrn_dist.utils.errors import UserError

DESCRIPTION = """Prints the text as it is generated. Of a run, the newest intact checkpoint is used, with the tokenizer
of the shards that it was trained on; an export, which `mixkabrn export` writes, contains all that is needed. Decoding
is recurrent: a retention layer keeps a state of fixed size, whatever the length. A model file, which `mixkabrn pack`
writes, is read by the runtime in C, without torch: its options are those of `mixkabrn generate FILE.mkb --help`."""

EXAMPLES = """  mixkabrn generate runs/tiny --prompt "def "
  mixkabrn generate runs/tiny --prompt "import os" --tokens 1000 --temperature 0
  mixkabrn generate exports/tiny --prompt "def " --seed 1
  mixkabrn generate runs/tiny --adapter runs/finetune/adapter --prompt "def "
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn generate`."""
    parser = add_command(
        subparsers, "generate", run, "generate text with a trained run or an export", DESCRIPTION, EXAMPLES
    )
    parser.add_argument(
        "folder", type=given_path, metavar="RUN|MODEL", help="folder of a run or of an export, or a model file"
    )
    add_adapter_option(parser)
    parser.add_argument("--prompt", default="", help="text to continue (default: start a new document)")
    parser.add_argument(
        "--tokens", type=positive_int, default=200, metavar="N", help="maximum number of tokens (default 200)"
    )
    parser.add_argument(
        "--temperature", type=number, default=0.8, metavar="T", help="0 always takes the likeliest token (default 0.8)"
    )
    parser.add_argument(
        "--top-k",
        type=whole_number,
        default=50,
        metavar="K",
        help="sample among the K likeliest; 0: among all (default 50)",
    )
    parser.add_argument("--seed", type=whole_number, default=0, metavar="N", help="seed of the sampling (default 0)")


def run(options: argparse.Namespace) -> int:
    """Generate and print; return the exit code."""
    from kabrn_dist.inference.folder import check_run_folder, is_export
    from kabrn_dist.inference.sampling import check_sampling

    # A mistake is reported before torch is imported and a model is loaded.
    check_sampling(options.prompt, options.tokens, options.temperature, options.top_k, options.seed)
    if _is_model_file(options.folder):
        raise UserError(
            f"{options.folder}: is a model file; its options come after it: mixkabrn generate {options.folder}"
        )
    if not is_export(options.folder):
        check_run_folder(options.folder, "config.yaml")
    from kabrn_dist.inference.run import load_model
    from kabrn_dist.utils.terminal import escape_controls

    # A file or a program gets the text as it is; a terminal would obey some of it.
    show: Callable[[str], str] = escape_controls if sys.stdout.isatty() else str
    adapters = read_weighted(options.adapter)
    if adapters and not is_export(options.folder):
        from kabrn_dist.config.file import load_config

        # A run of an adapter has it already: it would be there twice.
        refuse_adapter_run(options.folder, load_config(options.folder / "config.yaml").finetune, "mixkabrn generate")
    model, tokenizer = load_model(options.folder)
    if adapters:
        from kabrn_dist.inference.adapters import set_adapters

        set_adapters(model, adapters)
    print(options.prompt, end="", flush=True)
    start, pieces = time.perf_counter(), 0
    for piece in model.generate(
        options.prompt, tokenizer, options.tokens, options.temperature, options.top_k, options.seed
    ):
        print(show(piece), end="", flush=True)
        pieces += 1
    rate = pieces / (time.perf_counter() - start)
    # Exports of some earlier versions do not say their step.
    at_step = f" at step {model.routers.step}" if model.routers.step else ""
    print(f"\n[{options.folder}{at_step}, {rate:.0f} tokens/s]", file=sys.stderr)
    return 0


def start_model_file(arguments: Sequence[str]) -> None:
    """Start the runtime in C in place of this process if the first argument is a model file; else return.

    Args:
        arguments: What follows `generate`; all after the file are options of the runtime.

    Raises:
        UserError: for a file that is not there, or a runtime that cannot be started.
    """
    if arguments and _is_model_file(file := Path(arguments[0])):
        from kabrn_dist.cli.chat import check_model_file, start_runtime

        check_model_file(file)
        start_runtime("generate", file, arguments[1:])


def _is_model_file(path: Path) -> bool:
    return path.suffix == ".mkb" and not path.is_dir()
