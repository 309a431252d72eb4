"""`mixkabrn export`: a run's checkpoint as one folder of safetensors, for this package or for transformers."""

from __future__ import annotations

import argparse

from kabrn_dist.cli.arguments import Subparsers, add_command, add_run_folder, given_path, whole_number
from kabrn_dist.utils.errors import UserError

DESCRIPTION = """Writes model.safetensors (several files if the model is large), config.yaml, tokenizer.json and
README.md to OUT, to publish, to evaluate, or to generate from. OUT appears complete or not at all, and needs neither
the run nor the shards. No process group is started, and no whole tensor is held in memory.

With --format hf, OUT is a folder that AutoModelForCausalLM and AutoTokenizer of transformers load without this package:
config.json, the model as one Python file, tokenizer files, safetensors and a model card (docs/huggingface.md)."""

EXAMPLES = """  mixkabrn export runs/tiny exports/tiny
  mixkabrn export runs/tiny exports/tiny-fp32 --dtype fp32 --step 1200
  mixkabrn export runs/tiny exports/tiny --dry-run
  mixkabrn generate exports/tiny --prompt "def "
  mixkabrn export runs/tiny hub/tiny --format hf --license mit
  mixkabrn export runs/tiny hub/tiny-ternary --format hf --weights ternary
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn export`."""
    parser = add_command(
        subparsers, "export", run, "write a run's checkpoint as one folder of safetensors", DESCRIPTION, EXAMPLES
    )
    add_run_folder(parser)
    parser.add_argument("out", type=given_path, metavar="OUT", help="folder to write; it must not exist")
    parser.add_argument(
        "--format",
        choices=("mixkabrn", "hf"),
        default="mixkabrn",
        help="mixkabrn: to be read by this package (default); hf: by transformers, without this package",
    )
    parser.add_argument(
        "--dtype",
        choices=("trained", "bf16", "fp32"),
        default="trained",
        help="dtype of the weights: as the trainer computes with them, so that ternary codes and scales are the "
        "trainer's (default); bf16 takes half of fp32's bytes; fp32 has the weights that the optimizer updates, to go "
        "on training elsewhere. In another dtype than the trainer's, its codes and scales are written too",
    )
    parser.add_argument(
        "--step", type=whole_number, metavar="N", help="step of the checkpoint (default: the newest intact one)"
    )
    parser.add_argument(
        "--weights",
        choices=("latent", "ternary"),
        help="with --format hf: latent weights, which can be trained (default), or packed ternary codes and scales of "
        "two bits a weight, to run only; both give the trainer's logits",
    )
    parser.add_argument(
        "--chat-template",
        type=given_path,
        metavar="FILE",
        help="with --format hf: chat template in Jinja (default: chat_template.jinja of the run's folder, if there is "
        "one)",
    )
    parser.add_argument(
        "--license", default=None, metavar="ID", help="with --format hf: license for the model card, such as mit"
    )
    parser.add_argument("--dry-run", action="store_true", help="verify the checkpoint and print what would be written")


def run(options: argparse.Namespace) -> int:
    """Export, or with --dry-run print what would be written; return the exit code."""
    from kabrn_dist.inference.folder import check_run_folder

    check_run_folder(options.folder, "config.yaml")
    if options.format == "hf":
        return _export_for_transformers(options)
    for name in ("weights", "chat_template", "license"):
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {getattr(options, name)}: is for --format hf alone; add that, or leave it out")
    import torch

    from kabrn_dist.inference.export import plan_export, write_export

    dtype = {"trained": None, "bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    export = plan_export(options.folder, dtype, options.step)
    summary = (
        f"{export.num_parameters:,} parameters in {export.describe_dtype()}, {export.num_bytes:,} bytes "
        f"({len(export.files)} files)"
    )
    if options.dry_run:
        print(f"would write {summary} from {export.path} to {options.out}")
        return 0
    write_export(export, options.out, lambda file: print(f"wrote {file}"))
    print(f"{options.out}: {summary} from {export.path}")
    return 0


def _export_for_transformers(options: argparse.Namespace) -> int:
    if options.dtype != "trained":
        raise UserError(
            f"--dtype {options.dtype}: --format hf writes the weights that the trainer computes with, whose ternary "
            "codes are the trainer's; leave out --dtype, and choose the dtype of the arithmetic in from_pretrained"
        )
    from kabrn_dist.inference.folder_writer import check_new_folder

    check_new_folder(options.out)
    from kabrn_dist.hub.export import plan_hub_export, write_hub_export
    from kabrn_dist.hub.tensors import Flavor

    flavor: Flavor = options.weights or "latent"
    export = plan_hub_export(options.folder, flavor, options.step, options.chat_template, options.license or "")
    summary = f"{export.parameters:,} parameters, {export.num_bytes:,} bytes of {flavor} weights, step {export.step}"
    if options.dry_run:
        print(f"would write {summary}, to {options.out}")
        return 0
    write_hub_export(export, options.out, lambda file: print(f"wrote {file}"))
    print(f"{options.out}: {summary}")
    print(f'next: AutoModelForCausalLM.from_pretrained("{options.out}", trust_remote_code=True)')
    return 0
