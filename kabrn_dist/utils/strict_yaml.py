"""YAML as people write it: nothing is dropped or shortened in silence, and nothing in a file ends in a traceback.

Differences from PyYAML's safe loader: a key given twice is refused; only true and false are booleans, so `off` and `no`
are texts; there are no dates, no octal numbers and none in base 60, which all stay texts; nesting, aliases and the size
of a file are limited. Underscores in a number part groups of three digits.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain

MAX_BYTES = 4 * 2**20
MAX_DEPTH = 40
# What aliases stand for counts each time.
MAX_NODES = 200_000
# Longer numbers stay texts: Python refuses to convert them, and no key takes one.
MAX_DIGITS = 300
# Streams that a shell gives a command in place of a file, as in <(…).
STREAMS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


def load_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        UserError: for bad YAML, a key that is given twice, a value that does not fit its tag, or a document that is
            nested too deeply or has too many parts. The message names the line.
    """
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {_problem(error)}") from None
    finally:
        loader.dispose()


def read_yaml(path: Path, remedy: str) -> Any:
    """Return the value of a YAML file.

    Args:
        path: the file.
        remedy: what to do about a file that cannot be read.

    Raises:
        UserError: for a file that cannot be read, or as `load_yaml`.
    """
    try:
        text = _read(path, remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        return load_yaml(text)
    except (UserError, yaml.YAMLError) as error:
        advice = f"; {remedy}" if str(error).startswith("not valid") else ""
        raise UserError(f"{path}: {error}{advice}") from None


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the line itself."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None)}"


def _read(path: Path, remedy: str) -> bytes:
    if not str(path).startswith(STREAMS):
        return read_plain(path, MAX_BYTES, follow_links=True, remedy=remedy)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES // 2**20} MiB; give a configuration")
    return content


class _StrictLoader(yaml.SafeLoader):
    """Reads one document; the docstring of the module says how it differs from its base."""

    def get_single_node(self) -> Any:
        self._depth = 0
        node = super().get_single_node()
        if node is not None:
            _check_size(node, {}, set())
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            line = self.peek_event().start_mark.line + 1
            raise UserError(f"line {line}: nested too deeply, more than {MAX_DEPTH} levels; use fewer")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        lines: dict[Any, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(
                    f"the key {key.value!r} is given twice, in lines {lines[key.value]} and {line}; remove one of them"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value):
            raise UserError(
                f"line {node.start_mark.line + 1}: {value!r} holds a character that no text or path may have; remove it"
            )
        return value

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            raise UserError(
                f"line {node.start_mark.line + 1}: {str(node.value)[:80]!r} is no value of the type !!{kind}; "
                "leave the type out, or correct the value"
            ) from None


# Not those of the base class, which are the types of YAML 1.1.
_StrictLoader.yaml_implicit_resolvers = {}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(
        rf"^[-+]?(?:0|[1-9][0-9]{{0,{MAX_DIGITS}}}|[1-9][0-9]{{0,2}}(?:_[0-9]{{3}})+|0x[0-9a-fA-F]{{1,{MAX_DIGITS}}}|0b[01]{{1,{MAX_DIGITS}}})$"
    ),
    list("-+0123456789"),
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


def _check_size(node: Any, known: dict[int, tuple[int, int]], inside: set[int]) -> tuple[int, int]:
    """Nodes and levels of a document with its aliases written out. Anchors precede aliases, so recursion is shallow."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 1
    if id(node) in inside:
        raise UserError(
            f"line {node.start_mark.line + 1}: an alias stands for something that contains it; write it out"
        )
    if id(node) not in known:
        inside.add(id(node))
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes = [_check_size(part, known, inside) for part in parts]
        known[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        inside.remove(id(node))
    size, depth = known[id(node)]
    if size > MAX_NODES or depth > MAX_DEPTH:
        raise UserError(
            f"line {node.start_mark.line + 1}: {size} parts in {depth} levels, aliases counted each time, are more "
            f"than {MAX_NODES} in {MAX_DEPTH}; write a smaller document"
        )
    return size, depth
