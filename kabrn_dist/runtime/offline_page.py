"""Writes the chat page that needs no server: the page, the runtime in WebAssembly, and a worker, in one folder."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from kabrn_dist.runtime.wasm import WASM_KIND_FLAGS, compile_wasm
from kabrn_dist.utils.errors import UserError

PAGE_FOLDER = Path(__file__).parent / "page"
# A page from a disk may fetch nothing, and start workers from its own text only: all is in scripts of the old kind.
_OFFLINE_SCRIPTS = '<script src="offline-runtime.js"></script>\n<script src="offline.js"></script>\n'


def write_offline_page(folder: Path) -> None:
    """Write a folder whose index.html chats when a browser opens it from the disk.

    Args:
        folder: Where it goes; files of the same names are replaced.

    Raises:
        UserError: if the runtime cannot be compiled, or the folder cannot be written.
    """
    try:
        page = (PAGE_FOLDER / "index.html").read_text(encoding="utf-8")
        worker = (PAGE_FOLDER / "worker.js").read_text(encoding="utf-8")
        parts = {kind: base64.b64encode(compile_wasm(kind).read_bytes()).decode() for kind in WASM_KIND_FLAGS}
        # The page is read for its first script, before which the engine must stand.
        before, first, after = page.partition("<script>")
        files = {
            "index.html": before + _OFFLINE_SCRIPTS + first + after,
            "offline.js": (PAGE_FOLDER / "offline.js").read_text(encoding="utf-8"),
            "offline-runtime.js": f"window.mixkabrnOffline = {json.dumps({'worker': worker, **parts})};\n",
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; name another folder with --out") from error
