"""Adapters in the C runtime: what they compute, switching between them, states that belong to them, mistakes."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kabrn_dist.adapters.adapter import Adapter
from kabrn_dist.adapters.folder import read_adapter, write_adapter
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.model.adapter import set_initial_states, set_low_ranks
from kabrn_dist.ops.low_rank import LowRank
from kabrn_dist.runtime.adapter_cache import convert_adapter_options
from kabrn_dist.runtime.adapter_file import (
    ADAPTER_FILE_MAGIC,
    ADAPTER_FILE_METHODS,
    ADAPTER_HEADER_DTYPE,
    encode_adapter,
    read_adapter_file,
    write_adapter_file,
)
from kabrn_dist.runtime.model_file import ModelFile, read_model_file, write_model_file
from kabrn_dist.runtime.native import NativeAdapter, NativeContext, NativeModel
from kabrn_dist.utils.errors import UserError
from tests.support.native_adapters import draw_low_ranks, draw_states, patch_between
from tests.support.native_models import KINDS, random_model, random_model_config, read_by_torch, write_random_model

TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 257, 70)]
FEW = TOKENS[:12]


def open_kind(
    kind: str, folder: Path, seed: int = 0, ternary: str = "tiles"
) -> tuple[GenerativeModel, NativeModel, ModelFile]:
    path = folder / f"{kind}-{seed}.mkb"
    model = write_random_model(kind, path, seed, options={"embedding_dtype": "fp32", "ternary": ternary})
    return model, NativeModel(path), read_model_file(path)


def read(context: NativeContext, tokens: list[int] = TOKENS) -> np.ndarray:
    logits = context.decode(tokens)
    assert logits is not None
    return logits


def read_each(context: NativeContext, tokens: list[int]) -> np.ndarray:
    return np.stack([read(context, [token]) for token in tokens])


def write_and_read(adapter: Adapter, model: ModelFile, path: Path) -> Adapter:
    """Write an adapter, and return it with the values that the runtime uses."""
    write_adapter_file(adapter, model, path)
    return read_adapter_file(path)


def to_torch(adapter: Adapter) -> dict[str, LowRank]:
    return {
        name: LowRank(torch.from_numpy(a.copy()), torch.from_numpy(b.copy()))
        for name, (a, b) in adapter.low_ranks.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_factors_compute_what_torch_does(kind: str, tmp_path: Path) -> None:
    """But where a value lies between two int8 codes, or two experts are alike: of three models one agrees to 1e-4."""
    errors = []
    for seed in range(3):
        model, native, file = open_kind(kind, tmp_path, seed)
        used = write_and_read(draw_low_ranks(file, seed), file, tmp_path / "a.mka")
        set_low_ranks(model, to_torch(used))
        with native, native.context(max_tokens=len(FEW)) as context:
            before = read_each(context, FEW)
            context.set_adapters([(native.adapter(tmp_path / "a.mka"), 1.0)])
            found = read_each(context, FEW)
        assert np.abs(found - before).max() > 0.05
        errors.append(np.abs(found - read_by_torch(model, FEW).numpy()).max())
    assert min(errors) <= 1e-4 and np.median(errors) <= 0.05, errors


@pytest.mark.parametrize("kind", ["rational", "attention", "convolution", "dense", "plain"])
def test_initial_states_are_those_of_torch(kind: str, tmp_path: Path) -> None:
    model, native, file = open_kind(kind, tmp_path)
    first, second = draw_states(file, 1), draw_states(file, 2)
    sums = {
        layer: torch.from_numpy(0.5 * first.states[layer].matrix() - 2 * second.states[layer].matrix())
        for layer in first.states
    }
    set_initial_states(model, sums)
    with native, native.context(max_tokens=len(FEW)) as context:
        before = read_each(context, FEW)
        pair = [native.adapter(encode_adapter(adapter, file)) for adapter in (first, second)]
        context.set_adapters(list(zip(pair, (0.5, -2.0), strict=True)))
        found = read_each(context, FEW)
        context.reset()
        again = read_each(context, FEW)
    assert np.abs(found - before).max() > 0.05 and np.array_equal(found, again)
    assert np.abs(found - read_by_torch(model, FEW).numpy()).max() <= 1e-4


@pytest.mark.parametrize(
    ("kind", "ternary"), [("rational", "tiles"), ("groups", "base3"), ("bspline", "tiles"), ("dense", "base3")]
)
def test_a_patch_gives_the_bits_of_the_patched_model(kind: str, ternary: str, tmp_path: Path) -> None:
    _, native, file = open_kind(kind, tmp_path, ternary=ternary)
    config = random_model_config(kind)
    other = random_model(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in patch_names(file):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3 * float(parameter.std()))
    options = {"embedding_dtype": "fp32", "ternary": ternary}
    write_model_file(other, config, Tokenizer.of_bytes(), 7, tmp_path / "other.mkb", **options)
    patch = patch_between(file, read_model_file(tmp_path / "other.mkb"))
    assert sum(len(each.places) for each in patch.patches.values()) > 1000
    back = write_and_read(patch, file, tmp_path / "patch.mka")
    for name, each in patch.patches.items():
        for kept, before in zip(back.patches[name], each, strict=True):
            assert np.array_equal(np.asarray(kept), np.asarray(before)), name
    with native, native.context() as context, NativeModel(tmp_path / "other.mkb") as patched:
        base = read(context)
        context.set_adapters([(native.adapter(tmp_path / "patch.mka"), 1.0)])
        found, expected = read(context), read(patched.context())
        assert np.array_equal(found, expected) and not np.array_equal(found, base)
        context.set_adapters([])
        assert np.array_equal(read(context), base)


def patch_names(file: ModelFile) -> set[str]:
    return set(patch_between(file, file).patches)


@pytest.mark.parametrize("kind", ["rational", "bspline", "attention", "plain"])
def test_bits_do_not_depend_on_threads_pieces_or_what_was_used_before(kind: str, tmp_path: Path) -> None:
    _, native, file = open_kind(kind, tmp_path)
    with native:
        adapters = [(native.adapter(encode_adapter(draw_low_ranks(file, seed), file)), 0.5) for seed in (1, 2)]
        adapters.append((native.adapter(encode_adapter(draw_states(file), file)), 1.0))
        one, many = native.context(max_tokens=100), native.context(threads=3, max_tokens=100)
        base = read(one)
        one.set_adapters(adapters)
        many.set_adapters(adapters)
        expected = read(one)
        assert one.position == len(TOKENS) and np.array_equal(read(many), expected)
        many.reset()
        assert np.array_equal(read_each(many, TOKENS)[-1], expected) and not np.array_equal(expected, base)
        for adapter, _ in adapters:
            adapter.close()
        many.reset()
        assert np.array_equal(read(many), expected)
        one.set_adapters([])
        assert np.array_equal(read(one), base)


def test_a_state_belongs_to_its_adapters(tmp_path: Path) -> None:
    _, native, file = open_kind("rational", tmp_path)
    with native, native.context() as context, native.context() as plain:
        adapter = native.adapter(encode_adapter(draw_low_ranks(file), file))
        plain.decode(TOKENS)
        context.set_adapters([(adapter, 1.0)])
        context.decode(TOKENS)
        without, content = plain.state(), context.state()
        with pytest.raises(UserError, match="made with other adapters"):
            plain.set_state(content)
        with pytest.raises(UserError, match="made without the adapters in use"):
            context.set_state(without)
        expected = read(context)
        context.set_adapters([(adapter, 0.5)])
        with pytest.raises(UserError, match="made with other adapters"):
            context.set_state(content)
        context.set_adapters([(adapter, 1.0)])
        context.set_state(content)
        assert np.array_equal(read(context), expected)
        plain.set_state(without)
        # As states were before there were adapters.
        assert without[8] == 1 and not any(without[104:128]) and content[8] == 2


def test_an_adapter_of_another_model_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    _, native, file = open_kind("rational", tmp_path)
    adapter = draw_low_ranks(file)
    content = encode_adapter(adapter, file)
    path = tmp_path / "a.mka"
    stranger = replace(adapter, info=replace(adapter.info, base_sha256="12" * 32))
    with pytest.raises(UserError, match="121212121212…"):
        encode_adapter(stranger, file)
    unknown = file.header | {"codes_sha256": bytes.fromhex("12" * 32)}
    foreign = encode_adapter(stranger, replace(file, header=unknown))
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for change in (b"", content[:100], content[:-1], b"GGUF" + content[4:], bytes(flipped), foreign):
        path.write_bytes(change)
        with pytest.raises(UserError) as raised:
            native.adapter(path)
        assert "\n" not in str(raised.value) and "a.mka" in str(raised.value)
        if change is not foreign:
            with pytest.raises(UserError):
                read_adapter_file(path)
    own = file.header["codes_sha256"].hex()[:8]
    assert "12121212" in str(raised.value) and own in str(raised.value)
    with native, native.context() as context, NativeModel(file.path) as twin:
        used: NativeAdapter = native.adapter(content)
        with pytest.raises(UserError, match="not opened for this model"):
            context.set_adapters([(twin.adapter(content), 1.0)])
        with pytest.raises(UserError, match="weight is no number"):
            context.set_adapters([(used, float("nan"))])
        with pytest.raises(UserError, match="use up to 16"):
            context.set_adapters([(used, 1.0)] * 17)
        flips = native.adapter(encode_adapter(patch_between(file, file), file))
        for wrong in ([(flips, 0.5)], [(flips, 1.0), (flips, 1.0)]):
            with pytest.raises(UserError, match="flips codes"):
                context.set_adapters(wrong)
        context.set_adapters([(flips, 1.0), (used, 1.0)])
        assert used.name == "café" and used.sha256 == content[24:56].hex()


def test_a_model_file_of_an_earlier_version_is_to_be_packed_again(tmp_path: Path) -> None:
    _, native, file = open_kind("rational", tmp_path)
    content = encode_adapter(draw_low_ranks(file), file)
    earlier = bytearray(file.path.read_bytes())
    earlier[272:304] = bytes(32)
    (tmp_path / "earlier.mkb").write_bytes(earlier)
    native.close()
    with NativeModel(tmp_path / "earlier.mkb", verify=False) as native, pytest.raises(UserError, match="pack it again"):
        native.adapter(content)
    with pytest.raises(UserError, match="pack it again"):
        encode_adapter(draw_low_ranks(file), read_model_file(tmp_path / "earlier.mkb", verify=False))


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    _, native, file = open_kind("attention", tmp_path)
    native.close()
    states, factors, patch = draw_states(file), draw_low_ranks(file), patch_between(file, file)
    name, pair = next(iter(factors.low_ranks.items()))
    flips = next(iter(patch.patches.values()))
    for wrong, words in (
        (replace(states, states={1: states.states[0]}), "layer 1"),
        (replace(states, states={9: states.states[0]}), "layer 9"),
        (replace(factors, low_ranks={"blocks.7.mixer.inputs.query.weight": pair}), "blocks.7"),
        (replace(factors, low_ranks={name: pair._replace(a=pair.a[:, :, 1:])}), name),
        (replace(patch, patches={"head.weight": flips}), "head.weight"),
        (replace(patch, patches={name: flips._replace(shape=(1, 2, 3))}), name),
    ):
        with pytest.raises(UserError, match=words):
            encode_adapter(wrong, file)


def run_program(program: Path, folder: Path, *arguments: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    command = [str(program), *arguments]
    return subprocess.run(command, cwd=folder, input=lines, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with base.mkb, style.mka and flips.mka."""
    write_random_model("rational", tmp_path / "base.mkb")
    file = read_model_file(tmp_path / "base.mkb")
    write_adapter_file(draw_low_ranks(file, size=0.5), file, tmp_path / "style.mka")
    write_adapter_file(patch_between(file, file), file, tmp_path / "flips.mka")
    return tmp_path


