"""Who may import whom: the layers of the package, read from the sources and checked in fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Folders of kabrn_dist and what each may import besides itself. Read from top to bottom: nothing imports upwards.
ALLOWED: dict[str, set[str]] = {
    "utils": set(),
    "config": {"utils"},
    "kernels": {"utils"},
    "plots": {"utils"},
    "data": {"utils", "config"},
    "distributed": {"utils", "config"},
    "ops": {"utils", "config", "kernels", "distributed"},
    "model": {"utils", "config", "kernels", "data", "distributed", "ops"},
    "checkpoint": {"utils", "config", "distributed"},
    # Numpy alone, for the runtime too.
    "adapters": {"utils", "config"},
    "backend": {"utils", "config", "kernels", "data", "distributed", "ops", "model", "checkpoint"},
    "metrics": {"utils", "config", "kernels", "plots", "data", "distributed", "ops", "model", "checkpoint"},
}
ALLOWED["inference"] = {*ALLOWED} - {"backend", "plots"}
_BELOW_TRAINING = {*ALLOWED} - {"backend"}
ALLOWED |= {
    "grow": _BELOW_TRAINING - {"plots"},
    "planner": _BELOW_TRAINING - {"plots"},
    "analysis": _BELOW_TRAINING,
    # Packs what inference reads; that, and no more, needs torch.
    "runtime": {"adapters", "utils", "config", "data", "ops", "model", "checkpoint", "inference", "kernels"},
    # Trains adapters in a chat, on a finished run.
    "online_learning": (_BELOW_TRAINING - {"plots"}) | {"runtime"},
    # Writes models for Hugging Face's libraries, and makes runs of theirs.
    "hub": (_BELOW_TRAINING - {"plots"}) | {"runtime"},
}
# Reads published data sets, with the readers of `data_prep` next to the package, and asks models; results name the
# version of the package.
ALLOWED["evaluation"] = (_BELOW_TRAINING - {"plots"}) | {"runtime", "kabrn_dist"}
ALLOWED["train"] = {*ALLOWED} - {"analysis", "runtime", "hub", "online_learning"}
# The commands also print the version of the package.
ALLOWED["cli"] = {*ALLOWED, "kabrn_dist"}
# The API of the package and the tools next to it, by the first part of their names.
ALLOWED_OUTSIDE: dict[str, set[str]] = {
    "kabrn_dist": {"data", "train", "inference", "utils"},
    "__main__": {"cli"},
    "data_prep": {"utils", "config", "data"},
    "launch": {*ALLOWED},
}
# Packages of the training backend. Importing one of these folders must not load them.
HEAVY = {"deepspeed", "mpi4py", "fairscale"}
LIGHT_FOLDERS = ("metrics", "analysis", "inference", "planner", "runtime", "online_learning")

DATA_PREP_USERS = ("cli", "launch", "data_prep", "evaluation", "online_learning")
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


def list_sources(*folders: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


PACKAGE, EVERYTHING = list_sources("kabrn_dist"), list_sources("kabrn_dist", "launch", "data_prep")


def parse(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"), source)


def list_imports(tree: ast.Module, functions: bool = True, types: bool = True) -> Iterator[str]:
    """Dotted names that a module imports; `from a import b` counts as a.b.

    `functions`: also inside functions; `types`: also for type checkers alone.
    """
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)) and (
            types or not is_type_checking(node)
        ):
            waiting += ast.iter_child_nodes(node)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def module_name(source: str) -> str:
    """`kabrn_dist/model/moe.py` → kabrn_dist.model.moe; a package's `__init__.py` is named as the package."""
    parts = Path(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module: str) -> str:
    """`kabrn_dist.model.moe` → model; other top-level packages, and the package's own `__init__`, by their names."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] or first if first == "kabrn_dist" else first


def find_forbidden_imports(module: str, tree: ast.Module) -> set[str]:
    """Folders of the package, or tools around it, that `module` imports and may not."""
    folder = folder_of(module)
    allowed = ALLOWED_OUTSIDE.get(folder) or ALLOWED[folder]
    inside = {folder_of(name) for name in list_imports(tree) if name.split(".")[0] == "kabrn_dist"}
    if module == "data_prep.__main__":
        allowed = {"cli"}
    outside = {name.split(".")[0] for name in list_imports(tree)} & {"launch", "data_prep", "benchmarks", "tests"}
    # The commands start the preparation of data, which lies next to the package; others use its readers.
    outside -= {"data_prep"} if folder in DATA_PREP_USERS else set()
    return (inside - {folder} - allowed) | (outside - {folder})


def make_graph(functions: bool = True) -> dict[str, set[str]]:
    """Module → modules that it imports, of everything in the repository that is installed or launched.

    With `functions` False: modules that are loaded when it is imported, so also the packages that it lies in.
    """
    trees = {module_name(source): parse(source) for source in EVERYTHING}

    def resolve(name: str) -> str:
        while name and name not in trees:
            name = name.rpartition(".")[0]
        return name

    return {
        module: {
            target
            for target in map(
                resolve, [*list_imports(tree, functions, types=False), *([] if functions else [parent_of(module)])]
            )
            if target
        }
        - {module}
        for module, tree in trees.items()
    }


def parent_of(module: str) -> str:
    return module.rpartition(".")[0]


def find_cycles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Groups of two or more modules that import one another (strongly connected components)."""
    reachable = {module: reach(graph, module) for module in graph}
    groups = {frozenset({a} | {b for b in reachable[a] if a in reachable[b]}) for a in graph}
    return [set(group) for group in groups if len(group) > 1]


