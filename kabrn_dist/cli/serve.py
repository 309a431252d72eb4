"""`mixkabrn serve`: a model file over HTTP, with a page to chat and the interface of OpenAI's."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kabrn_dist.cli.adapter import parse_weighted_path
from kabrn_dist.cli.arguments import (
    Subparsers,
    add_command,
    given_path,
    is_installed,
    non_negative_int,
    number,
    positive_int,
)
from kabrn_dist.utils.errors import UserError

if TYPE_CHECKING:
    from kabrn_dist.runtime.server.settings import AdapterSource, ServerSettings

DESCRIPTION = """Answers at / with a page to chat, and below /v1 as OpenAI's interface does: chat/completions,
completions and models, with streaming. What was said is kept as states of fixed size, so a turn costs only its new
tokens. Needs no torch, but: pip install numpy starlette uvicorn jinja2. Other machines reach it only with --host and a
token. Ctrl-C and SIGTERM stop it, with exit code 0."""

EXAMPLES = """  mixkabrn serve tiny.mkb
  mixkabrn serve tiny.mkb --host 0.0.0.0 --token-file token.txt --contexts 2
  mixkabrn serve tiny.mkb --adapter poems=adapters/poems --adapter-folder adapters
"""

TOKEN_BYTES_LIMIT = 4096
TOKEN_MIN_CHARACTERS = 16
# As of the program in C.
THREADS_LIMIT = 256


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn serve`."""
    parser = add_command(
        subparsers, "serve", run, "answer over HTTP with a model file, as OpenAI's servers do", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("model", type=given_path, metavar="FILE", help="file that `mixkabrn pack` wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=non_negative_int, default=8080, help="default 8080; 0: any that is free")
    parser.add_argument("--token", default="", help="what clients must send; others can see it among the processes")
    parser.add_argument("--token-file", type=given_path, metavar="F", help="file whose first line is the token")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="further name of this server; may be repeated"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH[=W]",
        help="adapter that clients choose as the model NAME, times W (default 1); may be repeated",
    )
    parser.add_argument(
        "--adapter-folder", type=given_path, metavar="DIR", help="clients may load and unload adapters that lie in it"
    )
    parser.add_argument("--threads", type=positive_int, default=1, metavar="N", help="for one answer (default 1)")
    parser.add_argument(
        "--contexts", type=positive_int, metavar="N", help="answers at once (default: cores / threads, at most 4)"
    )
    parser.add_argument(
        "--queue", type=non_negative_int, default=16, metavar="N", help="requests that may wait (default 16)"
    )
    parser.add_argument(
        "--max-tokens",
        type=positive_int,
        default=4096,
        metavar="N",
        help="longest answer (default 4096); requests for more get so many",
    )
    parser.add_argument(
        "--context-tokens",
        type=positive_int,
        default=8192,
        metavar="N",
        help="longest conversation of a model with attention layers (default 8192); others have no limit",
    )
    parser.add_argument(
        "--timeout", type=number, default=300.0, metavar="S", help="seconds that an answer may take (default 300)"
    )
    parser.add_argument(
        "--max-body", type=positive_int, default=4, metavar="MB", help="largest body of a request (default 4)"
    )
    parser.add_argument(
        "--cache", type=non_negative_int, default=256, metavar="MB", help="memory for conversations (default 256)"
    )


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C; return the exit code."""
    from kabrn_dist.cli.chat import check_model_file

    check_model_file(options.model)
    settings = make_server_settings(options)
    for name in ("starlette", "uvicorn"):
        if not is_installed(name):
            raise UserError(
                f"serve needs {name}, which is not installed; use: pip install numpy starlette uvicorn jinja2"
            )
    from kabrn_dist.runtime.server.listener import serve_model

    with contextlib.suppress(KeyboardInterrupt):
        serve_model(options.model, settings)
    print("stopped", file=sys.stderr)
    return 0


def make_server_settings(options: argparse.Namespace) -> ServerSettings:
    """Return the settings that the options ask for.

    Raises:
        UserError: for values that make no sense, and for an address that others reach without a token.
    """
    from kabrn_dist.runtime.server.settings import ServerSettings

    if not (math.isfinite(options.timeout) and options.timeout > 0):
        raise UserError(f"--timeout {options.timeout:g}: is no time to answer in; use 300")
    if options.threads > THREADS_LIMIT:
        raise UserError(
            f"--threads {options.threads}: is more than {THREADS_LIMIT}; use as many as the machine has cores"
        )
    if options.port > 65535:
        raise UserError(f"--port {options.port}: is larger than 65535; use 8080")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = ServerSettings(
        host=options.host,
        port=options.port,
        threads=options.threads,
        contexts=options.contexts or max(1, min(4, cores // options.threads)),
        queue_limit=options.queue,
        token=_read_token(options.token, options.token_file),
        max_tokens=options.max_tokens,
        context_tokens=options.context_tokens,
        timeout=options.timeout,
        body_bytes=options.max_body * 1_000_000,
        cache_bytes=options.cache * 1_000_000,
        hosts=tuple(name.lower() for name in options.allow_host),
        adapters=tuple(_parse_adapter(text) for text in options.adapter),
        adapter_folder=options.adapter_folder,
    )
    if options.adapter_folder is not None and not options.adapter_folder.is_dir():
        raise UserError(f"--adapter-folder {options.adapter_folder}: no such folder; make it, or leave it out")
    if not settings.is_loopback and not settings.token:
        raise UserError(f"--host {options.host}: others can reach it; add --token-file FILE, or use 127.0.0.1")
    return settings


def _parse_adapter(text: str) -> AdapterSource:
    """Return what NAME=PATH or NAME=PATH=W asks for."""
    from kabrn_dist.runtime.server.settings import AdapterSource

    name, _, rest = text.partition("=")
    if not name or not rest:
        raise UserError(f"--adapter {text}: no name or no path; write it as NAME=PATH, such as poems=adapters/poems")
    try:
        return AdapterSource(name, *parse_weighted_path(rest))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--adapter {text}: {error}") from None


def _read_token(token: str, file: Path | None) -> str:
    if file is not None:
        if token:
            raise UserError("--token and --token-file: give one of them")
        from kabrn_dist.utils.safe_open import read_plain

        content = read_plain(file, TOKEN_BYTES_LIMIT, follow_links=True, remedy="write a token into its first line")
        token = (content.decode(errors="replace").splitlines() or [""])[0].strip()
    elif not token:
        return ""
    place = "--token" if file is None else str(file)
    if len(token) < TOKEN_MIN_CHARACTERS or not all("!" <= character <= "~" for character in token):
        raise UserError(
            f"{place}: a token has at least {TOKEN_MIN_CHARACTERS} letters, digits and signs, without spaces; "
            "make one with: openssl rand -hex 24"
        )
    return token
