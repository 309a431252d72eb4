"""Files of users are opened only if they are regular, and read only up to a limit, wherever they are read."""

from __future__ import annotations

import ast
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.clean.config import ContaminationConfig
from data_prep.clean.contamination import load_evaluation_sets
from data_prep.recipe import load_recipe
from data_prep.sources.build import build_source
from kabrn_dist.analysis.log import read_expert_log
from kabrn_dist.config.file import load_config
from kabrn_dist.data.index_io import read_index
from kabrn_dist.data.shard_set import open_shard_folder
from kabrn_dist.data.token_stream import TokenStream
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.inference.load import load_export
from kabrn_dist.metrics.writer import LogWriter
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import open_plain, read_plain
from tests.support.shard_sets import Texts, make_set

ROOT = Path(__file__).parents[2]


def read_source(kind: str, path: Path) -> None:
    source = build_source(kind, [path], {})
    for unit in source.units():
        list(source.read(unit))


def read_shard(path: Path) -> None:
    """Read a shard that was exchanged after the set was opened."""
    original = path.with_name("original.tar")
    path.rename(original)
    index = make_set(path.with_name("set"), Texts("a", train=5))
    shards = open_shard_folder(path.with_name("set"))
    place = path.with_name("set") / index.sources[0].train.shards[0].name
    place.unlink()
    original.rename(place)
    TokenStream([(shards, index.sources[0])], "train").read(0, 5)


