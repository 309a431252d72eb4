"""Sources: what is read from which layout, whole or in pieces, from folders and archives."""

from __future__ import annotations

import gzip
import pickle
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_prep.documents import Document
from data_prep.sources.build import build_source
from data_prep.sources.m2d2_domains import DOMAINS, official_name
from data_prep.sources.math import find_last_boxed
from tests.support import corpora as data


def read(kind: str, *inputs: Path, unit_bytes: int | None = None, **options: Any) -> list[Document]:
    source = build_source(kind, inputs, options)
    if unit_bytes is not None:
        source.unit_bytes = unit_bytes  # type: ignore[attr-defined]
    source = pickle.loads(pickle.dumps(source))
    units = source.units()
    assert [unit.name for unit in units] == sorted({unit.name for unit in units})
    return [document for unit in units for document in source.read(pickle.loads(pickle.dumps(unit)))]


def texts(kind: str, *inputs: Path, **options: Any) -> list[str | None]:
    return [document.text for document in read(kind, *inputs, **options)]


def masked(document: Document) -> list[str]:
    assert document.text is not None
    return [document.text[span.start : span.stop] for span in document.spans or ()]


def test_math_takes_a_split_levels_and_answers(tmp_path: Path) -> None:
    root = data.write_folder(tmp_path / "MATH", data.MATH)
    found = read("math", root, loss="answer")
    assert [document.name for document in found] == [f"MATH/{name}" for name in sorted(data.MATH) if "train" in name]
    assert found[0].text == "Problem: What is $1+1$?\nAnswer: It is $\\boxed{2}$."
    assert masked(found[0]) == [" It is $\\boxed{2}$."]
    assert [document.text for document in found] == texts("math", root)
    final = read("math", root, answer="final", split="all", loss="answer")
    assert [masked(document) for document in final] == [[" no"], [" 2"], [r" \frac{1}{2}"], [r" \{1\}"]]
    assert texts("math", root, levels=[5]) == [found[1].text]
    assert texts("math", root / "train") == [document.text for document in found]


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"\boxed{a{b}{c\}}} x", r"a{b}{c\}}"),
        (r"\boxed {1} and \fbox{2}", "2"),
        (r"is $\boxed 7$.", "7"),
        (r"\boxed{1} and \boxed{open", "1"),
        ("none", None),
    ],
)
def test_the_last_box_is_matched(solution: str, answer: str | None) -> None:
    assert find_last_boxed(solution) == answer


def test_amps_reads_hints_and_blocks(tmp_path: Path) -> None:
    root = data.write_folder(tmp_path, data.AMPS) / "amps"
    found = read("amps", root, answers="each")
    assert [document.text for document in found] == [
        "Problem: Simplify.\nAnswer: First so.\n$x=1$",
        "Problem: Add.\nAnswer: $3$",
        "Problem: Find $x$.\nAnswer: $1$",
        "Problem: Find $x$.\nAnswer: $2$",
        "Problem: Derive $x^2$.\nAnswer: $2x$\r\nby rule",
    ]
    final = read("amps", root, part="khan", answer="final", loss="answer")
    assert [masked(document) for document in final] == [[" $x=1$"], [" $3$"]]
    assert len(read("amps", root, part="mathematica")) == 2


def test_m2d2_reads_lines_of_a_split_and_domain(tmp_path: Path) -> None:
    packed = data.make_tar(data.M2D2)
    (tmp_path / "cs.CL.tar.gz").write_bytes(gzip.compress(packed))
    other = {name.replace("cs.CL", "General_referece"): text for name, text in data.M2D2.items()}
    (tmp_path / "General_referece.tar.gz").write_bytes(gzip.compress(data.make_tar(other)))
    assert texts("m2d2", tmp_path) == ["a train text", "another é", "last"] * 2
    one = read("m2d2", tmp_path, split="valid", domains=["General_reference"])
    assert [document.name for document in one] == [f"General_referece/valid.txt byte {n}" for n in (0, 14, 26)]
    unpacked = data.write_folder(tmp_path / "unpacked", data.M2D2)
    assert texts("m2d2", unpacked, split="all") == [
        line for split in ("test", "train", "valid") for line in (f"a {split} text", "another é", "last")
    ]
    assert official_name("Human_activities__Human_activities") == "Human_activites__Human_activities"
    assert {"Art", "cs.CL", "math.AG", "cs_l1", "Human_activites", "only_txt2"} <= DOMAINS and len(DOMAINS) == 239
    assert "NC" in build_source("m2d2", [tmp_path], {}).license


