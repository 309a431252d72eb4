"""`mixkabrn page`: a folder with a chat page that runs a model file in the browser, without a server."""

from __future__ import annotations

import argparse

from kabrn_dist.cli.arguments import Subparsers, add_command, given_path

DESCRIPTION = """Compiles the runtime to WebAssembly and writes it with a page and a worker into a folder. Opened from
the disk, its index.html asks for a model file and chats: nothing is installed, nothing is sent anywhere. Needs the
package ziglang; the people who get the folder need but a browser."""

EXAMPLES = """  mixkabrn page --out page
  # then open page/index.html and choose a file that `mixkabrn pack` wrote
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn page`."""
    parser = add_command(subparsers, "page", run, "write a chat page that needs no server", DESCRIPTION, EXAMPLES)
    parser.add_argument("--out", type=given_path, required=True, metavar="DIR", help="folder to write")


def run(options: argparse.Namespace) -> int:
    """Write the folder."""
    from kabrn_dist.runtime.offline_page import write_offline_page

    write_offline_page(options.out)
    print(f"open {options.out / 'index.html'} in a browser")
    return 0
