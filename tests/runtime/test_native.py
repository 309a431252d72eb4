"""The runtime in C, through its library: PyTorch's logits, states that continue with the same bits, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.runtime.model_file import read_model_file, write_model_file
from kabrn_dist.runtime.native import NativeModel, native_kernels
from kabrn_dist.utils.errors import UserError
from tests.support.models import MODEL_KINDS, make_model, make_model_config
from tests.support.runs import ROOT

BYTES = Tokenizer.of_bytes()
TOKENS = [BYTES.document_token, *BYTES.encode("The quick brown fox é jumps over 13 lazy dogs,\n\tagain and again.")]


def pack(path: Path, *overrides: str, embedding: str = "fp32") -> MixKABRN:
    config = make_model_config(*overrides)
    model = make_model(config)
    write_model_file(model, config, BYTES, 3, path, embedding_dtype=embedding, template="{{ messages }}")
    return model


def logits_of(model: MixKABRN, tokens: list[int]) -> np.ndarray:
    ids = torch.tensor([tokens])
    logits, _ = model.decode(ids, torch.zeros_like(ids), torch.arange(len(tokens))[None], None)
    return logits[0].numpy()


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_logits_are_those_of_pytorch(kind: str, tmp_path: Path) -> None:
    model = pack(tmp_path / "m.mkb", *MODEL_KINDS[kind])
    expected = logits_of(model, TOKENS)
    with NativeModel(tmp_path / "m.mkb") as native, native.context(max_tokens=100) as context:
        prefill = context.decode(TOKENS)
        context.reset()
        for token in TOKENS:
            decoded = context.decode([token])
        assert context.position == len(TOKENS) and context.decode(TOKENS[:1], logits=False) is None
    assert prefill is not None and decoded is not None
    assert np.abs(prefill - expected).max() <= 1e-4 and np.abs(decoded - expected).max() <= 1e-4


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_rounded_embedding_computes_as_its_values_say(dtype: str, tmp_path: Path) -> None:
    model = pack(tmp_path / "m.mkb", embedding=dtype)
    file = read_model_file(tmp_path / "m.mkb")
    model.embedding.weight.data = torch.from_numpy(file.read("embedding").values[0])
    model.head.weight.data = torch.from_numpy(file.read("head").values[0])
    with NativeModel(tmp_path / "m.mkb") as native, native.context() as context:
        found = context.decode(TOKENS)
    assert found is not None
    assert np.abs(found - logits_of(model, TOKENS)).max() <= 1e-4


def test_what_a_file_says_about_itself(tmp_path: Path) -> None:
    model = pack(tmp_path / "m.mkb")
    file = read_model_file(tmp_path / "m.mkb")
    with NativeModel(tmp_path / "m.mkb") as native:
        info = native.info
        assert (info.vocab_size, info.tokenizer_size, info.document_token, info.step) == (300, 257, 256, 3)
        assert info.sha256 == file.header["sha256"].hex() and info.tokenizer_sha256 == BYTES.sha256
        assert info.file_bytes == (tmp_path / "m.mkb").stat().st_size
        # The runtime counts the routers' biases too.
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert info.parameters - parameters in (0, model.routers.bias.numel())
        assert native.config == file.config and native.template == "{{ messages }}"
        assert native.tokenize("né") == BYTES.encode("né") and native.tokenize(b"\xff\x00") == [255, 0]
        assert native.tokenize("") == [] and native.token_bytes(195) == b"\xc3"
    assert native_kernels()


@pytest.mark.parametrize("kind", ["rational", "hybrid", "scale groups"])
def test_a_state_continues_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    pack(tmp_path / "m.mkb", *MODEL_KINDS[kind])
    with NativeModel(tmp_path / "m.mkb") as native:
        context, other = native.context(max_tokens=200), native.context(threads=2, max_tokens=200)
        context.set_sampling(seed=5)
        context.decode(TOKENS, logits=False)
        content = context.state()
        context.save_state(tmp_path / "state")
        expected = context.decode(TOKENS[:3])
        assert expected is not None
        drawn = [context.sample(expected) for _ in range(5)]
        for restore in (lambda: other.set_state(content), lambda: other.load_state(tmp_path / "state")):
            restore()
            found = other.decode(TOKENS[:3])
            assert found is not None and np.array_equal(found, expected)
            assert other.position == len(TOKENS) + 3 and [other.sample(found) for _ in range(5)] == drawn


def test_mistakes_are_errors_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.mkb"
    pack(path)
    content = bytearray(path.read_bytes())
    for name, change in {
        "cut": content[:-1],
        "foreign": b"GGUF" + content[4:],
        "flipped": content[:-70] + bytes([content[-70] ^ 1]) + content[-69:],
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(change)
        with pytest.raises(UserError) as raised:
            NativeModel(tmp_path / name)
        assert "\n" not in str(raised.value) and name in str(raised.value), name
    for missing in (tmp_path / "none", tmp_path, "a\0b"):
        with pytest.raises(UserError):
            NativeModel(missing)
    with NativeModel(path) as native, native.context() as context:
        with pytest.raises(UserError):
            context.decode([300])
        with pytest.raises(UserError):
            context.set_sampling(temperature=-1)
        with pytest.raises(UserError):
            context.set_state(b"no state")
        with pytest.raises(ValueError, match="logits have shape"):
            context.sample(np.zeros(3, np.float32))
        state = context.state()
    with pytest.raises(ValueError, match="closed already"):
        context.decode(TOKENS)
    pack(tmp_path / "other.mkb", "model.experts.type=swiglu")
    with NativeModel(tmp_path / "other.mkb") as native, pytest.raises(UserError):
        native.context().set_state(state)


def test_a_model_that_is_closed_takes_its_contexts_along(tmp_path: Path) -> None:
    pack(tmp_path / "m.mkb")
    native = NativeModel(tmp_path / "m.mkb")
    context = native.context()
    native.close()
    native.close()
    with pytest.raises(ValueError, match="closed already"):
        context.decode(TOKENS)


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "tokenizers", "pydantic", "deepspeed"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
"""


def test_python_without_torch_reads_and_runs_a_model(tmp_path: Path) -> None:
    pack(tmp_path / "m.mkb")
    code = f"""{WITHOUT_TORCH}
from kabrn_dist.runtime.model_file import read_model_file
from kabrn_dist.runtime.native import NativeModel
file = read_model_file({str(tmp_path / "m.mkb")!r})
with NativeModel(file.path) as model, model.context() as context:
    print(context.decode(model.tokenize("ab")).shape, file.read("mixer.query").codes.shape)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "(300,) (1, 20, 40)\n", result.stderr


def test_the_command_chats_without_torch(tmp_path: Path) -> None:
    pack(tmp_path / "m.mkb")
    code = f"{WITHOUT_TORCH}\nfrom kabrn_dist.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "chat", str(tmp_path / "m.mkb")]
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=b"Hello\n", capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0 and done.stdout, done.stderr
    for name, words in ((tmp_path, "pack it first"), (tmp_path / "no", "no such file")):
        refused = subprocess.run([*command[:-1], str(name)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert refused.returncode == 2 and words in refused.stderr and refused.stderr.count("\n") == 1
