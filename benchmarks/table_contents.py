"""Say what the tables and figures of the documents hold: which rows of which benchmark, and what they are called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.forgetting_results import forgetting_table
from benchmarks.quality_recipes import MODELS
from benchmarks.results import NOT_MEASURED, Results, format_number


class Line(NamedTuple):
    """One line of a table: a comparison of a benchmark.

    Attributes:
        label: what it is called in the document.
        row: a regular expression that matches the whole name of the benchmark's row.
    """

    label: str
    row: str


RETENTION_SAVED = "fp32 kept for backward a token, rival: torchscale"
MOE_SAVED = "8 experts top-2 fp32 kept for backward, rival: deepspeed dropless"
KAN_SAVED = "fp32 plain rational kept a token, rival: FastKAN"
ZERO = [
    Line("weights of one step, bf16 all-gather, 2 ranks", "P=2 weights of shards, rival: bf16 all-gather"),
    Line("weights of one step, bf16 all-gather, 4 ranks", "P=4 weights of shards, rival: bf16 all-gather"),
    *(
        Line(f"{what} in a step of {micro}, {way}, 2 ranks", f"P=2, {micro} a step, {what}, rival: {way}")
        for what, ways in (("sent", ("ZeRO 1", "ZeRO 2", "ZeRO 3")), ("time", ("ZeRO 1",)))
        for micro in ("1 micro-batch", "4 micro-batches")
        for way in ways
    ),
]
RETENTION = [
    *(
        Line(f"{dtype}, 8,192 tokens, {label}", f"{dtype} 8K, rival: {rival}")
        for dtype in ("fp32", "bf16")
        for label, rival in (
            ("softmax attention (SDPA)", "SDPA"),
            ("torchscale, its best chunk", "torchscale"),
            ("the matrix products alone", "bare products"),
        )
    ),
    Line("fp32, saved for backward a token, SDPA", "fp32 kept for backward a token, rival: SDPA"),
    Line("fp32, saved for backward a token, torchscale", RETENTION_SAVED),
    Line("fp32, a token at 65,536 tokens, at 4,096", "fp32 a token at 64K, rival: at 4K"),
    Line("fp32, decoding state after 100,000 tokens, after 100", "fp32 decoding state at 100,000, rival: at 100"),
    *(
        Line(
            f"sent by a rank of 4 with 64K tokens each ({way}), Ulysses",
            f"wire P=4 {way}, 64K tokens a rank, rival: Ulysses",
        )
        for way in ("ring", "allgather")
    ),
]
MOE = [
    *(
        Line(f"{dtype}, {label}", f"8 experts top-2 {dtype}, rival: {rival}")
        for dtype in ("fp32", "bf16")
        for label, rival in (
            ("one dense network of the same FLOPs", "dense"),
            ("deepspeed.moe, dropless", "deepspeed dropless"),
            ("transformers' Mixtral, grouped_mm", "transformers grouped_mm"),
            ("fairscale", "fairscale"),
        )
    ),
    Line("fp32, saved for backward, deepspeed.moe", MOE_SAVED),
]
KAN = [
    *(
        Line(f"{dtype}, {form}, a BitLinear MLP of the same products", f"{dtype} E=1 .*{form}, rival: BitLinear MLP")
        for dtype in ("fp32", "bf16")
        for form in ("rational", "chebyshev")
    ),
    Line("fp32, hat, a BitLinear MLP of equal FLOPs", r"fp32 E=1 .*hat, rival: BitLinear MLP of hidden width \d+"),
    Line("fp32, rational, FastKAN", "fp32 plain rational, rival: FastKAN"),
    Line("fp32, rational, saved a token, FastKAN", KAN_SAVED),
    Line("fp32, bspline, saved a token, FastKAN", "fp32 plain bspline kept a token, rival: FastKAN"),
]
BITLINEAR = [
    *(
        Line(f"{width}, {dtype}, {rival}", rf"cpu {width} {dtype} forward \+ backward, rival: {rival}")
        for width in (1024, 4096)
        for dtype in ("bf16", "fp32")
        for rival in ("nn.Linear", "AutoBitLinear", "torchao")
    ),
    Line(
        "saved for backward by a stack of 24 in bf16, fake-quantized", "bf16 kept for backward.*rival: fake-quanti.ed"
    ),
]
CHECKPOINT = [
    Line("save, a plain copy with fsync", r"save \(.*rival: plain copy with fsync.*"),
    Line("save, torch.distributed.checkpoint", r"save \(.*rival: torch.distributed.checkpoint save.*"),
    Line("load, hashes verified, a plain read", r"load, verified \(.*rival: plain read.*"),
    Line(
        "load, hashes verified, torch.distributed.checkpoint", r"load, verified \(.*rival: torch.distributed.*load .*"
    ),
    Line("training waits for a background save, the synchronous save", "stall of a save, rival: save"),
]
DATA_PREP = [
    Line("not cleaned, one core, tokenizers alone", "not cleaned, one core, rival: tokenizers alone"),
    Line("cleaned, one core, tokenizers alone", "cleaned, one core, rival: tokenizers alone"),
    Line("near duplicates too, one core, tokenizers alone", "near duplicates too, one core, rival: tokenizers alone"),
    Line("not cleaned, one core, datatrove", "not cleaned, one core, rival: datatrove"),
]
FRONT = [
    ("zero", Line("sent for the weights of a step, all-gather in bf16", ZERO[0].row)),
    ("zero", Line("sent in a step of 4 micro-batches, ZeRO 2", "P=2, 4 micro-batches a step, sent, rival: ZeRO 2")),
    ("zero", Line("sent in a step of 4 micro-batches, ZeRO 3", "P=2, 4 micro-batches a step, sent, rival: ZeRO 3")),
    ("retention", Line("sent by a rank with 64K of 128K tokens, Ulysses", "wire P=2 ring, 64K tokens.*: Ulysses")),
    ("retention", Line("saved for backward a token, torchscale's retention", RETENTION_SAVED)),
    ("bitlinear", Line("saved for backward by 24 ternary matrices, fake-quantized", BITLINEAR[-1].row)),
    ("kan", Line("saved for backward a token by a rational KAN expert, FastKAN", KAN_SAVED)),
    ("moe", Line("saved for backward, top-2 of 8 experts, deepspeed.moe", MOE_SAVED)),
    ("moe", Line("sent in a step of 2 ranks, deepspeed.moe", "P=2 int8 wire, rival: deepspeed dropless")),
    ("retention", Line("8,192 tokens in fp32, softmax attention (SDPA)", "fp32 8K, rival: SDPA")),
    ("bitlinear", Line("4,096² ternary matrix in bf16, nn.Linear", r"cpu 4096 bf16 forward \+ .*, rival: nn.Linear")),
]
# Units of times; all others are exact.
TIMES = {"ms", "µs", "s", "ms a MB"}
HEADER = "| what is measured, against what | ours | rival | unit | rival ÷ ours |\n|---|---:|---:|---|---:|\n"


def table_lines(results: Results, benchmark: str, lines: list[Line]) -> str:
    """Return comparisons as lines of Markdown, of a busy machine without times and what its shorter run left out."""
    text = ""
    for label, pattern in lines:
        row = results.row(benchmark, pattern)
        unit = row["unit"] if row else ""
        if results.is_busy(benchmark) and (row is None or unit in TIMES):
            continue
        figures = [format_number(results.figure(benchmark, pattern, field)) for field in ("ours", "rival", "ratio")]
        text += f"| {label} | {figures[0]} | {figures[1]} | {unit} | {figures[2]} |\n"
    return text


def compare_table(benchmark: str, lines: list[Line], results: Results) -> str:
    """Return a benchmark's table and the machine that it is from."""
    body = table_lines(results, benchmark, lines)
    return f"{HEADER}{body}\n{machine(benchmark, results)}" if body else machine(benchmark, results)


