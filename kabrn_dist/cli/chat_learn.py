"""`mixkabrn chat RUN|EXPORT`: a chat in torch whose model learns from corrections and notes."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kabrn_dist.cli.adapter import add_adapter_option, read_weighted, refuse_adapter_run
from kabrn_dist.cli.arguments import given_path, number, positive_int, whole_number
from kabrn_dist.utils.errors import UserError

if TYPE_CHECKING:
    from kabrn_dist.config import Config
    from kabrn_dist.data.tokenizer import Tokenizer
    from kabrn_dist.inference.generate import GenerativeModel
    from kabrn_dist.online_learning.session import LearningSession

DESCRIPTION = """Talk to the model of a run or an export, and teach it: /correct TEXT takes the last answer back and
learns the right one, --learn and /learn read notes and conversations, /undo takes the last learning back. What is
learned lies beside the frozen model, as an adapter that generate, serve and the runtime can use. With nothing to read
from (< /dev/null) it learns and ends."""

EXAMPLES = """examples:
  mixkabrn chat runs/tiny
  mixkabrn chat runs/tiny --learn notes --minutes 5 < /dev/null
  mixkabrn chat exports/tiny --adapter adapters/poems=0.5 --out adapters/mine
  mixkabrn chat runs/tiny --undo
"""

DEFAULT_RANK, DEFAULT_ALPHA_RATIO = 8, 2.0
# The head too: otherwise tokens that the base has hardly seen could not be said.
DEFAULT_TARGETS = ("mixer", "shared", "routed", "head")
NOTE_TOKENS = 256


def run_folder(folder: Path, arguments: Sequence[str]) -> int:
    """Chat with a run or an export, or learn and end; return the exit code.

    Args:
        folder: The folder.
        arguments: The options after it.

    Raises:
        UserError: for options without a meaning, and a folder that is neither.
    """
    from kabrn_dist.inference.folder import check_run_folder, is_export

    options = _parse(arguments)
    _check_options(options)
    # Before torch is imported.
    if not is_export(folder):
        check_run_folder(folder, "config.yaml")
    out = options.out or _default_out(folder)
    if options.undo:
        return _undo(out)
    from kabrn_dist.cli.chat_terminal import ChatTerminal

    session = _open_session(folder, out, options)
    try:
        terminal = ChatTerminal(session)
        terminal.greet(str(folder))
        for path in options.learn:
            terminal.learn(path)
        return terminal.talk()
    finally:
        session.history.close()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    from kabrn_dist.cli.parser import CommandParser

    parser = CommandParser(
        prog="mixkabrn chat RUN|EXPORT",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_adapter_option(parser)
    parser.add_argument(
        "--learn", action="append", default=[], type=given_path, metavar="PATH", help="notes or conversations to learn"
    )
    parser.add_argument(
        "--out", type=given_path, metavar="DIR", help="what is learned (default: adapters/NAME beside the run)"
    )
    parser.add_argument("--method", choices=("lora", "state"), help="what is trained (default: lora, or that of --out)")
    parser.add_argument(
        "--rank", type=positive_int, metavar="R", help=f"rank of a new adapter (default {DEFAULT_RANK})"
    )
    parser.add_argument(
        "--minutes", type=number, default=2.0, metavar="M", help="longest time of a learning (default 2)"
    )
    parser.add_argument(
        "--steps", type=positive_int, default=1000, metavar="N", help="most steps of a learning (default 1000)"
    )
    parser.add_argument(
        "--memory", type=positive_int, default=1000, metavar="MB", help="memory of its passes (default 1000)"
    )
    parser.add_argument("--undo", action="store_true", help="take the last learning back, and end")
    parser.add_argument("--system", default="", metavar="TEXT", help="text in front of the conversation")
    parser.add_argument(
        "--tokens", type=positive_int, default=512, metavar="N", help="longest answer in tokens (default 512)"
    )
    parser.add_argument(
        "--temperature", type=number, default=0.8, metavar="T", help="0 takes the likeliest token (default 0.8)"
    )
    parser.add_argument(
        "--top-k", type=whole_number, default=50, metavar="K", help="draw among the K likeliest; 0: all (default 50)"
    )
    parser.add_argument("--seed", type=whole_number, default=0, metavar="N", help="seed of all draws (default 0)")
    return parser.parse_args(arguments)


def _check_options(options: argparse.Namespace) -> None:
    from kabrn_dist.inference.sampling import check_sampling

    check_sampling(options.system, options.tokens, options.temperature, options.top_k, options.seed)
    if not (math.isfinite(options.minutes) and options.minutes > 0):
        raise UserError(f"--minutes {options.minutes:g}: is no time to learn in; use 2")
    for path in options.learn:
        if not path.exists():
            raise UserError(f"--learn {path}: no such file or folder; give text or conversations")


def _default_out(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.parent / "adapters" / folder.name


def _undo(out: Path) -> int:
    from kabrn_dist.online_learning.history import AdapterHistory

    history = AdapterHistory(out)
    try:
        left = history.undo()
    finally:
        history.close()
    print(f"{out}: {_describe_left(left.info.steps if left else None)}", file=sys.stderr)
    return 0


def _describe_left(steps: int | None) -> str:
    return "nothing learned is left" if steps is None else f"as it was before, after {steps} steps"


def _open_session(folder: Path, out: Path, options: argparse.Namespace) -> LearningSession:
    from kabrn_dist.adapters.adapter import AdapterInfo
    from kabrn_dist.adapters.identity import refuse_base
    from kabrn_dist.adapters.parse import clean_text
    from kabrn_dist.inference.adapters import ModelAdapters
    from kabrn_dist.inference.frozen_codes import freeze_codes
    from kabrn_dist.online_learning.base_text import read_base_text
    from kabrn_dist.online_learning.chat import Conversation, Sampling
    from kabrn_dist.online_learning.chat_writer import ChatWriter
    from kabrn_dist.online_learning.course import LearningLimits
    from kabrn_dist.online_learning.history import AdapterHistory
    from kabrn_dist.online_learning.session import LearningSession

    history = AdapterHistory(out)
    used = read_weighted(options.adapter)
    learned = history.read()
    model, tokenizer, config = _load(folder)
    attached = ModelAdapters(model)
    attached.set(used)
    freeze_codes(model)
    if learned is not None:
        if learned.info.base_sha256 != attached.base_sha256:
            raise refuse_base(str(folder), learned.info, attached.base_sha256)
        if options.method not in (None, learned.info.method):
            raise UserError(
                f"--method {options.method}: {out} holds an adapter of method {learned.info.method}; leave --method "
                "out, or give another --out"
            )
        if options.rank not in (None, learned.info.rank):
            raise UserError(
                f"--rank {options.rank}: {out} holds an adapter of rank {learned.info.rank}; leave --rank out, or give "
                "another --out"
            )
    rank = options.rank or DEFAULT_RANK
    writer = ChatWriter(tokenizer)
    sampling = Sampling(options.temperature, options.top_k, options.tokens)
    info = AdapterInfo(
        name=clean_text(history.folder.name),
        method=options.method or "lora",
        rank=rank,
        alpha=DEFAULT_ALPHA_RATIO * rank,
        targets=DEFAULT_TARGETS,
        base_sha256=attached.base_sha256,
        base_name=clean_text(str(folder)),
    )
    return LearningSession(
        model,
        tokenizer,
        writer,
        Conversation(model, tokenizer, writer, sampling, options.system, options.seed),
        history,
        learned,
        info,
        LearningLimits(60 * options.minutes, options.steps, options.memory * 1_000_000),
        min(NOTE_TOKENS, config.data.sequence_length),
        lambda tokens: read_base_text(config, tokens, options.seed),
        options.seed,
    )


def _load(folder: Path) -> tuple[GenerativeModel, Tokenizer, Config]:
    """Return model, tokenizer and configuration of a run or an export."""
    from kabrn_dist.config.file import load_config
    from kabrn_dist.inference.folder import is_export
    from kabrn_dist.inference.load import load_export
    from kabrn_dist.inference.run import Run

    if is_export(folder):
        return *load_export(folder), load_config(folder / "config.yaml")
    run = Run.open(folder)
    refuse_adapter_run(folder, run.config.finetune, "mixkabrn chat")
    return run.model(), run.tokenizer(), run.config
