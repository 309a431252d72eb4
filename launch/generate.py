"""Write text with a trained run, or an export of one: recurrent decoding with constant memory, streamed as it comes."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kabrn_dist.utils.errors import UserError

EXAMPLES = """examples:
  python launch/generate.py --run runs/tiny --prompt "def "
  python launch/generate.py --run runs/tiny --prompt "import os" --tokens 1000 --temperature 0
  python launch/generate.py --model exports/tiny --prompt "def "

--run takes the newest intact checkpoint and needs the shards' folder; --model what launch/export.py wrote, and no more.
"""


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from kabrn_dist.inference.generate import generate, load_export, load_run

    try:
        if options.model is not None:
            model, tokenizer = load_export(options.model)
            source = str(options.model)
        else:
            model, tokenizer, step = load_run(options.run)
            source = f"step {step}"
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.prompt, end="", flush=True)
    began, pieces = time.perf_counter(), 0
    for piece in generate(
        model, tokenizer, options.prompt, options.tokens, options.temperature, options.top_k, options.seed
    ):
        print(piece, end="", flush=True)
        pieces += 1
    rate = pieces / (time.perf_counter() - began)
    print(f"\n[{source}, {rate:.0f} tokens/s]", file=sys.stderr)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--run", type=Path, help="the run's folder")
    origin.add_argument("--model", type=Path, help="the folder of an export")
    parser.add_argument("--prompt", default="", help="text to continue (default: begin a document)")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to write (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among so many; 0 among all (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
