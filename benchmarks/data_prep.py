"""How fast do texts become shards, on one core and on two, and how long does training wait for them?

Ours is all that `python -m data_prep` does: read, clean, drop duplicates, tokenise, shard, index. The rivals are
datatrove's tokenisation pipeline (it reads, tokenises and writes; it neither cleans nor drops nor shuffles) and Hugging
Face's `tokenizers` alone on the same texts in memory. Each is a process of its own, on as many cores as are named.
Rates are without its start, which is imports; rows "with start" have all. Starting a second process counts as work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks import data_loader
from benchmarks.data_prep_rivals import clear, set_of, write_recipes
from benchmarks.report import Report, run
from data_prep.train_tokenizer import train_tokenizer
from kabrn_dist.data.index_io import read_index

NOTHING: dict[str, object] = {
    **{"unicode": "off", "control": False, "broken": "drop", "tag": False},
    **{"quality": "off", "repetition": "off", "near": False},
}
# Rules for prose would remove code. All drop exact duplicates, of which the corpus has none.
CLEANING: dict[str, dict[str, object]] = {
    "not cleaned": NOTHING,
    "cleaned": {**NOTHING, "unicode": "nfc", "control": True, "broken": "repair"},
    "near duplicates too": {**NOTHING, "unicode": "nfc", "control": True, "broken": "repair", "near": True},
}
ALONE, TROVE = "tokenizers alone", "datatrove"
JOBS = (*CLEANING, ALONE, TROVE)
# A shard is what workers share out: one of the usual 64 MB would take all of this corpus.
SHARD_MB = {True: 0.5, False: 4.0}
ROOT = Path(__file__).parent.parent
FILES = 16
FASTER, SHARE, SCALING = 1.0, 0.7, 1.8


class Time(NamedTuple):
    """Seconds of a process: all of it, and what is left without its start."""

    whole: float
    work: float


Times = dict[tuple[str, int], Time]


def questions(report: Report, quick: bool) -> None:
    """Fill the report: preparation of a corpus, then reading what it wrote."""
    place = Path(os.environ.get("BENCH_FOLDER", ROOT / "runs"))
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix="bench-data-") as name:
        folder = Path(name)
        count, size = make_corpus(folder / "texts", 1_500_000 if quick else 100_000_000)
        make_tokenizer(folder, 2048 if quick else 16384)
        write_recipes(folder, CLEANING, SHARD_MB[quick])
        times = take_times(folder)
        compare(report, times, size / 1e6)
        aims(report, times)
        kept = read_index(set_of(folder, "near duplicates too"))
        documents = kept.documents("train") + kept.documents("validation")
        report.compare("near duplicates too: documents kept, rival: read", documents, count, "")
        shards = set_of(folder, "not cleaned")
        data_loader.reading(report, shards, seconds=0.5 if quick else 4.0, rounds=2 if quick else 5)
        data_loader.waiting(report, shards, steps=8 if quick else 40)


def make_corpus(folder: Path, size: int) -> tuple[int, int]:
    """Write Python's library as .jsonl, over and over; return documents and bytes of text.

    The first copy is as it is. In the others the end of each file is that of another: no two documents are the same,
    and few are nearly.
    """
    folder.mkdir(parents=True)
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]
    halves = [_halve(path.read_text(encoding="utf-8", errors="replace")) for path in paths]
    lines: list[list[str]] = [[] for _ in range(FILES)]
    written = count = 0
    while written < size:
        copy, number = divmod(count, len(halves))
        text = f"# {count}\n{halves[number][0]}{halves[(number + 37 * copy) % len(halves)][1]}"
        lines[count % FILES].append(json.dumps({"text": text}) + "\n")
        written += len(text.encode())
        count += 1
    for number, content in enumerate(lines):
        (folder / f"{number:02d}.jsonl").write_text("".join(content), encoding="utf-8")
    return count, written


def _halve(text: str) -> tuple[str, str]:
    lines = text.splitlines(keepends=True)
    middle = len(lines) // 2
    return "".join(lines[:middle]), "".join(lines[middle:])


def make_tokenizer(folder: Path, vocabulary: int) -> None:
    """Train the tokenizer that all rivals use, outside of what is timed."""
    first = (folder / "texts" / "00.jsonl").read_text(encoding="utf-8").splitlines()
    train_tokenizer((json.loads(line)["text"] for line in first), vocabulary).save(folder / "tokenizer.json")


def take_times(folder: Path) -> Times:
    """Each job that can run, on one core and, where there are two, on both.

    Raises RuntimeError when rivals have not made the same tokens of the same texts.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    jobs = [job for job in JOBS if job != TROVE or find_spec("datatrove") is not None]
    times: Times = {}
    tokens: dict[tuple[str, int], int] = {}
    for job in jobs:
        for count in range(1, len(cores) + 1):
            tokens[job, count], times[job, count] = take_time(folder, job, cores[:count])
    alike = {key: number for key, number in tokens.items() if key[0] in ("not cleaned", ALONE, TROVE)}
    if len(set(alike.values())) > 1:
        raise RuntimeError(f"the rivals have not done the same work: tokens {alike}")
    return times


