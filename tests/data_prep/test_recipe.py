"""Recipes with values that nobody means: one line that names the key, or a preparation that ends well."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from data_prep.__main__ import main
from data_prep.clean.config import CleaningConfig
from data_prep.clean.pipeline import Cleaner
from data_prep.clean.removed import RemovedDocument
from data_prep.documents import Document
from data_prep.recipe import Recipe, SourceRecipe, TokenizerRecipe, parse_recipe
from data_prep.sources.build import SOURCE_CLASSES, build_source
from kabrn_dist.data.shard_set import open_shard_folder
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.yaml_section import section_type

ODD: tuple[Any, ...] = (1e308, 1e-320, -1e308, 2**70, -1, 0, float("inf"), float("nan"), True, None, "x", [], {}, [[]])
TEXT = "The words of this text are there to be read, and they have some length. " * 9


def base(folder: Path) -> dict[str, Any]:
    sources = [{"name": "a", "kind": "text", "input": str(folder / "in")}]
    clean = {"quality": "off", "repetition": "off"}
    return {"out": str(folder / "set"), "tokenizer": {"bytes": True}, "clean": clean, "sources": sources}


def fields_of(section: type[BaseModel], *above: str) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        inner = section_type(field.annotation)
        if inner is None or inner is SourceRecipe:
            yield (*above, name)
        else:
            yield from fields_of(inner, *above, name)


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    section = tree
    for name in path[:-1]:
        section = section.setdefault(name, {})
    section[path[-1]] = value
    return tree


def assert_one_line(error: UserError) -> None:
    assert "\n" not in str(error) and 10 < len(str(error)) < 1500, str(error)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(8):
        (tmp_path / "in" / f"{number}.txt").write_text(f"{TEXT} {number}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_field_of_a_recipe_takes_or_refuses_odd_values(folder: Path) -> None:
    tree = base(folder)
    taken = []
    for path in fields_of(Recipe):
        for value in ODD:
            try:
                taken.append((path, value, parse_recipe(put(tree, path, value), "recipe")))
            except UserError as error:
                assert_one_line(error)
    for name in SourceRecipe.model_fields:
        for value in ODD:
            source = tree["sources"][0] | {name: value}
            try:
                taken.append((("source", name), value, parse_recipe(tree | {"sources": [source]}, "recipe")))
            except UserError as error:
                assert_one_line(error)
    document = Document("a", TEXT)
    for path, value, recipe in taken:
        config = recipe.cleaning_config(recipe.sources[0])
        if path[0] == "clean":
            assert Cleaner(config)(document) is not None, (path, value)
        # JSON has no other numbers: the index holds these settings.
        json.dumps(config.model_dump(mode="json"), allow_nan=False)
    assert len(taken) > 30


def test_every_option_of_a_source_takes_or_refuses_odd_values(folder: Path) -> None:
    for kind, source in SOURCE_CLASSES.items():
        inputs = [] if kind == "python-stdlib" else [folder / "in"]
        for name in source.options_class.model_fields:
            for value in ODD:
                try:
                    build_source(kind, inputs, {name: value})
                except UserError as error:
                    assert_one_line(error)


@pytest.mark.slow
def test_odd_numbers_that_are_taken_make_a_whole_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = base(folder)["sources"][0]
    values: list[dict[str, Any]] = [{"shard_mb": value} for value in (1e-3, 1e6)]
    values += [{"validation_share": value} for value in (1e-320, 0.999999, 0)]
    values += [{"sources": [source | {"weight": 1e9, "epochs": 1e6}]}, {"sources": [source | {"weight": 1e-9}]}]
    limits = {"max_words": 10**15, "min_mean_word_length": 0, "max_mean_word_length": 1e300, "min_words": 0}
    values.append({"clean": {"quality_limits": limits, "repetition": "off", "near": False}})
    finished = 0
    for number, value in enumerate(values):
        (folder / "r.yaml").write_text(yaml.safe_dump(base(folder) | {"out": str(folder / f"set{number}")} | value))
        code = main(["--recipe", str(folder / "r.yaml")])
        error = capsys.readouterr().err
        assert code == 0 or error.startswith("error: "), error
        if code == 0:
            finished += 1
            assert open_shard_folder(folder / f"set{number}").index.documents("train") > 0
    assert finished >= 6


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--vocabulary", value) for value in ("99999999999", "-5", str(2**70))),
        *(("--shard-mb", value) for value in ("inf", "nan", "-1", "1e-320", "1e308")),
        *(("--validation-share", value) for value in ("nan", "-1", "1", "1e308")),
        *(("--workers", value) for value in ("0", "-3", "100000", str(2**70))),
    ],
)
def test_odd_flags_are_refused_in_one_line(
    flag: str, value: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--source", "text", "--input", "in", "--out", "set", f"{flag}={value}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert flag.lstrip("-").replace("-", "_") in error.replace("-", "_")
    assert not (folder / "set").exists()


def test_a_source_of_weight_zero_is_refused_before_any_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = base(folder)
    more = tree["sources"][0] | {"name": "extra", "weight": 0}
    (folder / "r.yaml").write_text(yaml.safe_dump(tree | {"sources": [*tree["sources"], more]}))
    assert main(["--recipe", "r.yaml"]) == 2
    assert "sources.1.weight: must be greater than 0" in capsys.readouterr().err
    assert not (folder / "set").exists()


@pytest.mark.slow
@pytest.mark.parametrize("depth", [60, 2_000])
def test_deep_nesting_is_refused_in_one_line(depth: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for opening, closing in ("[]", ("{a: ", "}")):
        text = yaml.safe_dump(base(folder)) + f"extra: {opening * depth}{closing * depth}\n"
        (folder / "r.yaml").write_text(text)
        assert main(["--recipe", "r.yaml"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: r.yaml") and error.count("\n") == 1 and len(error) < 2000


def test_unknown_keys_are_answered_with_the_near_one(folder: Path) -> None:
    tree = base(folder)
    for wrong, right, value in (
        (("validaton_share",), "validation_share", 0.1),
        (("tokenizer", "trian"), "train", 300),
        (("clean", "qualty"), "quality", "off"),
        (("clean", "quality_limits", "min_word"), "min_words", 3),
    ):
        with pytest.raises(UserError, match=f"did you mean '{'.'.join((*wrong[:-1], right))}'"):
            parse_recipe(put(tree, wrong, value), "recipe")
    with pytest.raises(UserError, match=r"did you mean 'sources\.0\.weight'"):
        parse_recipe(tree | {"sources": [tree["sources"][0] | {"wieght": 2}]}, "recipe")
    with pytest.raises(UserError, match=r"clean of source 'a'.*did you mean 'language'"):
        parse_recipe(tree | {"sources": [tree["sources"][0] | {"clean": {"langauge": ["en"]}}]}, "recipe")


def test_the_names_of_sections_are_all_covered() -> None:
    assert {path[0] for path in fields_of(Recipe)} == set(Recipe.model_fields)
    assert ("tokenizer", "train") in set(fields_of(Recipe)) and TokenizerRecipe.model_fields
    assert isinstance(Cleaner(CleaningConfig())(Document("a", "short")), RemovedDocument)
