"""`mixkabrn pack`: a run or an export as one file for the runtime in C."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kabrn_dist.cli.arguments import Subparsers, add_command, check_new_file, given_path, whole_number
from kabrn_dist.utils.errors import UserError

if TYPE_CHECKING:
    from kabrn_dist.runtime.pack import PackedFolder

DESCRIPTION = """The file holds all that the runtime needs: configuration, tokenizer, chat template, embedding and head
in int8, and the ternary codes and scales that the trainer computes with, not one of them rounded again. The runtime is
one C file: `mixkabrn chat FILE` compiles it here once, and a machine without Python needs only cc (see --sources)."""

EXAMPLES = """  mixkabrn pack runs/tiny --out tiny.mkb
  mixkabrn pack runs/tiny --out pi/tiny.mkb --sources --embedding fp16 --ternary 1.6
  mixkabrn pack exports/tiny --out tiny.mkb --force
"""

SOURCES = Path(__file__).parent.parent / "runtime" / "csrc"


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn pack`."""
    parser = add_command(
        subparsers, "pack", run, "write a run or an export as one file that runs on any CPU", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("folder", type=given_path, metavar="RUN|EXPORT", help="folder of a run or of an export")
    parser.add_argument(
        "--out", type=given_path, required=True, metavar="FILE", help="file to write, such as model.mkb"
    )
    parser.add_argument(
        "--step", type=whole_number, metavar="N", help="step of the run's checkpoint (default: the newest intact one)"
    )
    parser.add_argument(
        "--embedding",
        choices=("int8", "fp16", "fp32"),
        default="int8",
        help="values of embedding and head: int8 with a scale for each token (default); fp32 gives the logits of "
        "`mixkabrn generate` at four times the bytes",
    )
    parser.add_argument(
        "--ternary",
        choices=("2", "1.6"),
        default="2",
        help="bits of a ternary weight in the file: 2, used as they are (default), or 1.6, expanded when it is loaded",
    )
    parser.add_argument(
        "--matrices",
        choices=("fp32", "fp16"),
        default="fp32",
        help="values of matrices that are not ternary, as of a run with model.quantize: false (default fp32)",
    )
    parser.add_argument(
        "--template",
        type=given_path,
        metavar="FILE",
        help="chat template (Jinja) to put into the file (default: that of the run, or ChatML if the tokenizer has its "
        "marks)",
    )
    parser.add_argument(
        "--sources", action="store_true", help="also put mixkabrn.c and mixkabrn.h beside the file, for other machines"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that exists")


def run(options: argparse.Namespace) -> int:
    """Pack and print what the file holds; return the exit code."""
    from kabrn_dist.data.tokenizer import read_chat_template
    from kabrn_dist.inference.folder import check_run_folder, is_export

    # A mistake is reported before torch is imported.
    check_new_file(options.out, options.force)
    template_file = options.template or _find_own_template(options.folder)
    template = _default_template(options.folder) if template_file is None else read_chat_template(template_file)
    if template_file is not None:
        _check_template(template_file, template)
    if not is_export(options.folder):
        check_run_folder(options.folder, "config.yaml")
    from kabrn_dist.runtime.file_plan import Packing
    from kabrn_dist.runtime.pack import pack_folder
    from kabrn_dist.utils.atomic_io import make_folder

    packing = Packing(options.embedding, {"2": "tiles", "1.6": "base3"}[options.ternary], options.matrices, template)
    make_folder(options.out.parent)
    packed = pack_folder(options.folder, options.out, packing, options.step)
    _print_parts(options.out, packed)
    if options.sources:
        _copy_sources(options.out.parent)
        place = f"cd {options.out.parent} && " if options.out.parent != Path() else ""
        print(f"next, there:  {place}cc -O2 mixkabrn.c -o mixkabrn -lm -lpthread && ./mixkabrn chat {options.out.name}")
    print(f"next: mixkabrn chat {options.out}")
    return 0


def _find_own_template(folder: Path) -> Path | None:
    """Return the chat template that lies in a run or an export; None if there is none."""
    from kabrn_dist.data.index import CHAT_TEMPLATE_NAME

    path = folder / CHAT_TEMPLATE_NAME
    return path if path.exists() else None


def _default_template(folder: Path) -> str:
    """Return ChatML for a base whose tokenizer has the marks of it; "" for others."""
    from kabrn_dist.data.default_template import find_chat_template
    from kabrn_dist.data.index import TOKENIZER_NAME
    from kabrn_dist.data.tokenizer import Tokenizer

    path = folder / TOKENIZER_NAME
    return find_chat_template(Tokenizer.load(path)) if path.exists() else ""


def _check_template(file: Path, template: str) -> None:
    """Refuse a template that cannot write a conversation."""
    try:
        from kabrn_dist.data.chat_template import check_chat_template
    except ModuleNotFoundError:
        print(f"note: {file} was not checked, as jinja2 is not installed", file=sys.stderr)
        return
    try:
        check_chat_template(template)
    except ValueError as error:
        raise UserError(f"{file}: {error}; name a chat template in Jinja") from error


def _copy_sources(folder: Path) -> None:
    for name in ("mixkabrn.c", "mixkabrn.h"):
        try:
            shutil.copyfile(SOURCES / name, folder / name)
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be written ({error.strerror}); make room for it") from error


def _print_parts(out: Path, packed: PackedFolder) -> None:
    from kabrn_dist.runtime.pack import list_parts

    parts = list_parts(packed.plan)
    width = max(len(part.name) for part in parts)
    for part in parts:
        each = f"{part.values:>13,} weights  {8 * part.bytes / part.values:5.2f} bits each" if part.values else ""
        print(f"{part.name:<{width}}  {part.bytes:>13,} bytes  {each}".rstrip())
    values = sum(part.values for part in parts)
    kind = "ternary matrices" if packed.lam == 1 else "plain matrices"
    print(f"{out}: step {packed.step}, {packed.tokens:,} tokens, {values:,} weights, {kind}; ", end="")
    print(f"{packed.plan.file_bytes:,} bytes")
