"""The language of the code: no retired words, no British spelling in identifiers, one meaning for each public name."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("kabrn_dist", "data_prep", "launch") for path in (ROOT / folder).rglob("*.py"))

# Metaphors of earlier versions. The field has a term for each, such as overlapped reduce, stop request, sampler,
# dispatch plan, segments, prefetch, figure, underused, placeholder, record, decision, progress, histogram.
_METAPHORS = """
aftermath ahead aloud anew arrive aside bags beside census depart drawing drawings guide heard hollow homeward
homing journey journeys portrait portraits portray settle settled starving tally tallies ticket tickets unswap
verdict verdicts wish wished wishes
"""
RETIRED = frozenset(_METAPHORS.split())
BRITISH = re.compile(
    r".*[a-z]{3}(is(e|es|ed|er|ers|ing|ation|ations)|ys(e|es|ed|ing))$"
    r"|(behavi|col|fav|flav|harb|hon|lab|neighb|rum|vap)our.*|(licence|centre|metre|fibre|theatre)s?$"
)
_ENDINGS = """
advise advised arise bitwise chunkwise comprise concise elementwise exercise exercises expertise likewise noise
noises noised otherwise pairwise piecewise precise premise promise promised raise raised raises raising rise rises
rising supervise surprise wise
"""
NOT_BRITISH = frozenset(_ENDINGS.split())
# Top-level names that may be defined more than once, and why.
SHARED_NAMES = {
    "logger": "every module has its own, named after itself",
    "main": "the entry point of a script",
    "run": "what a command does",
    "add_parser": "the arguments of a command",
    "add_arguments": "the arguments of a command",
    "parse": "the arguments of a script",
    "EXAMPLES": "the examples that --help shows",
    "DESCRIPTION": "the first lines of --help",
    "Result": "a type variable",
    "Job": "the C struct that a kernel's threads share",
}


# Copied into exports, where it cannot import: what is defined there again is the same thing once more.
SELF_CONTAINED = ROOT / "kabrn_dist" / "hub" / "modeling_mixkabrn.py"


def split_identifier(name: str) -> list[str]:
    """Split a name at underscores, digits and changes of case: `GradReduceScatter` → grad, reduce, scatter."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def find_words(code: str) -> dict[str, set[str]]:
    """Word → identifiers of the code that contain it. Comments and texts do not count."""
    words: dict[str, set[str]] = defaultdict(set)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.NAME:
            for word in split_identifier(token.string):
                words[word].add(token.string)
    return words


def is_british(word: str) -> bool:
    return BRITISH.fullmatch(word) is not None and word not in NOT_BRITISH


def list_public_names(code: str) -> set[str]:
    """Public names that a module defines at its top level; imported names are not among them."""
    names: set[str] = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_identifiers_use_the_terms_of_the_field_in_american_spelling(path: Path) -> None:
    words = find_words(path.read_text(encoding="utf-8"))
    assert not {word: names for word, names in words.items() if word in RETIRED}
    assert not {word: names for word, names in words.items() if is_british(word)}


def test_no_public_name_means_two_things() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in [path for path in SOURCES if path != SELF_CONTAINED]:
        for name in list_public_names(path.read_text(encoding="utf-8")):
            places[name].append(str(path.relative_to(ROOT)))
    assert not {name: paths for name, paths in places.items() if len(paths) > 1 and name not in SHARED_NAMES}


def test_what_is_not_wanted_would_be_found() -> None:
    words = find_words("class HTTPJourney:\n    def normaliseAll(self, look_ahead):  # a wish\n        'hollow'\n")
    assert {word for word in words if word in RETIRED} == {"journey", "ahead"}
    assert {word for word in words if is_british(word)} == {"normalise"}
    assert all(map(is_british, ["colours", "licence", "analyse", "quantisation", "initialiser", "neighbours"]))
    assert not any(map(is_british, ["hours", "source", "raise", "noise", "license", "this", "analysis", "exists"]))
    assert list_public_names("import a\nX: int = 1\n_y = 2\nB, C = 1, 2\ndef f(): pass\nclass D: pass") == {*"XBCfD"}