def test_options_name_adapters_as_they_are_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    model, file = Path("base.mkb"), read_model_file("base.mkb")
    write_adapter(draw_low_ranks(file), Path("poems=1"))
    expected = encode_adapter(read_adapter(Path("poems=1")), file)
    given = ["--adapter", "poems=1", "--tokens", "--adapter=poems=1=0.5", "--adapter", "style.mka=0.5", "--prompt=a=b"]
    converted = convert_adapter_options(model, given)
    name = converted[1]
    assert Path(name).read_bytes() == expected and Path(name).is_relative_to(folder / "cache")
    assert converted == ["--adapter", name, "--tokens", f"--adapter={name}=0.5", *given[4:]]
    single = convert_adapter_options(model, ["--adapter", "poems=1/adapter_model.safetensors=2"])
    assert single == ["--adapter", f"{name}=2"]
    # What is no weight is for the runtime to refuse; it is not a part of the name.
    assert convert_adapter_options(model, ["--adapter", "poems=1=nan"]) == ["--adapter", f"{name}=nan"]
    for wrong in (str(folder), "a" * 5000 + ".safetensors"):
        with pytest.raises(UserError):
            convert_adapter_options(model, ["--adapter", wrong])
    for wrong in ("", "=0.5"):
        with pytest.raises(UserError, match="names no adapter"):
            convert_adapter_options(model, ["--adapter", wrong])


