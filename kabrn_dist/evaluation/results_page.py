"""Results as one self-contained page without scripts and links. Whatever a model or a data set wrote is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from kabrn_dist.evaluation.answering import ExampleResult
from kabrn_dist.evaluation.result_file import RESULTS_BYTES_LIMIT
from kabrn_dist.utils.safe_open import read_plain

PAGE_NAME = "index.html"
SHOWN_SAMPLES = 5
SHOWN_GROUPS = 60
# Of a prompt its end is shown: the question comes after the few-shot examples.
SHOWN_PROMPT, SHOWN_OUTPUT = 4000, 2000
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
.scores td:nth-child(2), .scores th:nth-child(2) { text-align: left; }
.scores td:nth-child(-n+2) { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
.scores td:first-child .small { display: block; }
.bar { display: inline-block; height: .8em; background: #4a86c7; border-radius: 2px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .5rem; margin: .3rem 0; }
p, summary { overflow-wrap: anywhere; }
.sample { border-left: 4px solid #8886; padding-left: .8rem; margin: 1.2rem 0; }
.right { border-color: #3a9d5d; } .wrong { border-color: #c4554d; }
.small { opacity: .75; font-size: .9em; }
"""


class ShownSamples(NamedTuple):
    """Examples of a task to look at.

    Attributes:
        right: Whose main score is 1, or the lowest and highest ones if it is not of that kind.
        wrong: Whose main score is less; none if it is not of that kind.
        is_accuracy: Whether the main score says right or wrong.
        num_right: Number of those like `right` that there are.
        num_wrong: Number of those like `wrong`.
    """

    right: list[ExampleResult]
    wrong: list[ExampleResult]
    is_accuracy: bool
    num_right: int = 0
    num_wrong: int = 0


def read_samples(path: Path, task: Mapping[str, Any]) -> ShownSamples:
    """Choose examples from a file of results, in its order, which no score has decided.

    Args:
        path: The file; none of it is shown if it is not there any more.
        task: The task's part of results.json.
    """
    if not path.is_file():
        return ShownSamples([], [], True)
    lines = read_plain(path, RESULTS_BYTES_LIMIT, follow_links=True).splitlines()[1:]
    results = [ExampleResult.from_json(json.loads(line)) for line in lines]
    metric = task["main_metric"]
    if not all(0 <= result.scores.get(metric, -1.0) <= 1 for result in results):
        return ShownSamples(results[:SHOWN_SAMPLES], [], False, len(results))
    right = [result for result in results if result.scores[metric] >= 1]
    wrong = [result for result in results if result.scores[metric] < 1]
    return ShownSamples(right[:SHOWN_SAMPLES], wrong[:SHOWN_SAMPLES], True, len(right), len(wrong))


def render_results_page(summary: Mapping[str, Any], samples: Mapping[str, ShownSamples]) -> str:
    """Return the page.

    Args:
        summary: What results.json holds.
        samples: Task → examples to show.
    """
    model, tasks = summary["model"], summary["tasks"]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    title = f"Evaluation of {escape(model['name'])}"
    body = [
        f"<h1>{title}</h1>",
        f"<p>{escape(model['path'])}; fingerprint of weights and tokenizer: {escape(model['fingerprint'][:16])}; "
        f"{escape(versions)}</p>",
        _table([row for name, task in tasks.items() for row in _score_rows(name, task)]),
        "<p class=small>Accuracies are fractions of 1. ↓: lower is better. A score within two standard errors of "
        "another is not a difference. ≤ and ≥: where all answers are wrong, or right, how far the score may yet be "
        "from that, with 95 % confidence.</p>",
        *(part for name, task in tasks.items() for part in _task_parts(name, task, samples[name])),
    ]
    view = '<meta name=viewport content="width=device-width, initial-scale=1">'
    head = f"<meta charset=utf-8>{view}<title>{title}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def format_score(value: float | None) -> str:
    """Return a score, or its error, as tables show it."""
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def format_metric(name: str) -> str:
    """Return the name of a metric as tables show it."""
    return f"{name} ↓" if is_lower_better(name) else name


def is_lower_better(metric: str) -> bool:
    """Return whether less is better: of losses, and of comparisons without an end."""
    return metric.startswith(("bits_per_", "nats_per_", "perplexity")) or metric.endswith("_unfinished")


def describe_limit(limit: float, value: float) -> str:
    """Return the 95 % limit of a score of 0 or 1 as tables show it."""
    return f"{'≥' if value else '≤'} {format_score(limit)}"


def _format_error(score: Mapping[str, Any]) -> str:
    return describe_limit(score["limit_95"], score["value"]) if "limit_95" in score else format_score(score["stderr"])


