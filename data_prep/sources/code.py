"""Code: trees of source files, and the task sets HumanEval, MBPP and APPS (`layout` says which).

- `tree`: a document a file, by its extension. Left out are vendored and built folders, minified and generated files,
  binaries and files above `max_kb`; these are choices of the source and not counted as problems.
- `humaneval` (Chen et al. 2021, arXiv:2107.03374; MIT): .jsonl(.gz) with `task_id`, `prompt`, `canonical_solution`;
  the text is the prompt and the solution as one piece of code, as a model is asked to continue it.
- `mbpp` (Austin et al. 2021, arXiv:2108.07732; CC BY 4.0): .jsonl with `text`, `code`, `test_list`; the question is
  the text with its tests, which alone name the function that is wanted.
- `apps` (Hendrycks et al. 2021, arXiv:2105.09938; MIT): `{train,test}/<id>/` with `question.txt`, `solutions.json`
  and `starter_code.py` where functions are called; see apps.py.
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
_OTHERS = """
node_modules bower_components vendor vendored third_party thirdparty site-packages dist-packages __pycache__ venv env
build dist target Pods
"""
_VENDORED = frozenset(_OTHERS.split())
_MINIFIED = (".min.js", ".bundle.js", "_pb2.py", ".pb.go", ".min.css")
# No one writes lines like this: minified, or data in the shape of code.
_LINE_MEAN = 200
_LINE_MOST = 5000
_JSONL = ("humaneval", "mbpp")


class CodeOptions(SourceOptions):
    """`extensions` empty: a list of common languages. `split` and `solutions` (how many a problem) are for APPS."""

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
        """Return the files of the layout; APPS problems stay whole."""
        layout = self.options.layout
        if layout in _JSONL:
            return FileFilter((".jsonl",), self.accepts)
        if layout == "apps":
            return FileFilter((".txt", ".json", ".py"), self.accepts, group_key=_folder)
        dotted = tuple("." + extension.lstrip(".") for extension in self.options.extensions)
        return FileFilter(
            dotted or _EXTENSIONS, self.accepts, accepts_archive=reject_archives, skipped_folders=_VENDORED
        )

    def accepts(self, name: str) -> bool:
        """Leave out vendored and generated files; take the split of APPS."""
        parts = name.split("/")
        if self.options.layout == "apps":
            right = self.options.split == "all" or (len(parts) >= 3 and parts[-3] == self.options.split)
            return right and parts[-1] in ("question.txt", "solutions.json", "starter_code.py")
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
        elif len(data) <= self.options.max_kb << 10 and b"\0" not in data and not _machine_made(data):
            yield decode_document(member.name, data)


def _machine_made(data: bytes) -> bool:
    count = data.count(b"\n") + 1
    return len(data) / count > _LINE_MEAN or max(map(len, data.split(b"\n"))) > _LINE_MOST


def _humaneval(name: str, record: dict[str, object], loss: LossTarget) -> Document | LayoutMismatch:
    prompt, solution = record.get("prompt"), record.get("canonical_solution")
    if not isinstance(prompt, str) or not isinstance(solution, str):
        return LayoutMismatch(name, describe_record(record))
    text = prompt + solution
    return make_document(name, text, spans=make_spans(len(prompt), text, loss == "answer"))


def _mbpp(name: str, record: dict[str, object], loss: LossTarget) -> Document | LayoutMismatch:
    # The hand-checked release calls the question "prompt".
    question, code, tests = record.get("text", record.get("prompt")), record.get("code"), record.get("test_list", [])
    if not isinstance(question, str) or not isinstance(code, str) or not isinstance(tests, list):
        return LayoutMismatch(name, describe_record(record))
    asked = "\n".join(
        [question.strip(), "Your code should pass these tests:", *map(str, tests)] if tests else [question]
    )
    return render_question(name, asked, code.replace("\r\n", "\n"), loss, gap="\n")


def _folder(name: str) -> str:
    return name.rpartition("/")[0]