def test_generate_with_adapters(native_program: Path, folder: Path) -> None:
    greedy = ["generate", "base.mkb", "--prompt", "Once", "--tokens", "20", "--temperature", "0"]
    plain = run_program(native_program, folder, *greedy)
    styled = run_program(native_program, folder, *greedy, "--adapter", "style.mka", "--adapter=flips.mka=1")
    weightless = run_program(native_program, folder, *greedy, "--adapter", "style.mka=0")
    assert plain.returncode == styled.returncode == 0 and plain.stdout == weightless.stdout != styled.stdout
    for wrong in ("none.mka", "base.mkb", "flips.mka=0.5"):
        refused = run_program(native_program, folder, *greedy, "--adapter", wrong)
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr


def test_a_chat_is_read_again_under_another_adapter(native_program: Path, folder: Path) -> None:
    greedy = ["chat", "base.mkb", "--temperature", "0", "--tokens", "8"]
    lines = "One\nTwo\n/adapter style.mka\n/adapters\n/save styled.mks\n"
    switched = run_program(native_program, folder, *greedy, lines=lines)
    assert switched.returncode == 0 and "tokens read again" in switched.stderr
    assert switched.stderr.count("café: low-rank factors of rank 3 after 12 steps, weight 1") == 2
    # The state is the one of a chat whose tokens the adapter read from the start.
    with NativeModel(folder / "base.mkb") as model, model.context() as context:
        context.set_adapters([(model.adapter(folder / "style.mka"), 1.0)])
        context.load_state(folder / "styled.mks")
        assert context.position > 20
    # Back again, the turn can be taken back and answered as before.
    lines = "One\nTwo\n/adapter style.mka 0.5\n/adapter off\n/undo\nTwo\n/r\n"
    back = run_program(native_program, folder, *greedy, "--quiet", lines=lines)
    one, two, second, third = back.stdout.split("\n")[:-1]
    assert back.returncode == 0 and two == second == third, (one, back.stdout)
    lines = "/adapter\n/adapter none.mka\n/adapter flips.mka 2\n/adapters\n"
    refused = run_program(native_program, folder, *greedy, "--quiet", lines=lines)
    assert "cannot be opened" in refused.stderr and "flips codes" in refused.stderr
    assert "no adapter is in use" in refused.stderr