def machine(benchmark: str, results: Results) -> str:
    """Return a sentence on the machine of a benchmark's results."""
    about = results.report(benchmark)["machine"]
    if not about:
        return f"`benchmarks.{benchmark}`: {NOT_MEASURED}."
    features = about.get("features", "unknown")
    busy = " Times are left out, as the machine was busy: run it on a quiet one." if results.is_busy(benchmark) else ""
    return (
        f"`benchmarks.{benchmark}` on {about['cpu']} ({features}), {about['cores']} cores, torch {about['torch']}; "
        f"load {about['load']}.{busy}"
    )


def front_table(results: Results) -> str:
    """Return the README's choice of comparisons."""
    return HEADER + "".join(table_lines(results, benchmark, [line]) for benchmark, line in FRONT).rstrip("\n")


def quality_table(results: Results) -> str:
    """Return one line for each model of the quality benchmark."""
    lines = ["| | model | rate | nats a character | MB | active parameters |", "|---|---|---:|---:|---:|---:|"]
    for model, recipe in MODELS.items():
        one = results.quality.get(model)
        figures = (
            [f"{one.rate:g}", f"{one.nats:.3f}", f"{one.megabytes:.2f}", f"{one.active:,}"]
            if one
            else [NOT_MEASURED] * 4
        )
        lines.append(f"| ({model}) | {recipe.what} | {' | '.join(figures)} |")
    return "\n".join(lines)


