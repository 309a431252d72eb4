"""Who may import whom: the layers of the package, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import from lower levels and from its own part.
LEVELS = {
    "errors": 0,
    "fault": 0,
    "config": 1,
    "config_model": 0,
    "config_optimizer": 0,
    "config_parallel": 0,
    "draw": 0,
    "kernels": 1,
    "config_file": 1,
    "mesh": 1,
    "place": 0,
    "data": 2,
    "parallel": 2,
    "checkpoint": 2,
    "model": 3,
    "grow": 4,
    "train": 5,
    "export": 6,
    "generate": 6,
    "estimate": 6,
    "report": 6,
}
# Parts that know less than their level would allow.
ONLY = {
    "data": {"errors", "fault"},
    "checkpoint": {"errors", "fault"},
    "fault": set(),
    "config": {"config_model", "config_optimizer", "config_parallel", "errors"},
    "config_model": {"errors"},
    "config_optimizer": {"config_model"},
    "config_parallel": {"config_model"},
    "draw": set(),
    "kernels": set(),
    "config_file": {"config", "errors"},
    "mesh": {"errors", "place"},
    "place": {"errors"},
}
NEVER = {"export": {"train"}, "generate": {"train", "estimate"}, "estimate": {"train", "generate"}}
DEEPSPEED = {"kabrn_dist/backend/deepspeed.py", "kabrn_dist/backend/sharded_state.py"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save"}
OBJECTS = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}


def sources(*folders: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


PACKAGE, EVERYTHING = sources("kabrn_dist"), sources("kabrn_dist", "launch", "data_prep")


def parse(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"), source)


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports, also inside functions. `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(source: str) -> str:
    """`kabrn_dist/model/moe.py` → model, `kabrn_dist/distributed/mesh.py` → mesh."""
    return Path(source).parts[1].removesuffix(".py")


def parts_imported(tree: ast.Module) -> set[str]:
    return {name.split(".")[1] for name in imports(tree) if name.split(".")[0] == "kabrn_dist"}


def trespasses(part: str, tree: ast.Module) -> set[str]:
    """Parts of the package that `part` imports and may not."""
    found = parts_imported(tree) - {part}
    allowed = {other for other, level in LEVELS.items() if level < LEVELS[part]} - NEVER.get(part, set())
    return found - ONLY.get(part, allowed)


def names_used(tree: ast.Module) -> set[str]:
    """Every name and attribute, dotted as it is written, and the names that imports bring in."""
    used = set(imports(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            used.add(ast.unparse(node))
    return used


def test_every_part_has_a_level() -> None:
    assert {part_of(source) for source in PACKAGE} - {"__init__"} == set(LEVELS)


@pytest.mark.parametrize("source", [source for source in PACKAGE if part_of(source) != "__init__"])
def test_imports_point_downwards(source: str) -> None:
    assert trespasses(part_of(source), parse(source)) == set()


def test_an_upward_import_would_be_found() -> None:
    for part, line in (
        ("model", "from kabrn_dist.backend.engine import Engine"),
        ("data", "def f():\n    import kabrn_dist.distributed.mesh"),
        ("mesh", "from kabrn_dist import config"),
        ("estimate", "from kabrn_dist.train import loop"),
        ("parallel", "from kabrn_dist.model.moe import Router"),
    ):
        assert trespasses(part, ast.parse(line)), line
    assert not trespasses("train", ast.parse("from kabrn_dist.model.moe import Router"))


def test_the_package_imports_no_tool_around_it() -> None:
    around = {"launch", "data_prep", "benchmarks", "tests"}
    for source in PACKAGE:
        assert not {name.split(".")[0] for name in imports(parse(source))} & around, source


@pytest.mark.parametrize("source", sources("data_prep"))
def test_preparation_knows_the_format_alone(source: str) -> None:
    tree = parse(source)
    assert parts_imported(tree) <= {"data", "errors", "fault"}
    assert not {name.split(".")[0] for name in imports(tree)} & {"launch", "benchmarks", "tests"}


def test_deepspeed_is_known_to_two_files() -> None:
    users = {s for s in EVERYTHING if any(name.split(".")[0] == "deepspeed" for name in imports(parse(s)))}
    assert users == DEEPSPEED


def test_groups_are_made_in_one_file() -> None:
    makers = {"new_group", "new_subgroups", "new_subgroups_by_enumeration", "init_device_mesh", "split_group"}
    users = {s for s in EVERYTHING if {name.split(".")[-1] for name in names_used(parse(s))} & makers}
    assert users == {"kabrn_dist/distributed/mesh.py"}


@pytest.mark.parametrize("source", EVERYTHING)
def test_nothing_is_pickled(source: str) -> None:
    used = names_used(parse(source))
    assert not {name.split(".")[0] for name in used} & UNSAFE_MODULES
    assert not used & UNSAFE_CALLS
    assert not {name.split(".")[-1] for name in used} & OBJECTS


def test_a_pickle_would_be_found() -> None:
    for line in ("import pickle", "from torch import load, save", "torch.save(x, 'f')", "dist.all_gather_object(a, b)"):
        used = names_used(ast.parse(line))
        last, first = ({name.split(".")[place] for name in used} for place in (-1, 0))
        assert used & UNSAFE_CALLS or last & OBJECTS or first & UNSAFE_MODULES, line
