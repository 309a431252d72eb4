"""The configuration: mistakes are named with a remedy that works, and what is loaded is what was written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from data_prep.recipe import load_recipe
from data_prep.sources.build import build_source
from kabrn_dist.config import Config
from kabrn_dist.config.file import dump_config, load_config
from kabrn_dist.distributed.expert_placement import plan_expert_counts
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.yaml_section import ConfigSection

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
# Recipes of data_prep lie beside the trainings that read what they make.
RECIPES = [path for path in CONFIGS if path.name.startswith("data_")]
TRAININGS = [path for path in CONFIGS if path not in RECIPES]

BASE = """
run: {folder: runs/x}
data: {path: data/x, sequence_length: 32}
model:
  vocab_size: 64
  hidden_size: 16
  layers: 1
  retention: {num_heads: 2, key_dim: 4, value_dim: 8}
  experts: {num_experts: 8, top_k: 2, expert_hidden_size: 8}
optimizer: {learning_rate: 1.0e-3}
training: {steps: 10, global_batch_size: 24, micro_batch_size: 2}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("modle.width=3", "unknown key 'modle'; did you mean 'model'?"),
        (
            "model.retention.num_head=3",
            "unknown key 'model.retention.num_head'; did you mean 'model.retention.num_heads'?",
        ),
        ("training.stepps=3", "unknown key 'training.stepps'; did you mean 'training.steps'?"),
        ("parallel.experts=2", "unknown key 'parallel.experts'; did you mean"),
        ("lr=10", "unknown key 'lr'; did you mean 'optimizer.learning_rate'?"),
        ("topk=2", "unknown key 'topk'; did you mean 'model.experts.top_k'?"),
        ("checkpoint.qqqq=3", "unknown key 'checkpoint.qqqq'; known keys: save_interval, keep_last, keep_every"),
    ],
)
def test_unknown_keys(base: Path, override: str, said: str) -> None:
    assert complaint(base, override).startswith(f"--set {override!r}: ") and said in complaint(base, override)


def test_what_the_file_holds_and_what_was_set_are_told_apart(base: Path) -> None:
    base.write_text(BASE.replace("steps: 10", "step: 10"))
    message = complaint(base, "model={layers: 1, hiden: 2}")
    assert f"{base}: training.steps is missing; add it; unknown key 'training.step'; did you mean" in message
    assert "--set 'model={layers: 1, hiden: 2}': model.vocab_size is missing" in message


@pytest.mark.parametrize(
    ("override", "key", "found"),
    [
        ("training.steps=many", "training.steps", "'many'"),
        ("training.steps=0", "training.steps", "0"),
        ("training.steps=1.5", "training.steps", "1.5"),
        ("model.quantize=perhaps", "model.quantize", "'perhaps'"),
        ("parallel.zero_stage=4", "parallel.zero_stage", "4"),
        ("training.precision=bf61", "training.precision", "'bf61'"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate", "nan"),
        ("model=3", "model", "3"),
        ("model.retention=[2]", "model.retention", "[2]"),
        ("parallel.experts_per_rank=[0, 8]", "parallel.experts_per_rank.0", "0"),
        ("model.retention.key_dim=3", "model.retention.key_dim", "3"),
        ("checkpoint.keep_last=1", "checkpoint.keep_last", "1"),
    ],
)
def test_wrong_values_are_named(base: Path, override: str, key: str, found: str) -> None:
    message = complaint(base, override)
    assert f"{key}: " in message and message.endswith(f"found {found}") and "Input" not in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps=many", "training.steps: must be a whole number, found 'many'"),
        ("training.steps=1.5", "training.steps: must be a whole number, found 1.5"),
        ("optimizer.learning_rate=low", "optimizer.learning_rate: must be a number, found 'low'"),
        ("model.quantize=perhaps", "model.quantize: must be true or false, found 'perhaps'"),
        ("model=3", "model: must be a section with keys, found 3"),
        ("optimizer.betas=3", "optimizer.betas: must be a list, found 3"),
        ("training.steps=0", "training.steps: must be greater than 0, found 0"),
        ("training.steps=2_0", "2_0 has an underscore, which may only part groups of three digits; leave it out"),
        ("optimizer.learning_rate=1_0.5", "has an underscore"),
    ],
)
def test_wrong_values_are_told_in_plain_words(base: Path, override: str, said: str) -> None:
    assert said in complaint(base, override)


