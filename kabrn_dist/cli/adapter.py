"""`mixkabrn adapter`: what fine-tuning changed, apart from its model: made, looked at, applied, taken off, merged."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from kabrn_dist.cli.arguments import Subparsers, add_command, add_run_folder, check_new_file, given_path
from kabrn_dist.utils.errors import UserError

if TYPE_CHECKING:
    from kabrn_dist.adapters.adapter import Adapter
    from kabrn_dist.config.finetune import FinetuneConfig

DESCRIPTION = """An adapter holds what fine-tuning changed and the hash of the model that it was trained on, its base:
low-rank factors (finetune.method lora), flipped ternary codes (ternary_lora), or states that documents begin with
(state). docs/adapters.md describes its files, which are those of PEFT where PEFT has a name for a thing."""

EXAMPLES = """  mixkabrn adapter export runs/tuned --out adapters/tuned
  mixkabrn adapter info adapters/tuned
  mixkabrn generate runs/base --adapter adapters/tuned --prompt "Once"
  mixkabrn adapter apply base.mkb adapters/tuned --out tuned.mkb
  mixkabrn adapter remove tuned.mkb adapters/tuned --out base-again.mkb
  mixkabrn adapter merge runs/base adapters/tuned --out exports/tuned
  mixkabrn adapter pack adapters/tuned --model base.mkb --out tuned.mka
"""

EXPORT = """Reads the newest intact checkpoint of a fine-tuned run and its base, and writes a folder with
adapter_model.safetensors, which is all that is needed, and adapter_config.json, as PEFT has it."""

INFO = """Prints what the adapter says about itself and what it holds, after checking all of it."""

APPLY = """Writes the model file with the flipped codes and new scales of a ternary_lora adapter: decoding costs what it
did. `mixkabrn adapter remove` gives back the file's bytes. Other adapters are packed: mixkabrn adapter pack."""

REMOVE = """Writes the model file that the adapter was applied to, with the same bytes and the same sha256."""

MERGE = """Writes an export whose weights hold the adapter, in fp32. Flipped codes of ternary_lora, and the factors of
lora for plain matrices, can be merged; the sum of a ternary matrix and factors is not ternary, and states have no place
in weights: such adapters stay beside the model."""

