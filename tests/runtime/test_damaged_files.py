"""Damaged and foreign model files and states are refused in one line, whatever their bytes say."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from kabrn_dist.runtime.native import NativeModel
from kabrn_dist.utils.errors import UserError
from tests.support.native_models import write_random_model

SMALL = {
    "vocab_size": 257,
    "hidden_size": 8,
    "retention": {"num_heads": 1, "key_dim": 4, "value_dim": 4},
    "experts": {"expert_hidden_size": 8},
}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("model") / "model.mkb"
    write_random_model("rational", path, **SMALL)
    return path.read_bytes()


def refusal(path: Path, content: bytes, verify: bool = False) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        NativeModel(path, verify=verify)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 256
    return message


def open_and_read(path: Path, content: bytes) -> None:
    """Use a file that may be damaged; refusing it is as good as reading it."""
    path.write_bytes(content)
    try:
        with NativeModel(path, verify=False) as model, model.context(max_tokens=8) as context:
            context.decode([1, 2, 3])
    except UserError as error:
        assert "\n" not in str(error)


def test_a_file_that_is_cut_off_anywhere_is_refused(content: bytes, tmp_path: Path) -> None:
    for size in [*range(0, 600, 37), len(content) // 2, len(content) - 1]:
        refusal(tmp_path / "cut.mkb", content[:size])


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (0, b"GGUF", "not a model file"),
        (8, b"\x02\0\0\0", "version"),
        (16, b"\xff" * 8, "its header says"),
        (108, b"\xff" * 4, "hidden_size"),
        (112, b"\xff" * 4, "num_layers"),
        (120, b"\x03\0\0\0", "key_dim"),
        (216, b"\xff" * 8, "table of tensors"),
        (216, b"\x41\0\0\0\0\0\0\0", "table of tensors"),
        (240, b"\xc0\xff\xff\xff\xff\xff\xff\xff", "tokenizer"),
    ],
)
def test_a_value_without_a_meaning_is_named(
    offset: int, value: bytes, words: str, content: bytes, tmp_path: Path
) -> None:
    changed = content[:offset] + value + content[offset + len(value) :]
    assert words in refusal(tmp_path / "changed.mkb", changed)


def test_a_flipped_bit_is_found_by_the_hash(content: bytes, tmp_path: Path) -> None:
    flipped = bytearray(content)
    flipped[-3] ^= 4
    assert "sha256" in refusal(tmp_path / "flipped.mkb", bytes(flipped), verify=True)


def test_other_things_than_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.mkb"):
        with pytest.raises(UserError, match=r"is not a file|cannot be opened"):
            NativeModel(path)


def test_no_bytes_make_the_runtime_crash(content: bytes, tmp_path: Path) -> None:
    chance = random.Random(1)
    for _ in range(1500):
        changed = bytearray(content)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(8, 2600) & ~3
            value = chance.choice([0, 1, 2, 255, 2**16, 2**31, 2**32 - 1, chance.getrandbits(32)])
            changed[at : at + 4] = value.to_bytes(4, "little")
        open_and_read(tmp_path / "random.mkb", bytes(changed))


def test_damaged_states_are_refused_and_change_nothing(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.mkb"
    path.write_bytes(content)
    with NativeModel(path) as model, model.context() as context:
        context.decode([1, 2, 3])
        state = context.state()
        for damaged in (
            b"",
            state[:100],
            state[:-1],
            state + b"\0",
            b"x" + state[1:],
            state[:-9] + b"\x7f" + state[-8:],
        ):
            with pytest.raises(UserError):
                context.set_state(damaged)
        assert context.state() == state


def test_a_state_is_saved_over_nothing_but_states(content: bytes, tmp_path: Path) -> None:
    path, state, link = tmp_path / "model.mkb", tmp_path / "s.mks", tmp_path / "link"
    path.write_bytes(content)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("words")
    with NativeModel(path) as model, model.context() as context:
        context.decode([1, 2, 3])
        for other in (path, tmp_path / "text", tmp_path / "fifo", tmp_path):
            with pytest.raises(UserError, match=r"not a saved state|not a file"):
                context.save_state(other)
        with pytest.raises(UserError, match="not a file"):
            context.load_state(tmp_path / "fifo")
        with pytest.raises(UserError, match="not a file"):
            NativeModel(tmp_path / "fifo")
        assert path.read_bytes() == content and (tmp_path / "text").read_text() == "words"
        context.save_state(state)
        assert state.stat().st_mode & 0o777 == 0o600
        state.chmod(0o640)
        link.symlink_to(state)
        context.decode([4])
        context.save_state(link)
        assert link.is_symlink() and state.stat().st_mode & 0o777 == 0o640
        assert state.read_bytes() == context.state()
        assert not list(tmp_path.glob("*.part"))


def test_a_model_file_that_changes_is_noticed(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.mkb"
    path.write_bytes(content)
    with NativeModel(path) as model:
        assert not model.changed
        os.truncate(path, len(content) - 1)
        assert model.changed