def test_underscores_part_thousands(base: Path) -> None:
    assert load_config(base, ["training.steps=1_000_000"]).training.steps == 10**6


def test_all_mistakes_are_told_at_once(base: Path) -> None:
    message = complaint(base, "training.steps=many", "model.hiden_size=3")
    assert "training.steps" in message and "did you mean 'model.hidden_size'?" in message


def test_a_wrong_decay_is_named_by_its_key_alone(base: Path) -> None:
    for wrong in ("fast", "[1, 2, 3]"):
        message = complaint(base, f"model.retention.decay={wrong}")
        assert "model.retention.decay: " in message and "decay.literal" not in message
    assert "[7.0, 1.0]" in complaint(base, "model.retention.decay=[7, 1]")
    assert load_config(base, ["model.retention.decay=[1.5, 7]"]).model.retention.decay == (1.5, 7.0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.experts.num_experts=8", "model.experts.top_k=9"], "top_k 9 exceeds the 8 routed experts"),
        (["model.experts.num_experts=8", "model.router.n_group=3"], "it can be 1, 2, 4, 8"),
        (["model.experts.num_experts=8", "model.router.n_group=4", "model.router.topk_group=5"], "set it to 4 or less"),
        (
            [
                "model.experts.num_experts=8",
                "model.experts.top_k=5",
                "model.router.n_group=4",
                "model.router.topk_group=2",
            ],
            "2 groups of 2 experts hold fewer than model.experts.top_k 5; set topk_group to 3 or more",
        ),
        (["model.experts.type=hat", "model.experts.grid_size=1"], "model.experts.grid_size: "),
        (["model.experts.type=hat", "model.experts.grid_range=[2, -2]"], "grid_range [2.0, -2.0] must be [low, high]"),
        (
            ["model.experts.type=bspline", "model.experts.grid_size=4", "model.experts.spline_order=5"],
            "spline_order 5 needs more knots than the 5 of grid_size 4; set spline_order <= 4 or grid_size >= 5",
        ),
        (["model.experts.type=chebyshev", "model.experts.function_groups=5"], "function_groups 5 does not divide"),
    ],
)
def test_experts_and_routers_that_cannot_be_are_refused(base: Path, overrides: list[str], said: str) -> None:
    message = complaint(base, *overrides)
    assert said in message and "\n" not in message


def test_missing_keys_are_named(tmp_path: Path) -> None:
    tree = yaml.safe_load(BASE)
    del tree["optimizer"], tree["model"]["experts"]["top_k"]
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(tree))
    message = complaint(path)
    assert "model.experts.top_k is missing" in message and "optimizer is missing" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [1\nb: }", "not valid YAML: line 2, column 2: expected ',' or ']', but got ':'; configs/tiny.yaml is"),
        (b"", "expected a mapping"),
        (b"- 1\n- 2\n", "expected a mapping"),
        (b"run: \xff\xfe", "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    message = complaint(path)
    assert str(path) in message and said in message and "\n" not in message


def test_missing_files(tmp_path: Path) -> None:
    assert "no such file; configs/tiny.yaml is a place to start" in complaint(tmp_path / "none.yaml")
    assert f"{tmp_path}: is a folder, not a file; configs/tiny.yaml" in complaint(tmp_path)
    (tmp_path / "config.yaml").touch()
    assert f"is a folder, not a file; did you mean {tmp_path}/config.yaml?" in complaint(tmp_path)
    assert f"no such file; did you mean {tmp_path}/config.yaml?" in complaint(tmp_path / "config.yml")


def test_overrides(base: Path) -> None:
    config = load_config(
        base,
        ["training.steps=99", "parallel.expert_parallel=2", "parallel.experts_per_rank=[3, 5]", "run.folder=runs/a=b"],
    )
    assert config.training.steps == 99 and plan_expert_counts(config) == (3, 5)
    assert config.run.folder == Path("runs/a=b")
    assert load_config(base, ["training.steps=1", "training.steps=2"]).training.steps == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("training.steps={", "is not a YAML value"),
        ("training.steps.more=3", "'steps' is a value, not a section"),
    ],
)
def test_bad_overrides(base: Path, override: str, said: str) -> None:
    message = complaint(base, override)
    assert "--set" in message and override in message and said in message


