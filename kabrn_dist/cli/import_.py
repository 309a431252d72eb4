"""`mixkabrn import`: a model folder of Hugging Face becomes a run to go on with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kabrn_dist.cli.arguments import Subparsers, add_command, given_path
from kabrn_dist.utils.errors import UserError

if TYPE_CHECKING:
    from kabrn_dist.data.adapt_tokenizer import AdaptedTokenizer

TEXT_BYTES_LIMIT = 1 << 28

DESCRIPTION = """Reads config.json, safetensors and tokenizer.json of SOURCE and writes the first checkpoint of a run to
OUT, which `mixkabrn generate` and `export` take, and from which another run starts with run.init_from: OUT. Nothing
pickled is read, and no code of SOURCE runs.

  retnet   RetNets of flash-linear-attention. All but two matrices a layer are exact.
  mixkabrn What `mixkabrn export --format hf` wrote, with latent or ternary weights: exact, at its step.
  llama    Dense Transformers: Llama, Mistral, Qwen2, Qwen3. Embedding, head and what feed-forwards read are exact;
           layers of attention (A) are close, layers of retention (R) a start.

Of a foreign model a table says what becomes of each tensor: exactly, approximately, newly drawn, left out. Matrices
behind a norm that the other model lacks are scaled by what it divides by, measured on a text."""

EXAMPLES = """  mixkabrn import hub/tiny runs/tiny
  mixkabrn import retnet-1.3B runs/retnet --dry-run
  mixkabrn import retnet-1.3B runs/retnet --document-token "<|endoftext|>"
  mixkabrn import Llama-3.2-1B runs/llama --layers RRRARRRARRRARRRA --ternary
  mixkabrn import Qwen3-0.6B tokenizer.json --tokenizer-only
  mixkabrn prepare --source text --input books/ --out data/books --tokenizer runs/retnet/tokenizer.json
  mixkabrn train runs/retnet/config.yaml --set run.folder=runs/next --set run.init_from=runs/retnet \\
      --set data.path=data/books
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn import`."""
    parser = add_command(
        subparsers, "import", run, "turn a model of Hugging Face into a run to go on with", DESCRIPTION, EXAMPLES
    )
    add = parser.add_argument
    add("source", type=given_path, metavar="SOURCE", help="model folder of Hugging Face")
    add("out", type=given_path, metavar="OUT", help="folder of the run to write; it must not exist")
    kinds = ("auto", "mixkabrn", "retnet", "llama")
    add("--kind", choices=kinds, default="auto", help="kind of the model (default: by its type)")
    add("--layers", metavar="LETTERS", help="for llama: R (retention) or A (attention) per layer (default: all R)")
    add("--ternary", action="store_true", help="ease into ternary weights while training (default: weights stay plain)")
    add("--tokenizer", metavar="bytes|FILE.json", help="another tokenizer; embedding and head are drawn anew then")
    add("--document-token", metavar="TOKEN", help="special token that begins each document (default: a new id)")
    add("--tokenizer-only", action="store_true", help="write only the tokenizer, made usable, to the file OUT")
    add("--data", metavar="DIR", help="shard set of that tokenizer, so that OUT itself can be trained on")
    add("--calibrate", type=given_path, metavar="FILE", help="text to measure scales on (default: Python's own manual)")
    add("--set", action="append", default=[], metavar="A.B=C", help="override a value of the run's configuration")
    add("--dry-run", action="store_true", help="print what would become of each tensor, and stop")


def run(options: argparse.Namespace) -> int:
    """Import, or with --dry-run print the table; return the exit code."""
    from kabrn_dist.hub.import_run import refuse_existing

    if not options.dry_run:
        refuse_existing(options.out)
    from kabrn_dist.hub.import_own import is_own_model

    if options.kind == "mixkabrn" or (options.kind == "auto" and is_own_model(options.source)):
        return _import_own(options)
    adapted = _load_tokenizer(options)
    if options.tokenizer_only:
        return _write_tokenizer(options, adapted)
    from kabrn_dist.hub.import_model import describe_import, plan_import, run_import
    from kabrn_dist.utils.safe_open import read_plain

    plan = plan_import(
        options.source,
        options.out,
        adapted,
        options.tokenizer is None,
        options.kind,
        options.layers,
        options.data,
        options.ternary,
        options.set,
    )
    print(describe_import(plan), flush=True)
    if options.dry_run:
        print("nothing was written (--dry-run)")
        return 0
    text = None
    if options.calibrate is not None:
        text = read_plain(options.calibrate, TEXT_BYTES_LIMIT, follow_links=True).decode("utf-8", "replace")
    checkpoint, bits = run_import(plan, text, options.data is not None)
    print(f"wrote {checkpoint}; {bits:.2f} bits per token of the text that scales were measured on")
    print(_next_step(options))
    return 0


def _import_own(options: argparse.Namespace) -> int:
    """Import a model that this package exported."""
    from kabrn_dist.data.adapt_tokenizer import AdaptedTokenizer
    from kabrn_dist.hub.import_own import describe_own_import, plan_own_import, run_own_import
    from kabrn_dist.hub.import_own_tokenizer import read_own_tokenizer

    for name in ("layers", "ternary", "tokenizer", "document_token", "calibrate"):
        if getattr(options, name):
            raise UserError(
                f"--{name.replace('_', '-')}: {options.source} is a model of this package, which is imported as it is; "
                "leave it out"
            )
    if options.tokenizer_only:
        return _write_tokenizer(options, AdaptedTokenizer(read_own_tokenizer(options.source), ()))
    plan = plan_own_import(options.source, options.out, options.data, options.set)
    print(describe_own_import(plan), flush=True)
    if options.dry_run:
        print("nothing was written (--dry-run)")
        return 0
    print(f"wrote {run_own_import(plan, options.data is not None)}")
    print(_next_step(options))
    return 0


def _load_tokenizer(options: argparse.Namespace) -> AdaptedTokenizer:
    from kabrn_dist.data.adapt_tokenizer import AdaptedTokenizer, load_any_tokenizer
    from kabrn_dist.data.tokenizer import Tokenizer

    if options.tokenizer == "bytes":
        return AdaptedTokenizer(Tokenizer.of_bytes(), ())
    path = Path(options.tokenizer) if options.tokenizer else options.source / "tokenizer.json"
    try:
        return load_any_tokenizer(path, options.document_token)
    except UserError as error:
        if options.tokenizer or options.tokenizer_only:
            raise
        raise UserError(f"{error}. With --tokenizer bytes or FILE.json the rest of the model is imported") from None


def _write_tokenizer(options: argparse.Namespace, adapted: AdaptedTokenizer) -> int:
    for change in adapted.changes:
        print(change)
    if options.dry_run:
        print("nothing was written (--dry-run)")
        return 0
    adapted.tokenizer.save(options.out)
    print(f"wrote {options.out}: {adapted.tokenizer.vocab_size:,} ids")
    return 0


def _next_step(options: argparse.Namespace) -> str:
    if options.data is not None:
        return f"train on: mixkabrn train {options.out}/config.yaml"
    return (
        f"prepare data with --tokenizer {options.out}/tokenizer.json, then: mixkabrn train {options.out}/config.yaml "
        f"--set run.folder=NEW --set run.init_from={options.out} --set data.path=DATA"
    )
