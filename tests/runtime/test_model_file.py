"""Model files: the trainer's codes and scales, whatever the model, and refusal of what is damaged."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kabrn_dist.config import Config
from kabrn_dist.config.file import dump_config
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.retention import log_decays
from kabrn_dist.ops.weight_quant import TernaryModule
from kabrn_dist.runtime.file_checks import hash_model_file
from kabrn_dist.runtime.file_format import FILE_MAX_COLUMNS, HEADER_DTYPE, RECORD_DTYPE, FileTensor
from kabrn_dist.runtime.file_plan import Packing, plan_model_file
from kabrn_dist.runtime.model_file import ModelFile, read_model_file, write_model_file
from kabrn_dist.runtime.tensor_plan import Storage, plan_tensors
from kabrn_dist.runtime.tiles import decode_base3, encode_base3, pack_tiles, quantize_rows, unpack_tiles
from kabrn_dist.utils.errors import UserError
from tests.support.models import MODEL_KINDS, make_model, make_model_config

BYTES = Tokenizer.of_bytes()


def pack(path: Path, *overrides: str, **options: Any) -> tuple[MixKABRN, Config, ModelFile]:
    config = make_model_config(*overrides)
    model = make_model(config)
    write_model_file(model, config, BYTES, 12, path, **options)
    return model, config, read_model_file(path)


def role_of(name: str) -> tuple[str, int]:
    """The role and layer of a parameter: `blocks.1.mixer.output.out.weight` → mixer.out, 1."""
    if not name.startswith("blocks."):
        return name.removesuffix(".weight"), 0
    _, layer, *parts = name.removesuffix(".weight").split(".")
    if parts[-1] == "router":
        return "router.weight", int(layer)
    if parts[0] == "convolution":
        return "convolution", int(layer)
    leaf = parts[-1].removesuffix("_numerator").removesuffix("_denominator")
    return f"{'mixer' if parts[0] == 'mixer' else parts[1]}.{leaf}", int(layer)


@pytest.mark.parametrize("ternary", ["tiles", "base3"])
@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_codes_scales_and_values_are_those_of_the_model(kind: str, ternary: str, tmp_path: Path) -> None:
    model, config, file = pack(tmp_path / "m.mkb", *MODEL_KINDS[kind], ternary=ternary, embedding_dtype="fp32")
    seen: set[tuple[str, int]] = {("log_decay", 0)}
    for name, parameter in model.named_parameters():
        role, layer = role_of(name)
        seen.add((role, layer))
        stored, expected = file.read(role, layer), parameter.detach().numpy()
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(("_numerator", "_denominator")):
            columns = slice(0, 6) if name.endswith("_numerator") else slice(6, 10)
            assert np.array_equal(stored.values[..., columns], expected), name
        elif config.model.quantize and isinstance(module, TernaryModule) and name.rpartition(".")[2] in module.stds:
            matrices = module.matrices(name.rpartition(".")[2])
            assert matrices.gamma is not None and stored.codes is not None and stored.scales is not None
            codes = matrices.codes(torch.int8)
            assert np.array_equal(stored.codes, codes.numpy()), name
            assert np.array_equal(stored.values, (codes * matrices.gamma).numpy()), name
            rows, group = stored.record.rows, config.model.scale_group_size
            assert stored.record.scales == (1 if group is None else -(-rows // group))
        else:
            assert stored.codes is None and np.array_equal(stored.values.reshape(expected.shape), expected), name
    for row, layer in enumerate(config.model.moe_layers):
        seen.add(("router.bias", layer))
        assert np.array_equal(file.read("router.bias", layer).values.reshape(-1), model.routers.bias[row].numpy())
    decays = log_decays(config.model.retention.decay, config.model.retention.num_heads)
    assert np.array_equal(file.read("log_decay").values[0, 0], np.array(decays, np.float32))
    assert len(file.records) == len(seen)


def test_the_header_says_what_the_configuration_says(tmp_path: Path) -> None:
    _, config, file = pack(tmp_path / "m.mkb", *MODEL_KINDS["dense layers"], template="{{ messages }} é")
    content = (tmp_path / "m.mkb").read_bytes()
    fields = struct.unpack_from("<8sIIQ32s32sQ27I", content)
    assert fields[:4] == (b"\x89MKB\r\n\x1a\n", 1, 512, len(content)) and fields[5].hex() == BYTES.sha256
    # From `step` to `scale_group_size`, as the page lists them.
    expected = [12, 300, 257, 256, 40, 3, 2, 10, 12, 0, 0, 4, 1, 2, 20, 60, 0, 1, 1, 0, 4, 0, 0, 1, 0]
    assert list(fields[6 : 6 + len(expected)]) == expected
    assert (file.layers, file.mixtures) == ("RRA", (False, False, True))
    assert file.config == dump_config(config) and file.template == "{{ messages }} é"
    assert struct.unpack_from("<II", file.tokenizer) == (0, 0)
    assert HEADER_DTYPE.fields is not None
    assert {name: HEADER_DTYPE.fields[name][1] for name in ("layers_offset", "config_offset", "template_bytes")} == {
        "layers_offset": 208,
        "config_offset": 224,
        "template_bytes": 264,
    }


def test_the_experts_of_a_layer_lie_one_after_another(tmp_path: Path) -> None:
    file = pack(tmp_path / "m.mkb", *MODEL_KINDS["rational"])[2]
    parts = [record for record in file.records if 48 <= record.role < 64 and record.layer == 1]
    assert len(parts) == 4 and len({record.stride for record in parts}) == 1
    first, last = min(r.offset for r in parts), max(r.offset + r.bytes for r in parts)
    assert last - first <= parts[0].stride
    assert all(record.offset % 64 == 0 for record in file.records)
    spans = sorted(
        (record.offset + number * record.stride, record.bytes)
        for record in file.records
        for number in range(record.matrices)
    )
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("dtype", ["int8", "fp16", "fp32"])
def test_embedding_and_head_round_as_they_say(dtype: str, tmp_path: Path) -> None:
    model, _, file = pack(tmp_path / "m.mkb", embedding_dtype=dtype)
    for role, weight in (("embedding", model.embedding.weight), ("head", model.head.weight)):
        stored, exact = file.read(role), weight.detach().numpy()
        rounded = exact.astype(np.float16) if dtype == "fp16" else exact
        bound = np.abs(exact).max(1, keepdims=True) / 253 if dtype == "int8" else 0
        assert (np.abs(stored.values[0] - rounded) <= bound).all()
        if dtype == "int8":
            assert stored.codes is not None and stored.scales is not None
            assert np.array_equal(np.abs(stored.codes[0]).max(1), np.full(300, 127))
            assert np.array_equal(stored.scales[0], np.abs(exact).max(1) / np.float32(127))


def test_plain_matrices_may_be_fp16(tmp_path: Path) -> None:
    model, _, file = pack(tmp_path / "m.mkb", *MODEL_KINDS["plain"], matrix_dtype="fp16")
    query = model.get_parameter("blocks.1.mixer.inputs.query.weight").detach()
    assert np.array_equal(file.read("mixer.query", 1).values[0], query.half().float().numpy())
    assert file.header["quantized"] == 0 and file.read("routed.inner").record.dtype == 0
    with torch.no_grad():
        model.get_parameter("head.weight")[3, 3] = 1e5
    with pytest.raises(UserError, match=r"head\.weight: 100000 is beyond fp16; store it as fp32"):
        write_model_file(model, make_model_config(*MODEL_KINDS["plain"]), BYTES, 1, tmp_path / "n", "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["m.mkb"]


def test_a_model_between_plain_and_ternary_is_refused(tmp_path: Path) -> None:
    config = make_model_config("model.quantize_start_step=4", "model.quantize_warmup_steps=3")
    model = make_model(config)
    model.set_quantization(config.model.quantization_lambda(5))
    with pytest.raises(UserError, match=r"step 5 is in the warm-up .* \(λ is 0\.5\).* train on to step 7"):
        write_model_file(model, config, BYTES, 5, tmp_path / "m.mkb")
    assert not list(tmp_path.iterdir())
    model.set_quantization(config.model.quantization_lambda(2))
    write_model_file(model, config, BYTES, 2, tmp_path / "m.mkb")
    file = read_model_file(tmp_path / "m.mkb")
    assert file.header["quantized"] == file.header["scale_group_size"] == 0
    assert np.array_equal(file.read("routed.up").values, model.get_parameter("blocks.0.mixture.routed.up").detach())


def test_the_same_model_gives_the_same_bytes_and_writes_alone(tmp_path: Path) -> None:
    pack(tmp_path / "a.mkb")
    pack(tmp_path / "b.mkb")
    assert (tmp_path / "a.mkb").read_bytes() == (tmp_path / "b.mkb").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mkb", "b.mkb"]


def test_sizes_beyond_the_format_are_refused(tmp_path: Path) -> None:
    config = make_model_config("model.experts.type=hat", f"model.hidden_size={FILE_MAX_COLUMNS // 4}")
    with pytest.raises(UserError, match=r"inner_spline: a matrix of 20 × 393216 is beyond .* 262,144 columns"):
        plan_tensors(config.model, Storage(2, 3), 0)
    with pytest.raises(UserError, match="top_k is 1025, and a model file holds 0 to 1024"):
        plan_model_file(
            make_model_config("model.experts.num_experts=1025", "model.experts.top_k=1025"), BYTES, 1, 1, Packing()
        )


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 16), (17, 33), (40, 64)])
def test_tiles_and_base3_give_the_codes_back(shape: tuple[int, int]) -> None:
    codes = np.random.default_rng(0).integers(-1, 2, shape).astype(np.int8)
    tiles, dense = pack_tiles(codes), encode_base3(codes)
    assert len(tiles) == -(-shape[0] // 16) * -(-shape[1] // 16) * 64 and len(dense) == -(-codes.size // 5)
    assert np.array_equal(unpack_tiles(tiles, *shape), codes)
    assert np.array_equal(decode_base3(dense, *shape), codes)


def test_a_tile_lies_as_documented() -> None:
    codes = np.random.default_rng(1).integers(-1, 2, (32, 32)).astype(np.int8)
    packed = pack_tiles(codes)
    for tile, (row, column) in enumerate([(0, 0), (0, 16), (16, 0), (16, 16)]):
        for r, j, field in itertools.product(range(16), range(4), range(4)):
            stored = packed[64 * tile + 4 * r + j] >> 2 * field & 3
            assert stored == codes[row + r, column + 4 * field + j] + 1


def test_rows_of_zeros_and_of_tiny_numbers_stay_finite() -> None:
    values = np.array([[0, 0], [1e-45, 0], [3e38, -3e38], [-0.5, 0.25]], np.float32)
    codes, scales = quantize_rows(values)
    assert np.isfinite(scales).all() and codes.tolist() == [[0, 0], [0, 0], [127, -127], [-127, 64]]


def reseal_file(content: bytearray) -> bytearray:
    content[24:56] = hash_model_file(content)
    return content


def change_record(content: bytearray, number: int, **fields: int) -> None:
    place = int.from_bytes(content[216:224], "little") + 64 * number
    record = np.frombuffer(bytes(content[place : place + 64]), RECORD_DTYPE).copy()
    for name, value in fields.items():
        record[name] = value
    content[place : place + 64] = record.tobytes()


def set_u64(content: bytearray, offset: int, value: int) -> None:
    content[offset : offset + 8] = value.to_bytes(8, "little")


DAMAGES: dict[str, tuple[Any, str]] = {
    "empty": (lambda c: c.clear(), "it is empty"),
    "foreign": (lambda c: c.__setitem__(slice(0, 4), b"GGUF"), "it does not begin as one"),
    "cut in its header": (lambda c: c.__delitem__(slice(100, None)), "it ends after 100 bytes"),
    "cut": (lambda c: c.__delitem__(slice(-1, None)), r"its header says \d+"),
    "newer": (lambda c: c.__setitem__(8, 2), "version 2 is of a newer MixKABRN"),
    "flipped": (lambda c: c.__setitem__(-100, c[-100] ^ 1), "damaged or edited, its sha256"),
    "layers outside": (lambda c: set_u64(c, 208, 2**63), "its part layers ends at byte"),
    "tensors outside": (lambda c: set_u64(c, 216, len(c) - 10), "its part tensors ends at byte"),
    "config outside": (lambda c: set_u64(c, 232, 2**64 - 1), "its part config ends at byte"),
    "no layers": (lambda c: c.__setitem__(slice(112, 116), bytes(4)), "num_layers is 0, not within 1 and 10000"),
    "type": (lambda c: c.__setitem__(132, 9), "expert_type is 9, not within 0 and 5"),
    "config": (lambda c: c.__setitem__(int.from_bytes(c[224:232], "little"), 255), "part config is not UTF-8"),
    "role": (lambda c: change_record(c, 3, role=9), "has role 9 and dtype 3, which mean nothing"),
    "absurd": (lambda c: change_record(c, 3, rows=2**32 - 1), "matrices of 4294967295"),
    "bytes": (lambda c: change_record(c, 3, bytes=2**40), "bytes a matrix, which its shape does not give"),
    "outside": (lambda c: change_record(c, 3, offset=2**62), "ends outside the file"),
    "scales": (lambda c: change_record(c, 3, scales=0), "has 0 scales"),
    "scales outside": (lambda c: change_record(c, 3, scales_offset=2**62), "ends outside the file"),
    "unaligned": (lambda c: change_record(c, 3, offset=577), "multiple of 64"),
    "stride": (lambda c: change_record(c, 3, count=9, stride=0), "has matrices that overlap"),
    "twice": (lambda c: change_record(c, 1, role=0), "tensor embedding of layer 0 is there twice"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "m.mkb"
    pack(path)
    content, (change, words) = bytearray(path.read_bytes()), DAMAGES[damage]
    change(content)
    if damage not in ("empty", "cut", "cut in its header", "flipped"):
        reseal_file(content)
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        read_model_file(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)
    assert "; " in str(raised.value)


def test_codes_that_are_none_are_refused_when_they_are_read(tmp_path: Path) -> None:
    for ternary, words in (("tiles", "a code that is none"), ("base3", "a byte above 242")):
        file = pack(tmp_path / ternary, ternary=ternary)[2]
        record = file.find("mixer.query", 1)
        assert isinstance(record, FileTensor)
        content = bytearray((tmp_path / ternary).read_bytes())
        content[record.offset] = 255
        (tmp_path / ternary).write_bytes(reseal_file(content))
        with pytest.raises(UserError, match=words):
            read_model_file(tmp_path / ternary).read("mixer.query", 1)
    with pytest.raises(UserError, match=r"has no tensor shared\.gate in layer 0"):
        file.read("shared.gate")


@pytest.mark.slow
def test_random_changes_are_refused_or_harmless(tmp_path: Path) -> None:
    """Whatever sizes and offsets say, with a hash that fits: a file is read, or refused with one line."""
    path = tmp_path / "m.mkb"
    file = pack(path)[2]
    original, random = path.read_bytes(), np.random.default_rng(0)
    front = file.header["tensors_offset"] + 64 * len(file.records)
    for _ in range(2_000):
        content = bytearray(original)
        for place in random.integers(0, front, random.integers(1, 4)):
            content[place] = random.choice([0, 1, 255, int(random.integers(256))])
        path.write_bytes(reseal_file(content) if random.random() < 0.9 else content)
        try:
            opened = read_model_file(path)
            for record in opened.records[:6]:
                opened.read("embedding" if record.role == 0 else "head")
        except UserError as error:
            assert "\n" not in str(error)
