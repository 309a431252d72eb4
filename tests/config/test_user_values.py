"""Values are read as people write them, or refused in one line: nothing is dropped or converted in silence."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.recipe import load_recipe
from kabrn_dist.config.file import load_config
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.strict_yaml import MAX_BYTES, MAX_DEPTH
from tests.config.test_config import BASE

RECIPE = """
out: data/x
tokenizer: {bytes: true}
sources:
  - {name: base, kind: text, input: in}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def refusal(load: Callable[..., Any], path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and "Traceback" not in message
    return message


def file_refusal(load: Callable[..., Any], tmp_path: Path, text: str) -> str:
    (tmp_path / "odd.yaml").write_text(text)
    message = refusal(load, tmp_path / "odd.yaml")
    assert message.startswith(f"{tmp_path}/odd.yaml: ")
    return message


BOTH = pytest.mark.parametrize(("load", "text"), [(load_config, BASE), (load_recipe, RECIPE)], ids=["config", "recipe"])


@BOTH
def test_a_key_given_twice_is_refused_with_both_lines(load: Callable[..., Any], text: str, tmp_path: Path) -> None:
    again = text + "run: {folder: runs/y}\nrun: {folder: runs/z}\n"
    first = len(text.splitlines()) + 1 if load is load_recipe else 2
    message = file_refusal(load, tmp_path, again)
    assert "the key 'run' is given twice, in lines " in message and f"lines {first} and " in message
    inner = text.replace("bytes: true", "bytes: true, bytes: false").replace("layers: 1\n", "layers: 1\n  layers: 2\n")
    assert "is given twice, in lines" in file_refusal(load, tmp_path, inner)


SCALARS = ("!!bool maybe", "!!timestamp foo", "!!float x", "!!int abc", "!!int ''", "!!binary é", "!!set 3", "!!omap 3")


@BOTH
@pytest.mark.parametrize("scalar", SCALARS)
def test_a_value_that_does_not_fit_its_tag_is_named(
    scalar: str, load: Callable[..., Any], text: str, tmp_path: Path
) -> None:
    message = file_refusal(load, tmp_path, f"{text}odd: {scalar}\n")
    assert f"line {len(text.splitlines()) + 1}" in message or scalar.startswith(("!!set", "!!omap", "!!binary"))


@pytest.mark.parametrize("value", ["2026-13-45", "0b_", "0x_", "9" * 5000, "1:30:00", "0o17", "+-3", "12e"])
def test_what_is_no_number_is_shown_as_it_was_written(value: str, base: Path) -> None:
    message = refusal(load_config, base, f"run.seed={value}")
    assert "run.seed: " in message and (value in message or value[:5] in message)
    base.write_text(BASE.replace("runs/x}", f"runs/x, seed: {value}}}"))
    message = refusal(load_config, base)
    assert "run.seed: " in message and (value in message or value[:5] in message)


@BOTH
def test_nesting_aliases_and_sizes_have_limits(load: Callable[..., Any], text: str, tmp_path: Path) -> None:
    for depth in (MAX_DEPTH, 500, 2000, 50_000):
        for nested in ("[" * depth + "]" * depth, "{a: " * depth + "1" + "}" * depth):
            assert "nested too deeply" in file_refusal(load, tmp_path, f"{text}odd: {nested}\n")
    laughs = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 1}]\n" for n in range(30))
    tracemalloc.start()
    assert "aliases counted each time" in file_refusal(load, tmp_path, laughs)
    assert "contains it" in file_refusal(load, tmp_path, f"{text}odd: &a [1, *a]\n")
    assert f"above the {MAX_BYTES} allowed" in file_refusal(load, tmp_path, text + "#" * MAX_BYTES)
    assert tracemalloc.get_traced_memory()[1] < 10 * MAX_BYTES
    tracemalloc.stop()


