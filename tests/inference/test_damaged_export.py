"""An export that was damaged or edited on its way is refused, whatever was done to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kabrn_dist.inference.export import plan_export, write_export
from kabrn_dist.inference.load import WEIGHTS_INDEX_NAME, WEIGHTS_NAME, load_export
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safetensors_header import read_metadata
from tests.inference.test_export import logits, trained  # noqa: F401


@pytest.fixture
def export(trained: Path, tmp_path: Path) -> Path:  # noqa: F811
    write_export(plan_export(trained), tmp_path / "out")
    return tmp_path / "out"


def refused(export: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_export(export)
    return str(caught.value)


@pytest.mark.parametrize("place", [-1, -50_000])
def test_one_flipped_bit_is_found(place: int, export: Path) -> None:
    load_export(export)
    weights = export / WEIGHTS_NAME
    content = bytearray(weights.read_bytes())
    content[place] ^= 1
    weights.write_bytes(content)
    assert "damaged or edited, the sha256 of its tensors" in refused(export)


@pytest.mark.parametrize("convert", [Tensor.bool, Tensor.char, Tensor.long])
def test_tensors_of_whole_numbers_are_no_weights(convert: Callable[[Tensor], Tensor], export: Path) -> None:
    tensors = {name: convert(values) for name, values in load_file(export / WEIGHTS_NAME).items()}
    # Also without a hash, as a stranger or an earlier version would write it.
    save_file(tensors, export / WEIGHTS_NAME, {"format": "pt"})
    assert "no weights" in refused(export)


def test_a_folder_without_tensors_is_named(export: Path) -> None:
    (export / WEIGHTS_NAME).unlink()
    (export / WEIGHTS_INDEX_NAME).write_text(json.dumps({"weight_map": {}}))
    assert "hold no tensor" in refused(export)


def test_an_export_in_several_files_has_a_hash_in_each(trained: Path, tmp_path: Path) -> None:  # noqa: F811
    write_export(plan_export(trained, file_bytes=30_000), tmp_path / "parts")
    write_export(plan_export(trained), tmp_path / "whole")
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2 and len({read_metadata(file)["data_sha256"] for file in files}) == len(files)
    assert torch.equal(logits(load_export(tmp_path / "parts")[0]), logits(load_export(tmp_path / "whole")[0]))
    content = bytearray(files[1].read_bytes())
    content[-2] ^= 64
    files[1].write_bytes(content)
    assert files[1].name in refused(tmp_path / "parts")