def refusal(path: Path, world: int, *overrides: str) -> str:
    config = load_config(path, overrides)
    with pytest.raises(UserError) as caught:
        config.check_world_size(world)
    return str(caught.value)


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


@pytest.mark.parametrize(("world", "expert"), [(2, 4), (6, 4), (12, 5), (3, 2)])
def test_expert_that_does_not_divide_the_processes(base: Path, world: int, expert: int) -> None:
    message = refusal(base, world, f"parallel.expert_parallel={expert}")
    assert f"parallel.expert_parallel {expert} " in message and f"{world} processes" in message
    remedies = numbers(message.split("can be ")[1].split(" or start")[0])
    assert 1 in remedies
    for remedy in remedies:
        load_config(base, [f"parallel.expert_parallel={remedy}"]).check_world_size(world)


def test_a_multiple_of_expert_processes_is_a_remedy_too(base: Path) -> None:
    assert "a multiple of 4 processes" in refusal(base, 6, "parallel.expert_parallel=4")
    load_config(base, ["parallel.expert_parallel=4"]).check_world_size(4)
    load_config(base, ["parallel.expert_parallel=4"]).check_world_size(12)


def test_expert_that_does_not_divide_the_experts(base: Path) -> None:
    message = refusal(base, 12, "parallel.expert_parallel=3")
    assert "parallel.expert_parallel 3 " in message and "model.experts.num_experts 8" in message
    remedies = numbers(message.split("set it to ")[1].split(", or name")[0])
    assert remedies == [1, 2, 4]
    for remedy in remedies:
        load_config(base, [f"parallel.expert_parallel={remedy}"]).check_world_size(12)
    load_config(base, ["parallel.expert_parallel=3", "parallel.experts_per_rank=[3, 3, 2]"]).check_world_size(12)


