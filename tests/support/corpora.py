"""Small data sets in the layouts of the published ones, and ways to pack a folder."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zstandard

MATH = {
    "train/algebra/1.json": {
        "problem": "What is $1+1$?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": r"It is $\boxed{2}$.",
    },
    "train/algebra/10.json": {
        "problem": "Halve it.",
        "level": "Level 5",
        "type": "Algebra",
        "solution": r"First $\boxed{1}$, then $\boxed{\frac{1}{2}}$.",
    },
    "train/geometry/2.json": {
        "problem": "Set é?",
        "level": "Level ?",
        "type": "Geometry",
        "solution": r"$\boxed{\{1\}}$",
    },
    "test/algebra/1.json": {
        "problem": "Test?",
        "level": "Level 2",
        "type": "Algebra",
        "solution": r"$\fbox{no}$",
    },
}
AMPS = {
    "amps/khan/504/1.json": {"question": "Simplify.", "hints": ["First so.", "$x=1$"]},
    "amps/khan/504/2.json": {"problem": "Add.", "hints": ["$3$"]},
    "amps/mathematica/algebra/roots/0.txt": "Problem:\nFind $x$.\n\nAnswer:\n$1$\nAnswer:\n$2$\n",
    "amps/mathematica/calculus/w_steps/7.txt": "Problem:\r\nDerive $x^2$.\r\nAnswer:\r\n$2x$\r\nby rule\r\n",
    "amps/data_file_lists/list.txt": "./algebra/roots/0.txt\n",
}
M2D2 = {f"cs.CL/{split}.txt": f"a {split} text\n\nanother é\r\nlast" for split in ("train", "valid", "test")}
APPS = {
    "APPS/train/0000/question.txt": "Print twice.\n",
    "APPS/train/0000/solutions.json": ["print(2)\n", "print(1 + 1)\n"],
    "APPS/train/0000/input_output.json": {"inputs": [], "outputs": []},
    "APPS/train/0001/question.txt": "Write f.",
    "APPS/train/0001/solutions.json": ["def f():\n    return 1"],
    "APPS/train/0001/starter_code.py": "def f():\n",
    "APPS/train/0002/question.txt": "Nobody knows.",
    "APPS/train/0002/solutions.json": [],
    "APPS/test/0000/question.txt": "Not this.",
    "APPS/test/0000/solutions.json": ["no"],
}


def as_bytes(content: Any) -> bytes:
    """Return bytes and texts as they are, other things as JSON."""
    if isinstance(content, bytes):
        return content
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def write_folder(root: Path, files: Mapping[str, Any]) -> Path:
    """Write `files` below `root`."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(as_bytes(content))
    return root


def make_tar(files: Mapping[str, Any]) -> bytes:
    """Return a plain tar of `files` in their order."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(as_bytes(content))
            archive.addfile(member, io.BytesIO(as_bytes(content)))
    return packed.getvalue()


def write_archives(root: Path, stem: str, files: Mapping[str, Any]) -> list[Path]:
    """Write `files` as every kind of archive, members sorted as a folder is."""
    ordered = {name: files[name] for name in sorted(files, key=lambda name: name.split("/"))}
    plain = make_tar(ordered)
    packed = {
        ".tar": plain,
        ".tar.gz": gzip.compress(plain),
        ".tgz": gzip.compress(plain),
        ".tar.zst": zstandard.compress(plain),
    }
    for ending, content in packed.items():
        (root / (stem + ending)).write_bytes(content)
    with zipfile.ZipFile(root / f"{stem}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in reversed(ordered):
            archive.writestr(name, as_bytes(ordered[name]))
    return [root / (stem + ending) for ending in (*packed, ".zip")]


def to_jsonl(records: list[Any]) -> str:
    """Return a line of JSON for each record."""
    return "".join(json.dumps(record) + "\n" for record in records)