def test_a_chat_that_continues_a_state_begins_anew_under_another_adapter(native_program: Path, folder: Path) -> None:
    greedy = ["chat", "base.mkb", "--temperature", "0", "--tokens", "8"]
    assert run_program(native_program, folder, *greedy, "--state-out", "talk.mks", lines="One\n").returncode == 0
    lines = "Two\n/adapter style.mka\nThree\n/adapter off\n"
    done = run_program(native_program, folder, *greedy, "--state-in", "talk.mks", lines=lines)
    assert "the chat begins anew" in done.stderr and done.stderr.count("tokens read again") == 1
    refused = run_program(native_program, folder, *greedy, "--state-in", "talk.mks", "--adapter", "style.mka")
    assert refused.returncode == 1 and "made without the adapters in use" in refused.stderr


def test_the_description_in_a_file_is_checked_too(tmp_path: Path) -> None:
    _, native, file = open_kind("rational", tmp_path)
    native.close()
    info = draw_states(file).info
    cases: list[tuple[dict[str, object], str]] = [
        ({"name": "\ud800"}, "cannot be printed"),
        ({"name": "\x1b[2J"}, "cannot be printed"),
        ({"rank": float("nan")}, "rank is"),
        ({"steps": -1}, "steps is"),
        ({"targets": "mixer"}, "targets is"),
        ({"method": "lora"}, "its header another method"),
        ({"base_sha256": "x"}, "no sha256"),
    ]
    path = tmp_path / "a.mka"
    for change, words in cases:
        write_described(path, {**vars(info), **change})
        with pytest.raises(UserError, match=words):
            read_adapter_file(path)
    for description in ([], "x", None):
        write_described(path, description)
        with pytest.raises(UserError, match="no JSON object"):
            read_adapter_file(path)
    write_described(path, {**vars(info)})
    assert read_adapter_file(path).info == info


def write_described(path: Path, description: object) -> None:
    """Write an adapter of method state without records, with a sha256 that is right."""
    text = json.dumps(description).encode()
    header = np.zeros((), ADAPTER_HEADER_DTYPE)
    header["magic"], header["version"], header["header_bytes"] = np.void(ADAPTER_FILE_MAGIC), 1, 256
    header["file_bytes"], header["method"] = 256 + len(text), ADAPTER_FILE_METHODS.index("state")
    header["records_offset"], header["info_offset"], header["info_bytes"] = 256, 256, len(text)
    header["sha256"] = np.void(hashlib.sha256(header.tobytes() + text).digest())
    path.write_bytes(header.tobytes() + text)