OPENQA: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "nq": ({"question": "who?", "answer": ["A", "B"]}, {}, ["Problem: who?\nAnswer: A"]),
    "nq-each": (
        {"question": "who?", "answer": ["A", "B"]},
        {"answers": "each"},
        ["Problem: who?\nAnswer: A", "Problem: who?\nAnswer: B"],
    ),
    "efficient": (
        {"question": "who?", "answer_and_def_correct_predictions": ["A"]},
        {},
        ["Problem: who?\nAnswer: A"],
    ),
    "gsm8k": (
        {"question": "q", "answer": "48/2=<<48/2=24>>24\n#### 24"},
        {},
        ["Problem: q\nAnswer: 48/2=<<48/2=24>>24\n#### 24"],
    ),
    "gsm8k-strip": (
        {"question": "q", "answer": "48/2=<<48/2=24>>24\n#### 24"},
        {"marks": "strip"},
        ["Problem: q\nAnswer: 48/2=24\n#### 24"],
    ),
    "gsm8k-final": (
        {"question": "q", "answer": "x\n#### 24"},
        {"answer": "final"},
        ["Problem: q\nAnswer: 24"],
    ),
    "arc": (
        {
            "id": "1",
            "question": {"stem": "s", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
            "answerKey": "B",
        },
        {},
        ["Problem: s\nA. x\nB. y\nAnswer: B. y"],
    ),
}


@pytest.mark.parametrize("name", OPENQA)
def test_openqa_knows_records_by_their_fields(tmp_path: Path, name: str) -> None:
    record, options, expected = OPENQA[name]
    (tmp_path / "x.jsonl").write_text(data.to_jsonl([record]))
    assert texts("openqa", tmp_path / "x.jsonl", **options) == expected
    answer = expected[0].partition("\nAnswer:")[2]
    assert masked(read("openqa", tmp_path / "x.jsonl", loss="answer", **options)[0]) == [answer]


def test_openqa_picks_the_split_by_file_name(tmp_path: Path) -> None:
    for name in ("train.jsonl", "NQ-open.dev.jsonl", "ARC-Easy-Test.jsonl", "trained.jsonl"):
        (tmp_path / name).write_text(data.to_jsonl([{"question": name, "answer": "a"}]))
    for split, count in (("train", 2), ("valid", 1), ("test", 1), ("all", 4)):
        assert len(texts("openqa", tmp_path, split=split)) == count
    assert len(texts("openqa", tmp_path / "NQ-open.dev.jsonl")) == 1


def test_code_reads_trees_and_leaves_out_what_nobody_wrote(tmp_path: Path) -> None:
    files = {
        "a.py": "x = 1\r\n",
        "b.rs": "fn main() {}\n",
        "notes.txt": "no",
        "node_modules/m.js": "x",
        "sub/min.min.js": "x",
        "sub/table.py": "x = [" + "1, " * 4000 + "]\n",
        "sub/huge.c": "int x;\n" * 400,
        "bin.c": b"\0\1",
        "latin.c": b"// \xe9\n",
        "x.zip": b"no archive of ours",
    }
    root = data.write_folder(tmp_path / "build", files)
    found = read("code", root, max_kb=2)
    assert [(document.name, document.text) for document in found] == [
        ("build/a.py", "x = 1\r\n"),
        ("build/b.rs", "fn main() {}\n"),
        ("build/latin.c", None),
    ]
    assert found[2].raw == b"// \xe9\n" and "not UTF-8: byte 0xe9 at 3" in found[2].problem
    assert texts("code", root, extensions=["txt"]) == ["no"]