READERS: dict[str, Callable[[Path], Any]] = {
    "config.yaml": load_config,
    "recipe.yaml": load_recipe,
    "index.json": lambda path: read_index(path.parent),
    "tokenizer.json": Tokenizer.load,
    "shard.tar": read_shard,
    "export/config.yaml": lambda path: load_export(path.parent),
    "run/log.jsonl": lambda path: (path.with_name("config.yaml").touch(), read_expert_log(path.parent)),
    "run/log.jsonl ": lambda path: LogWriter(path.rename(path.with_name("log.jsonl")).parent, 0),
    "evaluation.jsonl": lambda path: load_evaluation_sets(ContaminationConfig(paths=(path,))),
    "a.txt": lambda path: read_source("text", path),
    "a.jsonl.gz": lambda path: read_source("text", path),
    "a.tar": lambda path: read_source("text", path),
    "a.zip": lambda path: read_source("text", path),
    "a.parquet": lambda path: read_source("parquet", path),
}


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    # The address of a socket has room for a hundred bytes.
    with socket.socket(socket.AF_UNIX) as unix:
        before = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)
        try:
            unix.bind(path.name)
        finally:
            os.fchdir(before)
            os.close(before)


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_pipe, make_socket, make_endless])
@pytest.mark.parametrize("name", READERS)
def test_what_is_not_a_regular_file_is_refused_in_one_line(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    with pytest.raises(UserError) as caught:
        READERS[name](path)
    message = str(caught.value)
    assert "\n" not in message
    assert "not a regular file" in message or "No such device" in message, message


@pytest.mark.parametrize("name", ["config.yaml", "recipe.yaml", "index.json", "tokenizer.json"])
def test_a_file_that_is_far_too_large_is_refused_before_it_is_read(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(UserError, match="4398046511104 bytes or more, above the"):
        READERS[name](tmp_path / name)


def test_links_are_followed_only_where_they_are_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_plain(tmp_path / "link", 7, follow_links=True) == b"content"
    with pytest.raises(UserError, match="is a link"):
        open_plain(tmp_path / "link")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UserError, match=r"circle: cannot be read \(Too many levels of symbolic links\); get well"):
        open_plain(tmp_path / "circle", follow_links=True, remedy="get well")


def test_names_and_sizes_that_mislead_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a name of a file"):
        open_plain(tmp_path / "a\0b")
    # A file of /proc says that it is empty.
    with pytest.raises(UserError, match="above the 3 allowed"):
        read_plain(Path("/proc/self/status"), 3)


# Files that the program itself has written, in folders of its own or of the kernel.
OWN_FILES = {
    "kabrn_dist/utils/safe_open.py": "the guarded opener itself",
    "kabrn_dist/utils/atomic_io.py": "writes; folders for fsync",
    "kabrn_dist/utils/lock.py": "the lock, opened for writing, which does not block",
    "kabrn_dist/evaluation/sandbox_child.py": "/proc, and the folder of the program that it runs",
    "kabrn_dist/metrics/writer.py": "the log, opened for appending without blocking",
    "kabrn_dist/metrics/logger.py": "/proc",
    "kabrn_dist/evaluation/result_file.py": "results, opened for appending without blocking",
    "kabrn_dist/grow/tensors.py": "the scratch folder",
    "kabrn_dist/train/launcher_watch.py": "/proc",
    "kabrn_dist/train/expert_balance.py": "/sys",
    "kabrn_dist/checkpoint/writer.py": "writes",
    "kabrn_dist/data/cache.py": "locks in the cache",
    "kabrn_dist/data/remote.py": "the part of a shard that is being downloaded",
    "kabrn_dist/data/token_stream.py": "the naive twin unpacks tars",
    "kabrn_dist/data/verified_record.py": "the record in the cache folder, opened without blocking",
    "kabrn_dist/data/verify.py": "tars whose hash was right a moment ago",
    "kabrn_dist/utils/terminal.py": "/dev/null",
    "kabrn_dist/kernels/build.py": "the compiled kernels",
    "kabrn_dist/planner/memory.py": "files of the system",
    "kabrn_dist/runtime/build.py": "sources of the package and the compiled runtime",
    "kabrn_dist/runtime/offline_page.py": "files of the package and the compiled modules",
    "kabrn_dist/runtime/server/app.py": "the page of the package",
    "kabrn_dist/runtime/server/listener.py": "/proc",
    "kabrn_dist/runtime/wasm.py": "sources of the package",
    "kabrn_dist/utils/launch_time.py": "files of the system",
    "kabrn_dist/utils/strict_yaml.py": "streams that a shell gives in place of a file, which are pipes",
    "data_prep/clean/config.py": "lists of the package",
    "kabrn_dist/online_learning/history.py": "a lock, which follows no link and is never read",
    "data_prep/encode.py": "files of the work folder",
    "data_prep/finalize.py": "files of the work folder",
    "data_prep/pieces.py": "files of the work folder",
    "data_prep/prepare.py": "files of the work folder",
    "data_prep/progress.py": "files of the work folder",
    "data_prep/read.py": "files of the work folder",
    "data_prep/shards.py": "shards that were just written",
    "data_prep/sorted_runs.py": "files of the work folder",
    "data_prep/streams.py": "files of the work folder",
    "data_prep/workers.py": "files of the work folder",
    "data_prep/workspace.py": "files of the work folder",
    "data_prep/sources/archive.py": "members of an archive that was opened by the guarded opener",
}
OPENERS = {"open", "read_text", "read_bytes", "memmap", "fromfile", "load_file", "safe_open"}
# What is called `open` and opens no file by its name.
METHODS = {"Run.open", "workspace.open"}


def find_plain_opens(code: str) -> list[str]:
    calls = [node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    named = [
        call for call in calls if isinstance(call, ast.Attribute) or (isinstance(call, ast.Name) and call.id == "open")
    ]
    return [name for name in map(ast.unparse, named) if name.split(".")[-1] in OPENERS and name not in METHODS]


def test_only_the_guarded_opener_opens_files_of_users() -> None:
    sources = [path for folder in ("kabrn_dist", "data_prep") for path in (ROOT / folder).rglob("*.py")]
    codes = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sources}
    users = {
        name for name, code in codes.items() if any(f"{call}(" in code for call in OPENERS) and find_plain_opens(code)
    }
    assert users <= OWN_FILES.keys()
    assert find_plain_opens("Path('x').read_text()") and find_plain_opens("with open(a) as f: pass")
    assert find_plain_opens("os.open(a, 0)") and not find_plain_opens("Run.open('runs/small')")
