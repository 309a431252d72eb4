"""Code: trees of source files, and the task sets HumanEval, MBPP and APPS, selected by `layout`.

- `tree`: one document per file, selected by extension. Vendored and built folders, minified and generated files,
  binaries and files above `max_kb` are left out on purpose: they are counted, but are no problems.
- `humaneval` (Chen et al. 2021, arXiv:2107.03374; MIT): .jsonl(.gz) with `task_id`, `prompt`, `canonical_solution`;
  the text is prompt and solution as one piece of code, which a model is asked to continue.
- `mbpp` (Austin et al. 2021, arXiv:2108.07732; CC BY 4.0): .jsonl with `text`, `code`, `test_list`; the question is
  the text with its tests, which are the only place that names the function.
- `apps` (Hendrycks et al. 2021, arXiv:2105.09938; MIT): `{train,test}/<id>/` with `question.txt`, `solutions.json`
  and, if functions are called, `starter_code.py`; see apps.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import model_validator

from data_prep.documents import Document
from data_prep.sources.apps import parse_problems
from data_prep.sources.archive import Member, read_content
from data_prep.sources.base import FileSource, SourceOptions, read_json_lines
from data_prep.sources.decode import decode_document, make_document, make_spans
from data_prep.sources.files import FileFilter, reject_archives
from data_prep.sources.layout import LayoutMismatch, describe_record
from data_prep.sources.template import LossTarget, render_question

_LANGUAGES = """
.py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .js .jsx .ts .tsx .go .rs .rb .php .swift .cs .m .jl .r .R
.lua .pl .pm .sh .bash .sql .hs .ml .mli .ex .exs .erl .clj .lisp .el .f90 .f .pas .v .sv .vhd .asm .s .cmake .proto
"""
_EXTENSIONS = tuple(_LANGUAGES.split())
_VENDORED_NAMES = """
node_modules bower_components vendor vendored third_party thirdparty site-packages dist-packages __pycache__ venv env
build dist target Pods
"""
_VENDORED = frozenset(_VENDORED_NAMES.split())
_MINIFIED = (".min.js", ".bundle.js", "_pb2.py", ".pb.go", ".min.css")
# Files with longer lines are minified, or data in the form of code.
_MAX_MEAN_LINE = 200
_MAX_LINE = 5000
_JSONL = ("humaneval", "mbpp")


class CodeOptions(SourceOptions):
    """Options of code.

    Attributes:
        layout: layout of the files.
        extensions: extensions of the files to read; empty: those of common languages.
        max_kb: largest file, in KiB.
        split: split of APPS.
        solutions: number of solutions per problem of APPS.
        loss: what carries loss.
    """

    layout: Literal["tree", "humaneval", "mbpp", "apps"] = "tree"
    extensions: tuple[str, ...] = ()
    max_kb: int = 1024
    split: Literal["train", "test", "all"] = "train"
    solutions: int = 1
    loss: LossTarget = "all"

    @model_validator(mode="after")
    def _fits(self) -> CodeOptions:
        if self.loss == "answer" and self.layout == "tree":
            raise ValueError("loss: answer needs a layout with questions (humaneval, mbpp, apps)")
        if self.max_kb < 1 or self.solutions < 1:
            raise ValueError("max_kb and solutions must be at least 1")
        return self


class Code(FileSource):
    """Source files, or programming tasks with solutions."""

    kind = "code"
    expected = (
        "source files, or with layout: humaneval|mbpp|apps .jsonl with 'prompt' and 'canonical_solution' | "
        ".jsonl with 'text' and 'code' | {train,test}/<id>/question.txt and solutions.json"
    )
    license = "HumanEval and APPS MIT, MBPP CC-BY-4.0; of other code that of its files"
    options_class = CodeOptions
    endings = ()

    def file_filter(self) -> FileFilter:
        """Return which files belong to the layout; the files of an APPS problem stay in one unit."""
        layout = self.options.layout
        if layout in _JSONL:
            return FileFilter((".jsonl",), self.accepts)
        if layout == "apps":
            return FileFilter((".txt", ".json", ".py"), self.accepts, group_key=_parent_folder)
        dotted = tuple("." + extension.lstrip(".") for extension in self.options.extensions)
        return FileFilter(
            dotted or _EXTENSIONS, self.accepts, accepts_archive=reject_archives, skipped_folders=_VENDORED
        )

    def accepts(self, name: str) -> bool:
        """Reject vendored and generated files, and other splits of APPS."""
        parts = name.split("/")
        if self.options.layout == "apps":
            in_split = self.options.split == "all" or (len(parts) >= 3 and parts[-3] == self.options.split)
            return in_split and parts[-1] in ("question.txt", "solutions.json", "starter_code.py")
        return self.options.layout in _JSONL or (_VENDORED.isdisjoint(parts[1:-1]) and not name.endswith(_MINIFIED))

    def parse_members(self, members: Iterator[Member]) -> Iterator[Document | LayoutMismatch]:
        """Yield the documents of a unit's files."""
        if self.options.layout == "apps":
            return parse_problems(members, self.options.solutions, self.options.loss)
        return super().parse_members(members)

    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Yield the documents of one file."""
        if self.options.layout == "tree":
            yield from self._source_file(member)
            return
        for item in read_json_lines(member):
            if isinstance(item, Document | LayoutMismatch):
                yield item
            else:
                yield (_humaneval if self.options.layout == "humaneval" else _mbpp)(*item, self.options.loss)

    def _source_file(self, member: Member) -> Iterator[Document]:
        data = read_content(member)
        if isinstance(data, Document):
            yield data
        elif len(data) > self.options.max_kb << 10:
            self.left_out[f"above max_kb {self.options.max_kb}"] += 1
        elif b"\0" in data or _is_generated(data):
            self.left_out["that are binary, minified or generated"] += 1
        else:
            yield decode_document(member.name, data)


def _is_generated(data: bytes) -> bool:
    count = data.count(b"\n") + 1
    return len(data) / count > _MAX_MEAN_LINE or max(map(len, data.split(b"\n"))) > _MAX_LINE


def _humaneval(name: str, record: dict[str, object], loss: LossTarget) -> Document | LayoutMismatch:
    prompt, solution = record.get("prompt"), record.get("canonical_solution")
    if not isinstance(prompt, str) or not isinstance(solution, str):
        return LayoutMismatch(name, describe_record(record))
    text = prompt + solution
    return make_document(name, text, spans=make_spans(len(prompt), text, loss == "answer"))


def _mbpp(name: str, record: dict[str, object], loss: LossTarget) -> Document | LayoutMismatch:
    # The sanitized release calls the question "prompt".
    question, code, tests = record.get("text", record.get("prompt")), record.get("code"), record.get("test_list", [])
    if not isinstance(question, str) or not isinstance(code, str) or not isinstance(tests, list):
        return LayoutMismatch(name, describe_record(record))
    full_question = "\n".join(
        [question.strip(), "Your code should pass these tests:", *map(str, tests)] if tests else [question]
    )
    return render_question(name, full_question, code.replace("\r\n", "\n"), loss, gap="\n")


def _parent_folder(name: str) -> str:
    return name.rpartition("/")[0]