def test_code_reads_task_sets(tmp_path: Path) -> None:
    human = data.to_jsonl(
        [{"task_id": "H/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": ""}]
    )
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(human.encode()))
    found = read("code", tmp_path / "HumanEval.jsonl.gz", layout="humaneval", loss="answer")
    assert found[0].text == "def f():\n    return 1\n" and masked(found[0]) == ["    return 1\n"]
    mbpp = {"task_id": 1, "text": "Write f.", "code": "def f():\r\n  pass", "test_list": ["assert f() is None"]}
    (tmp_path / "mbpp.jsonl").write_text(data.to_jsonl([mbpp]))
    found = read("code", tmp_path / "mbpp.jsonl", layout="mbpp", loss="answer")
    asked = "Problem: Write f.\nYour code should pass these tests:\nassert f() is None\nAnswer:"
    assert found[0].text == asked + "\ndef f():\n  pass" and masked(found[0]) == ["\ndef f():\n  pass"]


@pytest.mark.parametrize("unit_bytes", [1, 50, 1 << 20])
def test_apps_keeps_a_problem_whole(tmp_path: Path, unit_bytes: int) -> None:
    root = data.write_folder(tmp_path, data.APPS) / "APPS"
    found = read("code", root, layout="apps", solutions=2, unit_bytes=unit_bytes)
    assert [document.text for document in found] == [
        "Problem: Print twice.\nUse Standard Input format\nAnswer:\nprint(2)",
        "Problem: Print twice.\nUse Standard Input format\nAnswer:\nprint(1 + 1)",
        "Problem: Write f.\ndef f():\nUse Call-Based format\nAnswer:\ndef f():\n    return 1",
        None,
    ]
    assert found[3].problem == "no solutions"


LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "math": ("math", data.MATH, {"split": "all"}),
    "amps": ("amps", data.AMPS, {}),
    "m2d2": ("m2d2", data.M2D2, {}),
    "apps": ("code", data.APPS, {"layout": "apps"}),
    "code": ("code", {"a/b.py": "x", "a/c/d.js": "y", "../up.py": "z", "a/.git/h.py": "no"}, {}),
    "jsonl": ("jsonl", {"a/b.jsonl": data.to_jsonl([{"text": "é"}, {"text": "b"}])}, {}),
    "openqa": ("openqa", {"nq/NQ-open.train.jsonl": data.to_jsonl([{"question": "q", "answer": ["a", "b"]}])}, {}),
    "humaneval": (
        "code",
        {"human-eval/HumanEval.jsonl.gz": gzip.compress(b'{"task_id": "0", "prompt": "p", "canonical_solution": "s"}')},
        {"layout": "humaneval"},
    ),
    "packed": ("text", {"a/b.txt.gz": gzip.compress(b"b"), "a/c.txt.zst": zstandard.compress(b"c")}, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_archives_read_as_folders_do(tmp_path: Path, layout: str) -> None:
    kind, files, options = LAYOUTS[layout]
    within = {name.replace("../", ""): content for name, content in files.items()}
    expected = read(kind, data.write_folder(tmp_path / "folder", within), **options)
    expected = [document._replace(name=document.name.removeprefix("folder/")) for document in expected]
    assert expected and any(document.text for document in expected)
    for archive in data.write_archives(tmp_path, "packed", files):
        found = read(kind, archive, **options)
        assert sorted(found) == sorted(expected), archive
    assert not (tmp_path.parent / "up.py").exists()


LINES = ["", "short é", "x" * 300, "  ", "y" * 40, "end"]


@pytest.mark.parametrize("unit_bytes", [1, 2, 7, 64, 301, 350, 1 << 20])
@pytest.mark.parametrize("last", ["\n", ""])
def test_any_unit_size_gives_the_same_documents(tmp_path: Path, unit_bytes: int, last: str) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(LINES) + last)
    assert texts("text", tmp_path / "lines.txt", unit="line", unit_bytes=unit_bytes) == [
        line for line in LINES if line.strip()
    ]
    parts = "one\ntwo\n\n\nthree\n \nfour\n\n" + "z" * 90 + "\n\n\n\nfive" + last
    (tmp_path / "parts.txt").write_text(parts)
    expected = ["one\ntwo", "three", "four", "z" * 90, "five"]
    assert texts("text", tmp_path / "parts.txt", unit="paragraph", unit_bytes=unit_bytes) == expected
    records = [{"text": line, "id": n} for n, line in enumerate(LINES)]
    content = data.to_jsonl(records) if last else data.to_jsonl(records).removesuffix("\n")
    (tmp_path / "records.jsonl").write_text(content)
    found = read("jsonl", tmp_path / "records.jsonl", key="id", unit_bytes=unit_bytes)
    assert found == read("jsonl", tmp_path / "records.jsonl", key="id")
    assert [(document.text, document.key) for document in found] == [(line, str(n)) for n, line in enumerate(LINES)]


