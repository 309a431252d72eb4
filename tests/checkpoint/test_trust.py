"""Checkpoints, shards, tokenizers, configurations, exports from a stranger: refused, and nothing in them runs."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.recipe import load_recipe
from kabrn_dist.checkpoint.store import CheckpointStore, load_tensor, read_manifest
from kabrn_dist.config.file import load_config
from kabrn_dist.data.index_io import read_index
from kabrn_dist.data.shard_set import open_shard_folder
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.data.verify import verify_shards
from kabrn_dist.inference.load import load_export
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safetensors_header import read_header
from tests.checkpoint.test_store import constant, reseal
from tests.support.runs import SMALL_CONFIG
from tests.support.shard_sets import Texts, make_set
from tests.test_imports import EVERYTHING, list_names, parse


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["BOMB"],)


@pytest.fixture
def bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setenv("BOMB", str(tmp_path / "went-off"))
    return pickle.dumps((Bomb(), b"x" * 5000))


def raw(header: Any, data: int = 4000) -> bytes:
    """A safetensors file with this header, text or JSON, and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(start: int = 0, stop: int = 4000, shape: Any = (1000,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


FILES = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "absurd length": (2**63).to_bytes(8, "little") + bytes(4000),
    "length beyond the file": (5000).to_bytes(8, "little") + bytes(4000),
    "no JSON": raw(b"w" * 100),
    "no UTF-8": raw(b'{"\xff\xfe": 1}'),
    "deep": raw(b'{"w@0":' * 150 + b"1" + b"}" * 150),
    "a list": raw([1, 2]),
    "no mapping": raw({"w@0": 7}),
    "another key": raw({"w@0": entry() | {"code": "os.system"}}),
    "digits": raw(b'{"w@0": {"dtype": "F32", "shape": [' + b"9" * 600 + b'], "data_offsets": [0, 4000]}}'),
    "gigantic shape": raw({"w@0": entry(shape=[2**40, 2**40])}),
    "shape of nothing": raw({"w@0": entry(shape=[1000, True])}),
    "negative": raw({"w@0": entry(start=-4000, stop=0)}),
    "backwards": raw({"w@0": entry(start=4000, stop=0)}),
    "beyond the end": raw({"w@0": entry(4000, 8000)}),
    "hole": raw({"w@0": entry(96, 4096)}, 4096),
    "too long": raw({"w@0": entry()}, 5000),
    "overlap": raw({"w@0": entry(), "v": entry(0, 4000)}),
    "unknown dtype": raw({"w@0": entry(dtype="F31")}),
    "dtype list": raw({"w@0": entry(dtype=["F32"])}),
    "another tensor": raw({"v@0": entry()}),
    "one more": raw({"w@0": entry(), "v": entry(4000, 4000, [0])}),
    "another shape": raw({"w@0": entry(shape=[10, 100])}),
    "another type": raw({"w@0": entry(dtype="I32")}),
}


def replace_shard(path: Path, content: bytes) -> None:
    """Put another file in a checkpoint, with a manifest whose size and sha256 are right."""
    (path / "rank-00000.safetensors").write_bytes(content)

    def record(manifest: dict[str, Any]) -> None:
        manifest["files"][0] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    reseal(path, record)


def two_checkpoints(folder: Path) -> tuple[CheckpointStore, Path, Path]:
    store = CheckpointStore(folder)
    assert all(store.save(step, constant(float(step)), {}) for step in (1, 2))
    return store, folder / "step-00000001", folder / "step-00000002"


def test_files_behind_a_good_manifest(tmp_path: Path, bomb: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store, older, newer = two_checkpoints(tmp_path / "run")
    for what, content in {**FILES, "pickle": bomb}.items():
        replace_shard(newer, content)
        caplog.clear()
        tracemalloc.start()
        assert store.find_latest() == older, what
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20, what
        tracemalloc.stop()
        lines = [line for line in caplog.messages if "step-00000002" in line]
        assert len(lines) == 1 and "skipping checkpoint" in lines[0] and "\n" not in lines[0], what
        if what != "one more":
            with pytest.raises(UserError, match="rank-00000"):
                store.load(newer, constant(0.0))
    assert not (tmp_path / "went-off").exists()
    replace_shard(newer, raw({"w@0": entry(), "__metadata__": {"any": "thing"}}))
    assert store.find_latest() == newer
    assert load_tensor(newer, read_manifest(newer), "w").eq(0).all()


def test_a_header_of_the_format_is_read_as_others_read_it(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.ones(()), "é\n": torch.zeros(0, 4).bfloat16()}
    save_file(tensors, tmp_path / "f.safetensors")
    entries = read_header(tmp_path / "f.safetensors")
    loaded = load_file(tmp_path / "f.safetensors")
    assert {name: found.shape for name, found in entries.items()} == {n: tuple(v.shape) for n, v in loaded.items()}
    with pytest.raises(UserError, match="are allowed"):
        read_header(tmp_path / "f.safetensors", limit=64)


def name_outside(manifest: dict[str, Any]) -> None:
    manifest["files"][0]["name"] = manifest["tensors"]["w"]["pieces"][0]["file"] = "../other/rank-00000.safetensors"


def name_absolute(manifest: dict[str, Any]) -> None:
    manifest["files"][0]["name"] = "/etc/passwd"


def name_with_line(manifest: dict[str, Any]) -> None:
    manifest["files"][0]["name"] = "rank-00000.safetensors\n"


def nest(manifest: dict[str, Any]) -> None:
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    manifest["state"] = {"deep": deep}


def overlap(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["v"] = manifest["tensors"]["w"]


def many_dimensions(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["w"]["shape"] = [1] * 100_000


@pytest.mark.parametrize("edit", [name_outside, name_absolute, name_with_line, nest, overlap, many_dimensions])
def test_manifests(tmp_path: Path, edit: Callable[[dict[str, Any]], None], caplog: pytest.LogCaptureFixture) -> None:
    store, older, newer = two_checkpoints(tmp_path)
    shutil.copytree(newer, tmp_path / "other")
    reseal(newer, edit)
    assert store.find_latest() == older
    assert "step-00000002" in caplog.text
    with pytest.raises(UserError, match=r"manifest\.json|rank-0"):
        store.load(newer, constant(0.0))


def test_manifests_that_are_no_text(tmp_path: Path, bomb: bytes) -> None:
    store, older, newer = two_checkpoints(tmp_path / "run")
    for content in (b"", b"[" * 10**6, bomb, b'{"sha256": 1' + b"0" * 5000 + b"}", b"\xff\xfe{}", b"null"):
        (newer / "manifest.json").write_bytes(content)
        assert store.find_latest() == older, content[:20]
    with open(newer / "manifest.json", "wb") as file:
        file.truncate(2**40)
    assert store.find_latest() == older
    assert not (tmp_path / "went-off").exists()


def link(file: Path, elsewhere: Path) -> None:
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def pipe(file: Path, elsewhere: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def directory(file: Path, elsewhere: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("change", [link, pipe, directory])
@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
def test_what_is_no_plain_file_is_never_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[Path, Path], None], name: str
) -> None:
    store, older, newer = two_checkpoints(tmp_path / "run")
    change(newer / name, tmp_path / "elsewhere")
    assert store.find_latest() == older
    assert name in caplog.text


@pytest.mark.slow
def test_every_flipped_byte_truncation_and_deletion_is_met(tmp_path: Path) -> None:
    """K2 in full, on a small checkpoint: what is damaged is never loaded, and the older one is taken."""
    store = CheckpointStore(tmp_path)
    assert all(store.save(step, constant(float(step), 8), {"rate": 0.5}) for step in (1, 2))
    older, newer = tmp_path / "step-00000001", tmp_path / "step-00000002"
    intact = read_manifest(newer)
    for file in sorted(newer.iterdir()):
        content = file.read_bytes()
        damaged = [content[:length] for length in (0, 1, len(content) // 2, len(content) - 1)]
        damaged += [
            content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
            for place in range(len(content))
            for bit in (1, 0x20)
        ]
        for wrong in damaged:
            file.write_bytes(wrong)
            # JSON says the same in more than one way: é and \u00E9; then nothing is damaged.
            assert store.find_latest() == older or read_manifest(newer) == intact
        file.unlink()
        assert store.find_latest() == older
        file.write_bytes(content)
        assert store.find_latest() == newer


YAMLS = (
    "!!python/object/apply:os.mkdir [BOMB]",
    "run: !!python/object/apply:os.mkdir [BOMB]",
    "run: !!python/object/new:os.system [mkdir BOMB]",
    "run: {folder: !!python/name:os.system }",
    "? !!python/object/apply:os.mkdir [BOMB]\n: 1",
)


def test_configurations(tmp_path: Path, bomb: bytes) -> None:
    file = tmp_path / "config.yaml"
    for text in YAMLS:
        file.write_text(text.replace("BOMB", os.environ["BOMB"]))
        with pytest.raises(UserError, match="not valid YAML"):
            load_config(file)
        with pytest.raises(UserError):
            load_export(tmp_path)
        with pytest.raises(UserError):
            load_recipe(file)
    file.write_bytes(bomb)
    with pytest.raises(UserError):
        load_config(file)
    with pytest.raises(UserError, match="not a YAML value"):
        load_config("configs/tiny.yaml", [f"run.seed={YAMLS[0]}"])
    assert not (tmp_path / "went-off").exists()


@pytest.mark.slow
def test_tokenizers_and_exports(tmp_path: Path, bomb: bytes) -> None:
    file = tmp_path / "tokenizer.json"
    contents = (
        bomb,
        b"",
        b"[" * 10**6,
        b'{"kind": "bytes", "code": "__import__(\'os\')"}',
        b'{"model": {"type": "Code"}}',
    )
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            Tokenizer.load(file)
    file.write_bytes(Tokenizer.of_bytes().content)
    tree = {**SMALL_CONFIG, "run": {"folder": str(tmp_path / "run")}, "data": {"path": "x", "sequence_length": 32}}
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    for content in (bomb, *FILES.values()):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError):
            load_export(tmp_path)
    assert not (tmp_path / "went-off").exists()


def rewrite_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit an index as a hostile author would, with a matching fingerprint."""
    tree = json.loads((folder / "index.json").read_text())
    edit(tree)
    del tree["fingerprint"]
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
    (folder / "index.json").write_text(json.dumps(tree | {"fingerprint": hashlib.sha256(canonical).hexdigest()}))


def shard_of(tree: dict[str, Any]) -> dict[str, Any]:
    shard: dict[str, Any] = tree["sources"][0]["train"]["shards"][0]
    return shard


def test_shards_and_their_index(tmp_path: Path, bomb: bytes) -> None:
    shards = tmp_path / "good"
    make_set(shards, Texts("random"))
    edits: dict[str, Callable[[dict[str, Any]], None]] = {
        "path": lambda tree: shard_of(tree).update(name="../elsewhere.tar"),
        "absolute": lambda tree: shard_of(tree).update(name="/etc/passwd.tar"),
        "size": lambda tree: shard_of(tree).update(bytes=2**60),
        "offset": lambda tree: shard_of(tree)["blocks"][0].__setitem__(0, 2**62),
        "negative": lambda tree: shard_of(tree)["blocks"][0].__setitem__(0, -512),
        "tokens": lambda tree: shard_of(tree)["blocks"][0].__setitem__(1, 2**61),
    }
    for what, edit in edits.items():
        folder = tmp_path / what
        shutil.copytree(shards, folder)
        (tmp_path / "elsewhere.tar").write_bytes(bomb)
        rewrite_index(folder, edit)
        with pytest.raises(UserError):
            open_shard_folder(folder)
    folder = tmp_path / "pickled"
    shutil.copytree(shards, folder)
    shard = next(folder.glob("*train*.tar"))
    content = (bomb * (shard.stat().st_size // len(bomb) + 1))[: shard.stat().st_size]
    shard.write_bytes(content)
    rewrite_index(folder, lambda tree: shard_of(tree).update(sha256=hashlib.sha256(content).hexdigest()))
    with pytest.raises(UserError, match=shard.name):
        verify_shards(folder, read_index(folder))
    for content in (bomb, b"[" * 10**6, b""):
        (folder / "index.json").write_bytes(content)
        with pytest.raises(UserError, match=r"index\.json"):
            open_shard_folder(folder)
    assert not (tmp_path / "went-off").exists()


DANGEROUS = {"yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "os.system", "eval", "exec", "compile"}
DANGEROUS |= {"os.popen", "subprocess.getoutput", "__import__", "importlib.import_module"}


@pytest.mark.parametrize("source", EVERYTHING)
def test_no_source_holds_what_runs_a_text(source: str) -> None:
    tree = parse(source)
    assert not list_names(tree) & DANGEROUS
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword):
            assert node.arg not in ("shell", "allow_pickle", "trust_remote_code") or _is_false(node.value), source
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("extractall", "extract"), source


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False