def quality_nats(model: str, results: Results) -> str:
    """Return a model's loss."""
    one = results.quality.get(model)
    return f"{one.nats:.3f}" if one else NOT_MEASURED


def quality_share(model: str, results: Results) -> str:
    """Return a model's bytes as a part of the dense Transformer's."""
    one, dense = results.quality.get(model), results.quality.get("a")
    return f"{one.megabytes / dense.megabytes:.2f}" if one and dense else NOT_MEASURED


def quality_difference(model: str, other: str, results: Results) -> str:
    """Return the loss of a model less that of another, with its sign."""
    one, two = results.quality.get(model), results.quality.get(other)
    return f"{one.nats - two.nats:+.3f}".replace("-", "−") if one and two else NOT_MEASURED


def quality_seeds(results: Results) -> str:
    """Return over how many seeds the losses are means."""
    counts = {one.seeds for one in results.quality.values()}
    seeds = min(counts, default=0)
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def aims_table(benchmark: str, results: Results) -> str:
    """Return what a benchmark aims at and what it measured, of a busy machine without times, and the machine."""
    lines = ["| | measured | bound |", "|---|---:|---:|"]
    for what, aim in results.report(benchmark)["aims"].items():
        if results.is_busy(benchmark) and ": minutes " in what:
            continue
        lines.append(f"| {what} | {format_number(aim['measured'])} | {format_number(aim['aim'])} |")
    return "\n".join([*lines, "", machine(benchmark, results)] if len(lines) > 2 else [machine(benchmark, results)])


def figure(benchmark: str, row: str, field: str, results: Results) -> str:
    """Return one figure of a benchmark."""
    return format_number(results.figure(benchmark, row, field))


def demo(results: Results) -> str:
    """Return what `make demo` prints."""
    return f"```\n{results.text('demo.txt')}\n```"


TABLES: dict[str, Callable[[Results], str]] = {
    "front": front_table,
    "demo": demo,
    "quality": quality_table,
    "finetuning": partial(aims_table, "finetuning"),
    "forgetting": lambda results: forgetting_table(results.folder),
    **{
        name.replace("_", "-"): partial(compare_table, name, lines)
        for name, lines in {
            "retention": RETENTION,
            "moe": MOE,
            "kan": KAN,
            "bitlinear": BITLINEAR,
            "zero": ZERO,
            "checkpoint": CHECKPOINT,
            "data_prep": DATA_PREP,
        }.items()
    },
}
VALUES: dict[str, Callable[[Results], str]] = {
    **{f"nats-{model}": partial(quality_nats, model) for model in MODELS},
    **{f"bytes-{model}": partial(quality_share, model) for model in MODELS},
    "quality-seeds": quality_seeds,
    "d-less-a": partial(quality_difference, "d", "a"),
    "c-less-b": partial(quality_difference, "c", "b"),
    "d-less-c": partial(quality_difference, "d", "c"),
    "e-less-d": partial(quality_difference, "e", "d"),
    "f-less-d": partial(quality_difference, "f", "d"),
    "g-less-a": partial(quality_difference, "g", "a"),
    "d-less-g": partial(quality_difference, "d", "g"),
    "wire-weights": partial(figure, "zero", ZERO[0].row, "share"),
    "wire-zero1": partial(figure, "zero", "P=2, 1 micro-batch a step, sent, rival: ZeRO 1", "share"),
    "wire-zero2": partial(figure, "zero", "P=2, 4 micro-batches a step, sent, rival: ZeRO 2", "share"),
    "wire-zero3": partial(figure, "zero", "P=2, 4 micro-batches a step, sent, rival: ZeRO 3", "share"),
    "saved-bitlinear": partial(figure, "bitlinear", BITLINEAR[-1].row, "share"),
    "wire-dispatch": lambda results: format_number(results.aim("moe", "P=2: bytes of dispatch, int8 over bf16")),
}