@pytest.mark.parametrize("shares", [[4, 5], [8], [2, 3, 3]])
def test_shares_that_do_not_add_up(base: Path, shares: list[int]) -> None:
    message = refusal(base, 4, "parallel.expert_parallel=2", f"parallel.experts_per_rank={shares}")
    for number in (
        str(shares),
        f"{len(shares)} entries",
        f"sum to {sum(shares)}",
        "parallel.expert_parallel = 2",
        "num_experts = 8",
    ):
        assert number in message
    load_config(base, ["parallel.expert_parallel=2", "parallel.experts_per_rank=[3, 5]"]).check_world_size(4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_uneven_shares_in_every_stage(base: Path, stage: int) -> None:
    uneven = ["parallel.expert_parallel=2", "parallel.experts_per_rank=[3, 5]", f"parallel.zero_stage={stage}"]
    load_config(base, uneven).check_world_size(4)


@pytest.mark.parametrize(
    ("shares", "near"), [("[4, 5]", [4, 4]), ("[1, 6]", [2, 6]), ("[8]", [4, 4]), ("[1000000000, 1]", [4, 4])]
)
def test_the_nearest_shares_are_named_and_work(base: Path, shares: str, near: list[int]) -> None:
    message = refusal(base, 4, "parallel.expert_parallel=2", f"parallel.experts_per_rank={shares}")
    assert message.endswith(f"such as {near}")
    load_config(base, ["parallel.expert_parallel=2", f"parallel.experts_per_rank={near}"]).check_world_size(4)


def test_more_ranks_than_experts(base: Path) -> None:
    for shares in ("null", "auto", "[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"):
        message = refusal(base, 16, "parallel.expert_parallel=16", f"parallel.experts_per_rank={shares}")
        assert "parallel.expert_parallel 16" in message and "model.experts.num_experts 8" in message
        assert numbers(message.split("set it to")[1]) == [1, 2, 4, 8]


def test_weights_of_ranks_go_with_auto(base: Path) -> None:
    auto = ["parallel.expert_parallel=2", "parallel.experts_per_rank=auto"]
    load_config(base, [*auto, "parallel.rank_weights=[1, 2.5]"]).check_world_size(4)
    load_config(base, auto).check_world_size(4)
    assert "3 entries for the 2 ranks" in complaint(base, *auto, "parallel.rank_weights=[1, 2, 3]")
    assert "experts_per_rank: auto" in complaint(base, "parallel.expert_parallel=2", "parallel.rank_weights=[1, 2]")
    assert "parallel.rank_weights.1: " in complaint(base, *auto, "parallel.rank_weights=[1, 0]")
    message = complaint(base, "parallel.experts_per_rank=fast")
    assert "parallel.experts_per_rank: " in message and "literal[" not in message and "tuple[" not in message


@pytest.mark.parametrize(("batch", "world"), [(1, 4), (23, 4), (25, 5), (100, 3), (7, 1), (12, 4)])
def test_batch_that_does_not_divide(base: Path, batch: int, world: int) -> None:
    message = refusal(base, world, f"training.global_batch_size={batch}")
    assert f"training.global_batch_size {batch} " in message and f"2 × {world} processes = {2 * world}" in message
    (remedy,) = numbers(message.split("set training.global_batch_size to")[1])
    fixed = load_config(base, [f"training.global_batch_size={remedy}"])
    fixed.check_world_size(world)
    assert abs(remedy - batch) <= world or remedy == 2 * world
    assert fixed.gradient_accumulation_steps(world) * world * 2 == remedy


@pytest.mark.parametrize(
    ("key", "value"), [("model.hidden_size", 18), ("model.experts.expert_hidden_size", 7), ("model.hidden_size", 1)]
)
def test_groups_that_do_not_divide(base: Path, key: str, value: int) -> None:
    message = complaint(base, f"{key}={value}")
    assert f"{key} {value}" in message and "model.experts.function_groups 4" in message
    for remedy in numbers(message.split("it can be")[1]):
        load_config(base, [f"{key}={value}", f"model.experts.function_groups={remedy}"])
    assert load_config(base, [f"{key}={value}", "model.experts.type=swiglu"]).model.experts.type == "swiglu"


def test_top_k_beyond_the_experts(base: Path) -> None:
    message = complaint(base, "model.experts.top_k=9")
    assert "top_k 9" in message and "8 routed" in message
    load_config(base, ["model.experts.top_k=8"])


def test_frozen(base: Path) -> None:
    config = load_config(base)
    with pytest.raises(ValidationError, match="frozen"):
        config.training.steps = 3  # type: ignore[misc]
    assert config.training.steps == 10


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.name)
def test_configs_load(path: Path) -> None:
    tiny = CONFIGS[0].with_name("tiny.yaml")
    config = load_config(path, (), lambda data: 2048, lambda base: load_config(tiny).model.model_dump(mode="json"))
    config.check_world_size(config.parallel.expert_parallel)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_load(path: Path) -> None:
    recipe = load_recipe(path)
    for source in recipe.sources:
        assert build_source(source.kind, recipe.input_paths(source), dict(source.options)).kind == source.kind