def reach(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """All modules that importing `start` loads, directly or not."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), set()) - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def list_names(tree: ast.Module) -> set[str]:
    """Every name and attribute, dotted as it is written, and the names that imports bring in."""
    used = set(list_imports(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            used.add(ast.unparse(node))
    return used


def test_every_folder_has_its_place() -> None:
    folders = {path.name for path in (ROOT / "kabrn_dist").iterdir() if any(path.glob("*.py"))}
    assert folders <= set(ALLOWED) and set(ALLOWED) <= folders
    assert {folder_of(module_name(source)) for source in PACKAGE} <= set(ALLOWED) | {"kabrn_dist", "__main__"}


@pytest.mark.parametrize("source", EVERYTHING)
def test_imports_point_downwards(source: str) -> None:
    assert find_forbidden_imports(module_name(source), parse(source)) == set()


def test_an_upward_import_would_be_found() -> None:
    for module, line in (
        ("kabrn_dist.model.moe", "from kabrn_dist.backend.engine import Engine"),
        ("kabrn_dist.data.index", "def f():\n    import kabrn_dist.distributed.mesh"),
        ("kabrn_dist.distributed.mesh", "from kabrn_dist import train"),
        ("kabrn_dist.planner.estimate", "from kabrn_dist.train import trainer"),
        ("kabrn_dist.distributed.halo", "from kabrn_dist.model.moe import Router"),
        ("kabrn_dist.checkpoint.store", "from kabrn_dist.model.mixkabrn import MixKABRN"),
        ("kabrn_dist.metrics.ternary", "from kabrn_dist.backend.engine import Engine"),
        ("kabrn_dist.train.trainer", "from kabrn_dist.cli.main import main"),
        ("kabrn_dist.data.index", "import data_prep.shards"),
        ("data_prep.shards", "from kabrn_dist.model import moe"),
    ):
        assert find_forbidden_imports(module, ast.parse(line)), line
    assert not find_forbidden_imports("kabrn_dist.train.x", ast.parse("from kabrn_dist.model.moe import Router"))


def test_no_modules_import_one_another() -> None:
    assert find_cycles(make_graph()) == []
    assert find_cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]


def test_deepspeed_is_known_to_the_backend_alone() -> None:
    users = {s for s in EVERYTHING if any(name.split(".")[0] == "deepspeed" for name in list_imports(parse(s)))}
    assert users and {str(Path(user).parent) for user in users} == {"kabrn_dist/backend"}


@pytest.mark.slow
@pytest.mark.parametrize("folder", LIGHT_FOLDERS)
def test_what_reads_a_finished_run_needs_no_training_backend(folder: str) -> None:
    """By the sources: what importing them loads. Imports inside functions load nothing until they are called."""
    graph = make_graph(functions=False)
    modules = {module for module in graph if folder_of(module) == folder}
    loaded = modules.union(*(reach(graph, module) for module in modules))
    heavy = {
        source: found
        for source in EVERYTHING
        if module_name(source) in loaded
        and (
            found := {name.split(".")[0] for name in list_imports(parse(source), functions=False, types=False)} & HEAVY
        )
    }
    assert modules and not heavy


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "absent"), [(folder, HEAVY) for folder in LIGHT_FOLDERS] + [("config", {"torch"})])
def test_a_fresh_process_loads_no_training_backend(folder: str, absent: set[str]) -> None:
    code = (
        "import importlib, pkgutil, sys\n"
        f"import kabrn_dist.{folder} as folder\n"
        "for module in pkgutil.walk_packages(folder.__path__, folder.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        f"print(sorted({absent!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_groups_are_made_in_one_file() -> None:
    makers = {"new_group", "new_subgroups", "new_subgroups_by_enumeration", "init_device_mesh", "split_group"}
    users = {s for s in EVERYTHING if {name.split(".")[-1] for name in list_names(parse(s))} & makers}
    assert users == {"kabrn_dist/distributed/mesh.py"}


@pytest.mark.parametrize("source", EVERYTHING)
def test_nothing_is_pickled(source: str) -> None:
    used = list_names(parse(source))
    assert not {name.split(".")[0] for name in used} & UNSAFE_MODULES
    assert not used & UNSAFE_CALLS
    assert not {name.split(".")[-1] for name in used} & OBJECTS


def test_a_pickle_would_be_found() -> None:
    for line in ("import pickle", "from torch import load, save", "torch.save(x, 'f')", "dist.all_gather_object(a, b)"):
        used = list_names(ast.parse(line))
        last, first = ({name.split(".")[part] for name in used} for part in (-1, 0))
        assert used & UNSAFE_CALLS or last & OBJECTS or first & UNSAFE_MODULES, line
