"""The runtime in WebAssembly: greedy tokens are those of the native one; the page works from the disk."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.runtime.native import NativeModel
from kabrn_dist.runtime.offline_page import PAGE_FOLDER, write_offline_page
from kabrn_dist.runtime.wasm import WasmKind, compile_wasm
from tests.support.models import write_model_kinds

PROBE = Path(__file__).with_name("wasm_probe.js")
KINDS = ("rational", "chebyshev", "bspline", "swiglu", "hybrid", "scale groups", "router groups", "plain")
GREEDY = 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed"),
]
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_model_kinds(tmp_path_factory.mktemp("models"), KINDS)


def find_node(kind: WasmKind) -> list[str]:
    """Node 20 has the dot products of bytes behind a flag, which later versions do not know."""
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    is_old = int(version.removeprefix("v").split(".")[0]) <= 20
    return ["node", "--experimental-wasm-relaxed-simd"] if kind == "relaxed" and is_old else ["node"]


def computes_relaxed(node: list[str]) -> bool:
    code = f"process.stdout.write(require({json.dumps(str(PAGE_FOLDER / 'worker.js'))}).chooseKind())"
    return subprocess.run([*node, "-e", code], capture_output=True, text=True, check=True).stdout == "relaxed"


def run_node(kind: WasmKind, *models: Path) -> list[dict[str, Any]]:
    command = [
        *find_node(kind),
        str(PROBE),
        str(PAGE_FOLDER / "worker.js"),
        str(compile_wasm(kind)),
        str(GREEDY),
        *map(str, models),
    ]
    if kind == "relaxed" and not computes_relaxed(find_node(kind)):
        pytest.skip("this node's dot products of bytes are not those of the standard")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def greedy_natively(path: Path) -> list[int]:
    with NativeModel(path) as model, model.context(max_tokens=100) as context:
        context.set_sampling(temperature=0)
        logits = context.decode([i * 7919 % model.info.vocab_size for i in range(37)])
        ids = []
        for _ in range(GREEDY):
            assert logits is not None
            ids.append(context.sample(logits))
            logits = context.decode(ids[-1:])
    return ids


@needs_node
@pytest.mark.parametrize(("kind", "kernels"), [("relaxed", "wasm-relaxed"), ("simd", "wasm"), ("scalar", "scalar")])
def test_greedy_tokens_are_those_of_the_native_runtime(kind: WasmKind, kernels: str, models: list[Path]) -> None:
    for path, found in zip(models, run_node(kind, *models), strict=True):
        assert found["kernels"] == kernels
        assert found["ids"] == greedy_natively(path), path.name
        assert found["tokens"] == Tokenizer.of_bytes().encode("Hé!\0")
        # Asked again, it reads but the last token of what it has read before.
        assert found["same"] and found["second"]["cachedTokens"] == found["first"]["promptTokens"] - 1


@pytest.mark.parametrize("kind", ["relaxed", "simd", "scalar"])
def test_logits_under_wasmtime_are_those_of_the_native_runtime(kind: WasmKind, models: list[Path]) -> None:
    wasmtime = pytest.importorskip("wasmtime")
    store = wasmtime.Store(wasmtime.Engine())
    store.set_wasi(wasmtime.WasiConfig())
    linker = wasmtime.Linker(store.engine)
    linker.define_wasi()
    module = wasmtime.Module(store.engine, compile_wasm(kind).read_bytes())
    exports = linker.instantiate(store, module).exports(store)
    memory = exports["memory"]
    exports["_initialize"](store)

    def call(name: str, *arguments: int) -> int:
        return int(exports[name](store, *arguments))

    def place(content: bytes) -> int:
        at = call("malloc", len(content))
        memory.write(store, content, at)
        return at

    def read(at: int, count: int) -> bytes:
        return bytes(memory.read(store, at, at + count))

    tokens = np.arange(37, dtype=np.uint32) * 7919 % 300
    for path in models:
        content, out = path.read_bytes(), place(bytes(1024))
        assert call("mkb_model_open_memory", place(content), len(content), 1, out, out + 512) == 0
        model = int.from_bytes(read(out, 4), "little")
        assert call("mkb_context_create", model, 1, 100, out, out + 512) == 0
        context, logits = int.from_bytes(read(out, 4), "little"), place(bytes(1200))
        assert call("mkb_decode", context, place(tokens.tobytes()), 37, logits, out + 512) == 0
        with NativeModel(path) as native, native.context(max_tokens=100) as other:
            expected = other.decode(tokens.tolist())
        found = np.frombuffer(read(logits, 1200), np.float32)
        # Softmax takes expf from the library of C, which is another one here.
        most = 1e-5 if path.stem in {"hybrid", "plain"} else 0
        assert expected is not None and np.abs(found - expected).max() <= most, path.name


@needs_node
def test_a_damaged_model_is_an_error_of_one_line(models: list[Path], tmp_path: Path) -> None:
    content = bytearray(models[0].read_bytes())
    content[-70] ^= 1
    (tmp_path / "m.mkb").write_bytes(content)
    command = [
        "node",
        str(PROBE),
        str(PAGE_FOLDER / "worker.js"),
        str(compile_wasm("simd")),
        "1",
        str(tmp_path / "m.mkb"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1 and "is damaged" in done.stderr and done.stderr.count("\n") == 1


def test_the_page_chats_from_the_disk(models: list[Path], tmp_path: Path) -> None:
    browser = pytest.importorskip("tests.support.browser")
    if browser.CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    write_offline_page(tmp_path / "page")
    with browser.start_browser(tmp_path / "profile") as page:
        page.open((tmp_path / "page" / "index.html").as_uri())
        page.wait_for("document.getElementById('model-file')")
        document = page.call("DOM.getDocument")["root"]["nodeId"]
        node = page.call("DOM.querySelector", nodeId=document, selector="#model-file")["nodeId"]
        page.call("DOM.setFileInputFiles", nodeId=node, files=[str(models[-1])])
        page.wait_for(f"document.title === {json.dumps(models[-1].stem)}", 60)
        page.evaluate("document.getElementById('input').focus()")
        page.type("Hello")
        page.press("Enter")
        page.wait_for("!document.querySelector('.busy') && document.querySelectorAll('.numbers').length", 60)
        assert page.evaluate("document.querySelector('#turns > :last-child .text').textContent.length") > 0
        assert "tokens/s" in page.evaluate("document.querySelector('#turns > :last-child .numbers').textContent")
        page.screenshot(tmp_path / "page.png")
        page.evaluate("document.querySelector('[data-mode=text]').click()")
        page.wait_for("document.body.classList.contains('continues')")
        page.evaluate("document.getElementById('input').focus()")
        page.type("Once there was")
        page.press("Enter")
        page.wait_for("!document.querySelector('.busy') && document.querySelectorAll('.numbers').length === 2", 60)
        assert page.evaluate("document.querySelector('#turns > :last-child .text').textContent.length") > 0
        assert page.errors == []