PACK = """Writes the adapter as one file for the runtime in C, for the model file that it will be used with."""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn adapter` and its commands."""
    parser = add_command(
        subparsers,
        "adapter",
        export_adapter,
        "write, look at, apply and merge what fine-tuning changed",
        DESCRIPTION,
        EXAMPLES,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="export|info|apply|remove|merge|pack")
    export = add_command(kinds, "export", export_adapter, "write the adapter of a fine-tuned run", EXPORT)
    add_run_folder(export)
    export.add_argument(
        "--dtype", choices=("fp32", "fp16"), default="fp32", help="of factors and states (default fp32)"
    )
    export.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest intact one)")
    export.add_argument("--out", type=given_path, required=True, metavar="DIR", help="folder to create")
    info = add_command(kinds, "info", show_adapter, "show what an adapter holds", INFO)
    _add_adapter(info)
    for name, command, summary, text in (
        ("apply", apply_adapter, "write a model file with an adapter's codes", APPLY),
        ("remove", remove_adapter, "write a model file without an adapter's codes", REMOVE),
    ):
        patch = add_command(kinds, name, command, summary, text)
        patch.add_argument("model", type=given_path, metavar="MODEL.mkb", help="model file")
        _add_adapter(patch)
        _add_out_file(patch, "model file to write")
    merge = add_command(kinds, "merge", merge_model, "write an export with an adapter in its weights", MERGE)
    merge.add_argument("folder", type=given_path, metavar="RUN|EXPORT", help="folder of a run or of an export")
    _add_adapter(merge)
    merge.add_argument("--out", type=given_path, required=True, metavar="EXPORT", help="folder to create")
    pack = add_command(kinds, "pack", pack_adapter, "write an adapter as one file for the runtime in C", PACK)
    _add_adapter(pack)
    pack.add_argument("--model", type=given_path, required=True, metavar="MODEL.mkb", help="model file of its base")
    _add_out_file(pack, "file to write, such as tuned.mka")


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """Add the option --adapter, which may be repeated."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=parse_weighted_path,
        metavar="PATH[=WEIGHT]",
        help="adapter to use with the model, a folder or an .safetensors file, and its weight (default 1); may be "
        "repeated, and what they change adds up",
    )


def parse_weighted_path(text: str) -> tuple[Path, float]:
    """Return the path and the weight in PATH[=WEIGHT].

    Example:
        >>> parse_weighted_path("adapters/a=0.5"), parse_weighted_path("a=b")
        ((PosixPath('adapters/a'), 0.5), (PosixPath('a=b'), 1.0))

    Raises:
        argparse.ArgumentTypeError: for an empty path, or a weight that is not finite.
    """
    path, equals, weight = text.rpartition("=")
    try:
        value = float(weight) if equals else math.nan
    except ValueError:
        return given_path(text), 1.0
    if not equals:
        return given_path(text), 1.0
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{weight!r} is no weight; write it as 0.5")
    return given_path(path), value


def read_weighted(given: list[tuple[Path, float]]) -> list[tuple[Adapter, float]]:
    """Read the adapters of --adapter.

    Raises:
        UserError: for one that is missing or damaged.
    """
    from kabrn_dist.adapters.folder import read_adapter

    return [(read_adapter(path), weight) for path, weight in given]


def refuse_adapter_run(folder: Path, finetune: FinetuneConfig | None, command: str) -> None:
    """Refuse the run of an adapter where other adapters are put beside a base.

    Args:
        folder: Folder of the run.
        finetune: How it was fine-tuned, if it was.
        command: What is right for its base, such as "mixkabrn chat".

    Raises:
        UserError: unless the run is a model of its own.
    """
    if finetune is not None and finetune.method != "full":
        raise UserError(
            f"{folder}: is an adapter that was trained beside {finetune.base}; use: {command} {finetune.base} "
            f"--adapter {folder / 'adapter'}"
        )


def export_adapter(options: argparse.Namespace) -> int:
    """Write the adapter of a run; return the exit code."""
    from kabrn_dist.inference.folder import check_run_folder
    from kabrn_dist.inference.folder_writer import check_new_folder

    check_run_folder(options.folder, "config.yaml")
    check_new_folder(options.out)
    from kabrn_dist.adapters.folder import write_adapter
    from kabrn_dist.inference.make_adapter import make_adapter
    from kabrn_dist.inference.run import Run

    adapter = make_adapter(Run.open(options.folder, options.step))
    write_adapter(adapter, options.out, options.dtype)
    _describe(options.out, adapter)
    print(f"next: mixkabrn generate {adapter.info.base_name or 'BASE'} --adapter {options.out}")
    return 0


def show_adapter(options: argparse.Namespace) -> int:
    """Print what an adapter holds; return the exit code."""
    from kabrn_dist.adapters.folder import read_adapter

    _describe(options.adapter, read_adapter(options.adapter))
    return 0


def apply_adapter(options: argparse.Namespace) -> int:
    """Write a patched model file; return the exit code."""
    from kabrn_dist.adapters.folder import read_adapter
    from kabrn_dist.runtime.patch_file import patch_model_file

    # The model file itself may be replaced: what is applied can be removed again.
    check_new_file(options.out, options.force, *_files_of(options.adapter))
    adapter = read_adapter(options.adapter)
    patch_model_file(options.model, adapter, options.out)
    flips = sum(len(patch.places) for patch in adapter.patches.values())
    print(f"{options.out}: {options.model} with adapter {adapter.info.name!r}, {flips:,} other codes")
    print(f"next: mixkabrn chat {options.out}")
    return 0


def remove_adapter(options: argparse.Namespace) -> int:
    """Write a model file without its patch; return the exit code."""
    from kabrn_dist.adapters.folder import read_adapter
    from kabrn_dist.runtime.patch_file import unpatch_model_file
    from kabrn_dist.utils.atomic_io import sha256_of

    # The model file itself may be replaced: what is applied can be removed again.
    check_new_file(options.out, options.force, *_files_of(options.adapter))
    adapter = read_adapter(options.adapter)
    unpatch_model_file(options.model, adapter, options.out)
    print(f"{options.out}: {options.model} without adapter {adapter.info.name!r}, sha256 {sha256_of(options.out)}")
    return 0


def merge_model(options: argparse.Namespace) -> int:
    """Write an export with an adapter in its weights; return the exit code."""
    from kabrn_dist.inference.folder import check_run_folder, is_export
    from kabrn_dist.inference.folder_writer import check_new_folder

    if not is_export(options.folder):
        check_run_folder(options.folder, "config.yaml")
    check_new_folder(options.out)
    from kabrn_dist.adapters.folder import read_adapter
    from kabrn_dist.inference.export import write_export
    from kabrn_dist.inference.merged_export import plan_merged_export

    adapter = read_adapter(options.adapter)
    export = plan_merged_export(options.folder, adapter)
    write_export(export, options.out, lambda file: print(f"wrote {file}"))
    print(f"{options.out}: {export.num_parameters:,} parameters with adapter {adapter.info.name!r}")
    print(f"next: mixkabrn pack {options.out} --out model.mkb")
    return 0


def pack_adapter(options: argparse.Namespace) -> int:
    """Write an adapter for the runtime in C; return the exit code."""
    from kabrn_dist.adapters.folder import read_adapter
    from kabrn_dist.runtime.adapter_file import write_adapter_file
    from kabrn_dist.runtime.model_file import read_model_file

    check_new_file(options.out, options.force, *_files_of(options.adapter), options.model)
    adapter = read_adapter(options.adapter)
    write_adapter_file(adapter, read_model_file(options.model), options.out)
    print(f"{options.out}: adapter {adapter.info.name!r}, {options.out.stat().st_size:,} bytes")
    print(f"next: mixkabrn chat {options.model} --adapter {options.out}")
    return 0


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=given_path, metavar="ADAPTER", help="folder of an adapter, or its .safetensors")


def _add_out_file(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--out", type=given_path, required=True, metavar="FILE", help=text)
    parser.add_argument("--force", action="store_true", help="replace a file that exists")


def _files_of(adapter: Path) -> tuple[Path, Path]:
    from kabrn_dist.adapters.folder import ADAPTER_NAME

    return adapter, adapter / ADAPTER_NAME


def _describe(path: Path, adapter: Adapter) -> None:
    """Print what an adapter says and holds."""
    info = adapter.info
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    print(f"{path}: adapter {info.name!r}, method {info.method}, {file.stat().st_size:,} bytes")
    print(f"  base    {info.base_sha256[:12]}…{f', {info.base_name}' if info.base_name else ''}")
    if info.result_sha256:
        print(f"  result  {info.result_sha256[:12]}…")
    targets = f", targets {', '.join(info.targets)}" if info.targets and info.method != "state" else ""
    print(f"  trained {info.steps:,} steps, rank {info.rank}, alpha {info.alpha:g}{targets}")
    if adapter.patches:
        codes = sum(math.prod(patch.shape) for patch in adapter.patches.values())
        flips = sum(len(patch.places) for patch in adapter.patches.values())
        print(
            f"  holds   {flips:,} flipped codes of {codes:,} ({flips / codes:.2%}), {len(adapter.patches)} parameters"
        )
    if adapter.low_ranks:
        values = sum(factors.a.size + factors.b.size for factors in adapter.low_ranks.values())
        print(f"  holds   {values:,} values of factors, {len(adapter.low_ranks)} parameters")
    if adapter.states:
        print(f"  holds   initial states of layers {', '.join(map(str, adapter.states))}")