@pytest.mark.parametrize("override", ["run.seed=7", "model.retention.decay=[1.5, 7]", "run.folder='runs/größe: x'"])
def test_what_is_dumped_loads_the_same(base: Path, tmp_path: Path, override: str) -> None:
    config = load_config(base, [override, "parallel.expert_parallel=2", "parallel.experts_per_rank=[1, 7]"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config and dump_config(load_config(again)) == dump_config(config)
    assert list(yaml.safe_load(dump_config(config))) == list(Config.model_fields)


def sections(section: type[ConfigSection], place: str = "") -> dict[str, type[ConfigSection]]:
    """Every section by its dotted name."""
    found = {place: section}
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, ConfigSection):
            found |= sections(kind, f"{place}.{name}".strip("."))
    return found


def test_every_field_has_a_description_and_refuses_unknown_keys() -> None:
    found = sections(Config)
    assert {"", "model.retention", "model.experts", "parallel", "checkpoint"} <= set(found)
    for place, section in found.items():
        assert section.model_config.get("frozen") and section.model_config.get("extra") == "forbid", place
        for name, field in section.model_fields.items():
            if f"{place}.{name}".strip(".") not in found:
                text = field.description or ""
                assert len(text) > 15 and text.endswith("."), f"{place}.{name}: {text!r}"


@pytest.mark.parametrize(("length", "sequence", "near"), [(64, 3, [63, 66]), (100, 8, [96, 104]), (2, 4, [4])])
def test_a_length_that_slices_do_not_divide(base: Path, length: int, sequence: int, near: list[int]) -> None:
    changes = [
        f"data.sequence_length={length}",
        f"parallel.sequence_parallel={sequence}",
        "training.global_batch_size=64",
    ]
    message = refusal(base, sequence, *changes)
    assert f"data.sequence_length {length}" in message and f"parallel.sequence_parallel {sequence}" in message
    assert numbers(message.split("can:")[1]) == near
    for remedy in near:
        load_config(
            base, [*changes, f"data.sequence_length={remedy}", "training.global_batch_size=48"]
        ).check_world_size(sequence)


def test_slices_that_do_not_divide_the_processes(base: Path) -> None:
    message = refusal(base, 4, "parallel.sequence_parallel=3")
    assert "parallel.sequence_parallel 3" in message and "4 processes" in message


def test_layers_are_letters_or_a_number_of_retentions(base: Path) -> None:
    assert load_config(base, ["model.layers=3"]).model.layers == "RRR"
    assert load_config(base, ["model.layers=RRA"]).model.layers == "RRA"
    for wrong in ("RXA", "0", "''"):
        assert "model.layers" in complaint(base, f"model.layers={wrong}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["parallel.shard_ternary=true", "parallel.zero_stage=2"],
            "not to parallel.zero_stage 2; set parallel.zero_stage to 1",
        ),
        (
            ["parallel.shard_ternary=true", "model.quantize=false"],
            "model.quantize is false; set",
        ),
        (
            ["parallel.shard_ternary=true", "model.quantize_warmup_steps=3"],
            "the first 3 steps .* set both to 0",
        ),
        (
            ["model.quantize_start_step=6", "model.quantize_warmup_steps=4"],
            "= 10 leaves none of training.steps 10 quantised",
        ),
        (["model.quantize_start_step=-1"], "model.quantize_start_step: .*greater than or equal to 0"),
        (["model.quantize=false", "model.quantize_warmup_steps=2"], "quantize_warmup_steps 2 is for quantised models"),
        (["model.scale_group_size=0"], "model.scale_group_size"),
        (
            ["model.scale_group_size=8", "model.experts.type=hat"],
            "scale_group_size 8 is not for model.experts.type hat",
        ),
        (["model.short_conv_size=-1"], "model.short_conv_size"),
        (["parallel.ternary_wire_format=base_two"], "parallel.ternary_wire_format"),
    ],
)
def test_ternary_weights_that_cannot_be_are_refused(base: Path, overrides: list[str], said: str) -> None:
    assert re.search(said, complaint(base, *overrides))


def test_ternary_weights_that_can_be(base: Path) -> None:
    shared = ["parallel.shard_ternary=true", "model.scale_group_size=3", "parallel.ternary_wire_format=base_three"]
    assert load_config(base, shared).parallel.shard_ternary
    model = load_config(base, ["model.quantize_start_step=3", "model.quantize_warmup_steps=4"]).model
    assert [model.quantization_lambda(step) for step in (0, 2, 3, 5, 7, 9)] == [0, 0, 0.2, pytest.approx(0.6), 1, 1]