@BOTH
def test_a_file_that_is_none_is_not_waited_for(load: Callable[..., Any], text: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "not a regular file" in refusal(load, tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    assert "not a regular file" in refusal(load, tmp_path / "zero.yaml")
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    assert load(Path(f"/dev/fd/{reading}")), "what a shell passes as <(command)"
    os.close(reading)


def test_off_and_no_are_words_and_switches(base: Path, recipe: Path) -> None:
    assert load_config(base, ["guard.spike=off"]).guard.spike == "off"
    base.write_text(BASE + "guard: {spike: off}\nparallel: {shard_ternary: off}\ncheckpoint: {async_save: no}\n")
    config = load_config(base)
    assert (config.guard.spike, config.parallel.shard_ternary, config.checkpoint.async_save) == ("off", False, False)
    recipe.write_text(RECIPE + "clean: {quality: off, repetition: off, near: no, language: [no]}\n")
    cleaning = load_recipe(recipe).clean
    assert (cleaning.quality, cleaning.repetition, cleaning.near) == ("off", "off", False)
    assert tuple(cleaning.language or ()) == ("no",)


@pytest.mark.parametrize(
    "words", ["precious #2", "2026-11-28", "0123", "a: b", "null", "[a]", "*x", "!y", "1e3", "true", "a\tb", "- a", "%"]
)
def test_texts_and_paths_are_taken_as_they_are_written(words: str, base: Path, recipe: Path) -> None:
    config = load_config(base, [f"run.folder={words}", f"data.path={words}"])
    assert (str(config.run.folder), config.data.path) == (words, words)
    assert str(load_recipe(recipe, [f"out={words}"]).out) == words
    base.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(base) == config, "what is written is read again as it was"


def test_quotes_and_null_keep_their_meaning(base: Path) -> None:
    assert str(load_config(base, ["run.folder='runs/größe: x'"]).run.folder) == "runs/größe: x"
    assert load_config(base, ["run.init_from=runs/a #1"]).run.init_from == Path("runs/a #1")
    assert load_config(base, ["run.init_from=runs/a", "run.init_from=null"]).run.init_from is None
    assert load_config(base, ["model.layers=3"]).model.layers == "RRR"


def test_a_value_that_yaml_would_shorten_is_refused(base: Path) -> None:
    assert "# begins a comment" in refusal(load_config, base, "parallel.experts_per_rank=[3, 5] #2")
    assert "# begins a comment" in refusal(load_config, base, "training.steps=#5")


def test_a_source_with_a_dot_has_its_weight(base: Path, recipe: Path) -> None:
    data = load_config(base, ["data.weights.math.2=0.5", "data.weights.a.b.c=1", "data.epochs.math.2=3"]).data
    assert data.weights == {"math.2": 0.5, "a.b.c": 1.0} and data.epochs == {"math.2": 3.0}
    assert load_recipe(recipe, ["sources.base.options.a.b=3"]).sources[0].options == {"a.b": 3}
    assert load_recipe(recipe, ["sources.base.clean.near=false"]).sources[0].clean == {"near": False}


def test_a_home_folder_is_found(base: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    keys = ("run.folder", "run.init_from", "data.path", "data.cache_dir")
    config = load_config(base, [f"{key}=~/x" for key in keys])
    found = {str(config.run.folder), str(config.run.init_from), config.data.path, str(config.data.cache_dir)}
    assert found == {"/home/of/mine/x"}
    config = load_config(base, ["data.extra_sets=[{path: ~/x}]"])
    assert config.data.extra_sets[0].path == "/home/of/mine/x"
    recipe.write_text(RECIPE.replace("input: in", "input: [~/a, b]").replace("out: data/x", "out: ~/x\nroot: '~'"))
    loaded = load_recipe(recipe)
    assert (str(loaded.out), str(loaded.root)) == ("/home/of/mine/x", "/home/of/mine")
    assert loaded.sources[0].input == (Path("/home/of/mine/a"), Path("b"))
    assert "there is no user 'nobody-of-this-name'" in refusal(load_config, base, "run.folder=~nobody-of-this-name/x")
    assert load_config(base, ["run.folder=./~x"]).run.folder == Path.cwd() / "~x"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.folder=", "run.folder: the path is empty"),
        ("run.folder=''", "run.folder: the path is empty"),
        ("data.path= ", "data.path: the path is empty"),
        ("data.path=ftp://x/y", "data.path: ftp:// cannot be read; give the path of a folder, or a URL with s3://"),
        ("data.path=file:///x", "data.path: file:// cannot be read"),
        ("data.extra_sets=[{path: 'sftp://x'}]", "sftp:// cannot be read"),
        ("run.folder=s3://x/y", "run.folder: s3:// is a URL, and this must be a path on this machine"),
        ("run.init_from=http://x", "run.init_from: http:// is a URL"),
        ('data.path="a\\0b"', "holds a character that no text or path may have"),
        ('run.folder="\\ud800"', "holds a character that no text or path may have"),
    ],
)
def test_paths_that_cannot_be_are_refused(override: str, said: str, base: Path) -> None:
    assert said in refusal(load_config, base, override)


@pytest.mark.parametrize("text", ['"a\\0b"', '["a\\0b"]', '{"a\\0b": 1}'])
def test_no_text_of_a_file_holds_a_nul(text: str, tmp_path: Path) -> None:
    for load, base in ((load_config, BASE), (load_recipe, RECIPE)):
        assert "holds a character that no text" in file_refusal(load, tmp_path, f"{base}odd: {text}\n")