def test_small_files_are_grouped_and_large_ones_stand_alone(tmp_path: Path) -> None:
    files = {f"{n % 3}/{n:02d}.txt": f"text {n} " + "x" * n for n in range(30)} | {"1/zz.txt.gz": gzip.compress(b"z")}
    root = data.write_folder(tmp_path / "many", files)
    whole = read("text", root)
    assert len(build_source("text", [root], {}).units()) == 1 and len(whole) == 31
    for unit_bytes in (1, 20, 100, 333):
        assert read("text", root, unit_bytes=unit_bytes) == whole
    assert [document.name for document in whole] == sorted(document.name for document in whole)


def test_jsonl_takes_fields_of_your_naming(tmp_path: Path) -> None:
    record = {"q": "why", "a": "so", "body": "b", "pair": "p1"}
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + data.to_jsonl([record]).replace("\n", "\r\n").encode())
    assert read("jsonl", tmp_path / "a.jsonl", field="body", key="pair")[0][1:4] == ("b", None, "p1")
    found = read("jsonl", tmp_path / "a.jsonl", question="q", answer="a", loss="answer")
    assert found[0].text == "Problem: why\nAnswer: so" and masked(found[0]) == [" so"]
    assert texts("text", tmp_path / "a.jsonl", field="body") == ["b"]


@pytest.mark.parametrize("unit_bytes", [1, 1 << 20])
def test_parquet_reads_row_groups(tmp_path: Path, unit_bytes: int) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [f"row {n}" for n in range(600)] + [None], "id": list(range(601))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    found = read("parquet", tmp_path / "a.parquet", unit_bytes=unit_bytes, key="id")
    assert [document.text for document in found] == [*(f"row {n}" for n in range(600)), None]
    assert found[599].key == "599" and found[600].problem == "an empty cell"
    assert found[300].name == "a.parquet group 1 row 0"


def test_line_ends_and_byte_order_marks_stay(tmp_path: Path) -> None:
    root = data.write_folder(tmp_path / "in", {"a.txt": b"\xef\xbb\xbfone\r\ntwo\r\n", "b.txt": "zwei\n"})
    assert texts("text", root) == ["\ufeffone\r\ntwo\r\n", "zwei\n"]


def test_python_stdlib_reads_sources_and_reports_what_is_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.py", "a/c.py", "a/test/t.py", "site-packages/p.py", "__pycache__/q.py", "readme.txt"):
        data.write_folder(tmp_path, {name: name})
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    real = {document.name: document.text for document in read("python-stdlib")}
    assert real["json/decoder.py"] == (Path(sysconfig.get_path("stdlib")) / "json/decoder.py").read_bytes().decode()
    assert not any("test" in name.split("/") for name in real)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert [document[:2] for document in read("python-stdlib")] == [
        ("a/c.py", "a/c.py"),
        ("b.py", "b.py"),
        ("latin.py", None),
    ]