def take_time(folder: Path, job: str, cores: list[int]) -> tuple[int, Time]:
    """One turn in a process that may use `cores` only: how many tokens it made, and its seconds.

    The process tells its start from its work: the difference to another's start would be mostly noise.
    """
    clear(folder, job)
    count = len(cores)
    threads = str(count if job == ALONE else 1)
    command = [sys.executable, "-m", "benchmarks.data_prep_rivals", job, str(folder), ",".join(map(str, cores))]
    environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
    began = time.perf_counter()
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    whole = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{job} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    work, prepared, tokens = done.stdout.split()[-3:]
    return int(tokens), Time(whole - float(prepared), float(work))


def compare(report: Report, times: Times, megabytes: float) -> None:
    """Every kind of ours against every rival; milliseconds, as the ratios of rows are of times."""
    scale = 1e3 / megabytes
    for kind in CLEANING:
        for cores in sorted({cores for _, cores in times}):
            here, ours = f"{kind}, {_cores(cores)}", times[kind, cores]
            for rival in (ALONE, TROVE):
                other = times.get((rival, cores))
                work = other.work * scale if other else f"missing: {rival}"
                report.compare(f"{here}, rival: {rival}", ours.work * scale, work, "ms a MB")
            trove = times.get((TROVE, cores))
            whole = trove.whole * scale if trove else f"missing: {TROVE}"
            report.compare(f"{here}, with start, rival: {TROVE}", ours.whole * scale, whole, "ms a MB")
            # A rate: here below 1 means that ours is faster.
            rates = [megabytes / each.work / cores if each else None for each in (ours, trove)]
            rate = f"missing: {TROVE}" if rates[1] is None else rates[1]
            report.compare(f"{here}, rate, rival: {TROVE}", rates[0], rate, "MB/s a core")
    first, second = times["not cleaned", 1], times.get((TROVE, 1))
    start = second.whole - second.work if second else f"missing: {TROVE}"
    report.compare(f"start, rival: {TROVE}", first.whole - first.work, start, "s")


def aims(report: Report, times: Times) -> None:
    """Add the aims: speed against both rivals, and scaling to two workers."""
    trove, alone = times.get((TROVE, 1)), times[ALONE, 1]
    for kind in CLEANING:
        one, two = times[kind, 1], times.get((kind, 2))
        report.at_least(f"{kind}, one core: times as fast as datatrove", trove and trove.work / one.work, FASTER)
        report.at_least(f"{kind}, one core: share of the tokenizer's rate", alone.work / one.work, SHARE)
        report.at_least(f"{kind}: two workers over one", two and one.work / two.work, SCALING)


def _cores(count: int) -> str:
    return "one core" if count == 1 else "two cores"


if __name__ == "__main__":
    run("Data preparation", questions)