def _score_rows(name: str, task: Mapping[str, Any]) -> Iterable[str]:
    settings, metrics = task["settings"], task["scores"]
    facts = f"{task['n']:,} of {task['n_split']:,} examples ({settings['split']}), {settings['shots']}-shot"
    facts += f", {task['date']}" if "date" in task else ""
    for number, (metric, score) in enumerate(metrics.items()):
        head = f"<td rowspan={len(metrics)}>{escape(name)}<span class=small>{escape(facts)}</span></td>"
        cells = (format_metric(metric), format_score(score["value"]), _format_error(score))
        yield f"<tr>{'' if number else head}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _task_parts(name: str, task: Mapping[str, Any], samples: ShownSamples) -> Iterable[str]:
    yield f"<h2>{escape(name)}</h2><p>{escape(task['description'])}</p>"
    if task["notes"]:
        yield f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in task['notes'])}</ul>"
    for kind, groups in task["groups"].items():
        yield f"<h3>By {escape(kind)}</h3>{_group_bars(task['main_metric'], groups)}"
    if samples.is_accuracy:
        parts = [
            ("wrong", "Wrong answers", samples.wrong, samples.num_wrong),
            ("right", "Right answers", samples.right, samples.num_right),
        ]
    else:
        parts = [("", "Examples", samples.right, samples.num_right)]
    for kind, title, results, count in parts:
        if results:
            inside = "".join(_sample(kind, result) for result in results)
            yield f"<details><summary>{title}: {len(results)} of {count:,} shown</summary>{inside}</details>"


def _group_bars(metric: str, groups: Mapping[str, Any]) -> str:
    shown = list(groups.items())[:SHOWN_GROUPS]
    values = {group: each["scores"].get(metric, {"value": None, "stderr": None}) for group, each in shown}
    largest = max([1.0, *(score["value"] or 0.0 for score in values.values())])
    rows = (
        f"<tr><td>{escape(group)}</td><td>{each['n']:,}</td>"
        f"<td>{_show_score(values[group])}</td>"
        f'<td style="text-align:left"><span class=bar style="width:{_bar_width(values[group], largest):.2f}em"></span>'
        "</td></tr>"
        for group, each in shown
    )
    more = (
        f"<p class=small>{len(groups) - len(shown)} more are in results.json.</p>" if len(groups) > len(shown) else ""
    )
    head = f"<tr><th></th><th>examples</th><th>{escape(format_metric(metric))}</th><th></th></tr>"
    return f"<div class=wide><table>{head}{''.join(rows)}</table></div>{more}"


def _show_score(score: Mapping[str, Any]) -> str:
    error = _format_error(score)
    return f"{format_score(score['value'])} {f'({error})' if 'limit_95' in score else f'± {error}'}"


def _bar_width(score: Mapping[str, Any], largest: float) -> float:
    return 12 * max(0.0, score["value"] or 0.0) / largest


def _sample(kind: str, result: ExampleResult) -> str:
    scores = ", ".join(f"{metric} {score:g}" for metric, score in result.scores.items())
    groups = ", ".join(f"{name}: {group}" for name, group in result.groups.items())
    reason = f"; {result.reason}" if result.reason else ""
    prompt = result.prompts[0] if result.prompts else ""
    parts = [
        f"<p><b>{escape(result.id)}</b> {escape(groups)}<br><span class=small>{escape(scores + reason)}</span></p>",
        _block("asked", f"…{prompt[-SHOWN_PROMPT:]}" if len(prompt) > SHOWN_PROMPT else prompt),
        *(_block("answered", _show_output(output)) for output in result.outputs),
        *(_block("expected", _cut(text)) for text in result.expected),
    ]
    return f'<div class="sample {kind}">{"".join(parts)}</div>'


def _show_output(output: Any) -> str:
    if isinstance(output, list):
        first = output[0]
        more = f" (the first of {len(output)})" if len(output) > 1 else ""
        text = _cut(first["text"]) if first["text"].strip() else "(nothing)"
        return f"{text}\n— {first['num_tokens']} tokens, ended by {first['finish_reason']}{more}"
    if "continuation" in output:
        per_byte = output["logprob"] / max(1, output["num_bytes"])
        return f"{_cut(output['continuation'])}\n— log p {output['logprob']:.3f}, {per_byte:.4f} a byte"
    return f"{output['nats']:.2f} nats for {output['num_tokens']:,} tokens of {output['num_bytes']:,} bytes"


def _cut(text: str) -> str:
    return f"{text[:SHOWN_OUTPUT]}…" if len(text) > SHOWN_OUTPUT else text


def _block(label: str, text: str) -> str:
    return f"<div class=small>{label}</div><pre>{escape(text)}</pre>"


def _table(rows: Iterable[str]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in ("task", "metric", "score", "± stderr"))
    return f'<div class="wide scores"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
