"""Render the report as one self-contained page without scripts and links. Texts from documents are escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #8884; }
td:first-child, th:first-child { text-align: left; }
.bar { display: inline-block; height: .8em; background: #4a86c7; border-radius: 2px; }
.left { opacity: .45; }
.special { border: 1px solid currentColor; border-radius: 3px; padding: 0 .2em; font-size: .85em; }
pre { white-space: pre-wrap; background: #8881; padding: .5rem; }
"""


def render_page(report: Mapping[str, Any]) -> str:
    """Return the HTML page of a report, the mapping that `data_prep.report` writes as JSON."""
    documents = report["documents"]
    body = [
        "<h1>Shards</h1>",
        f"<p>{documents['read']:,} documents were read. {documents['train']:,} are for training and "
        f"{documents['validation']:,} for validation, with a vocabulary of {report['vocabulary']:,} tokens. "
        f"The last run took {report['seconds']:,} s ({report['mb_per_second']:,} MB/s).</p>",
        "<h2>Training mix</h2>",
        _table(
            (
                "source",
                "share",
                "training tokens",
                "validation tokens",
                "tokens with loss",
                "tokens per byte",
                "shards",
            ),
            [
                (
                    stream["name"],
                    f"{stream['share']:.1%}",
                    *(f"{stream[key]:,}" for key in ("train_tokens", "validation_tokens", "loss_tokens")),
                    f"{stream['tokens_per_byte']:.3f}",
                    str(stream["shards"]),
                )
                for stream in report["streams"]
            ],
        ),
        "<h2>Sources</h2>",
        _table(
            ("source", "documents", "MB", "clean", "unreadable", "exact duplicates", "near duplicates", "license"),
            [
                (
                    source["name"],
                    f"{source['documents']:,}",
                    f"{source['bytes'] / 1e6:,.1f}",
                    *(f"{source[key]:,}" for key in ("clean_documents", "unreadable", "exact_duplicates")),
                    f"{source['near_duplicates']:,}",
                    source["license"] or "–",
                )
                for source in report["sources"]
            ],
        ),
        *(part for name, documents in report["learned_samples"].items() for part in _learned(name, documents)),
        *(part for source in report["sources"] for part in _source(source)),
    ]
    head = f"<meta charset=utf-8><title>Shards</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _source(source: Mapping[str, Any]) -> Iterable[str]:
    yield f"<h2>{escape(source['name'])}</h2>"
    if source["removed"]:
        yield "<h3>Removed documents by reason</h3>" + _bars(source["removed"])
    if source["languages"]:
        yield "<h3>Languages</h3>" + _bars(dict(list(source["languages"].items())[:12]))
    sizes = {_size(int(power)): count for power, count in source["lengths"].items()}
    yield "<h3>Clean documents by size</h3>" + _bars(sizes)
    for reason, samples in source["removed_samples"].items():
        yield f"<details><summary>samples of removed documents: {escape(reason)}</summary>"
        for name, beginning, detail in samples:
            yield f"<p>{escape(name)} {escape(detail)}</p><pre>{escape(beginning)}</pre>"
        yield "</details>"
    for kind in ("malformed", "unreadable"):
        if source[f"{kind}_names"]:
            names = "\n".join(escape(name) for name in source[f"{kind}_names"])
            yield f"<details><summary>{kind}</summary><pre>{names}</pre></details>"


def _learned(name: str, documents: Sequence[Sequence[tuple[str, bool, bool]]]) -> Iterable[str]:
    """Documents as they are trained on: what carries no loss is grey, special tokens have a frame."""
    yield f"<h2>What is learned of {escape(name)}</h2><p>Grey is read but not learned; special tokens have a frame.</p>"
    for pieces in documents:
        yield "<pre>"
        for text, learned, special in pieces:
            classes = " ".join(["learned" if learned else "left", *(["special"] if special else [])])
            yield f'<span class="{classes}">{escape(text)}</span>'
        yield "</pre>"


def _bars(counts: Mapping[str, int]) -> str:
    largest = max(counts.values(), default=1)
    rows = (
        f"<tr><td>{escape(name)}</td><td>{count:,}</td>"
        f'<td style="text-align:left"><span class=bar style="width:{20 * count / largest:.2f}em"></span></td></tr>'
        for name, count in counts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _size(power: int) -> str:
    """Name the range of 2^(n−1) to 2^n − 1 bytes for readers."""
    start = 1 << max(0, power - 1)
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if start >= unit:
            return f"from {start // unit} {name}"
    return f"from {start} bytes"
