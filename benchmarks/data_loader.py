"""How many tokens a second does one process read, and how long does a training step wait for them?

Ours reads a shuffled mixture by byte offset; the rival is plain WebDataset streaming the same tars in their order, its
blocks cut into the same sequences. Both end in tokens and targets, int64 [B,T] tensors; ours also says where documents
begin. All files are in the page cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset
import yaml

from benchmarks.report import Report, measure, run
from data_prep.shards import TokenizedDocument, write_tar_shard
from kabrn_dist.data.corpus import open_folder_corpus
from kabrn_dist.data.dataset import Batch, TokenDataset
from kabrn_dist.data.index import Index, Shard, Source, Split, TokenizerInfo
from kabrn_dist.data.index_io import read_index, write_index
from kabrn_dist.data.tokenizer import Tokenizer

ROWS = 64
LENGTHS = (256, 2048)
TURN_TOKENS = 2_000_000
# What the issue aims at.
MOST_WAITING = 0.01
# A small model, as configs/tiny.yaml has it: a larger one waits less.
MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "layers": 4,
    "retention": {"num_heads": 4, "key_dim": 32, "value_dim": 32, "decay": [1.5, 7]},
    "experts": {
        "type": "rational",
        "num_experts": 8,
        "num_shared_experts": 1,
        "top_k": 2,
        "expert_hidden_size": 172,
        "function_groups": 4,
    },
}


def questions(report: Report, quick: bool) -> None:
    """Fill the report from a set of random tokens."""
    with tempfile.TemporaryDirectory() as folder:
        make_random_set(Path(folder), tokens=4_000_000 if quick else 40_000_000)
        reading(report, Path(folder), seconds=1.0 if quick else 4.0, rounds=2 if quick else 5)
        waiting(report, Path(folder), steps=12 if quick else 40)


def reading(report: Report, folder: Path, seconds: float, rounds: int) -> None:
    """Tokens a second of one process from the shard set in `folder`, ours beside WebDataset's."""
    for length in LENGTHS:
        batches = TokenDataset(open_folder_corpus(folder), "train", length, seed=1)
        # The rival reads a block of 65,536 tokens at a time: calls must be long enough to hold many of them.
        turns = -(-TURN_TOKENS // (ROWS * length))
        functions: dict[str, Callable[[], object]] = {
            "ours": partial(_take, shuffle_batches(batches), turns),
            "WebDataset": partial(_take, stream_batches(folder, length), turns),
        }
        times = measure(functions, seconds, rounds)
        tokens = turns * ROWS * length
        name = f"read, {ROWS} × {length}, µs a 1,000 tokens"
        report.compare(name, 1e9 * times["ours"] / tokens, 1e9 * times["WebDataset"] / tokens, "µs")
        speed = tokens / times["ours"]
        report.compare(f"read, {ROWS} × {length}, ours", speed / 1e6, "–", "million tokens/s")


def waiting(report: Report, folder: Path, steps: int) -> None:
    """The share of a training step that a real run in one process waits for its data."""
    with tempfile.TemporaryDirectory() as place:
        config = {
            "run": {"folder": f"{place}/run"},
            "data": {"path": str(folder), "sequence_length": 256},
            "model": {**MODEL, "vocab_size": read_index(folder).vocabulary},
            "optimizer": {"learning_rate": 1.0e-3},
            "training": {"steps": steps, "global_batch_size": 16, "micro_batch_size": 8},
            "validation": {"eval_interval": 0, "eval_sequences": 1},
            "checkpoint": {"save_interval": 0},
        }
        path = Path(place) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        root = Path(__file__).parent.parent
        command = [sys.executable, "launch/train.py", "--config", str(path)]
        alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        subprocess.run(command, cwd=root, env=alone, check=True, stdout=subprocess.DEVNULL)
        lines = map(json.loads, (Path(place) / "run" / "log.jsonl").read_text().splitlines())
        shares = [entry["speed/data_wait_share"] for entry in lines if "speed/data_wait_share" in entry]
    # The first steps open files and warm up.
    share = median(shares[2:])
    report.compare("share of a training step that waits for data", share, "–", "")
    report.at_most("share of a training step that waits for data", share, MOST_WAITING)


def shuffle_batches(batches: TokenDataset) -> Iterator[Batch]:
    """64 sequences at a time of the shuffled mixture, without end."""
    for first in count(0, ROWS):
        yield batches.get(range(first, first + ROWS))


def _take(batches: Iterator[object], turns: int) -> None:
    for _ in range(turns):
        next(batches)


def stream_batches(folder: Path, length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and targets [64,T] of the training tars as plain WebDataset streams them, over and over."""
    index = read_index(folder)
    paths = [str(folder / shard.name) for source in index.sources for shard in source.train.shards]
    dtype = "<u2" if index.dtype == "uint16" else "<u4"
    blocks = (np.frombuffer(sample["tok"], dtype) for sample in _endless(paths) if "tok" in sample)
    wanted, left = ROWS * length + 1, np.empty(0, dtype)
    while True:
        parts, have = [left], len(left)
        while have < wanted:
            parts.append(next(blocks))
            have += len(parts[-1])
        stream = np.concatenate(parts)
        tokens, targets = (stream[at : at + ROWS * length].astype(np.int64).reshape(ROWS, length) for at in (0, 1))
        yield torch.from_numpy(tokens), torch.from_numpy(targets)
        left = stream[ROWS * length :]


def _endless(paths: list[str]) -> Iterator[dict[str, Any]]:
    for path in cycle(paths):
        yield from webdataset.WebDataset([path], shardshuffle=False, empty_check=False)


def make_random_set(folder: Path, tokens: int) -> Index:
    """Write documents of random bytes: two sources of unequal weight, a quarter of the tokens masked."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, random = Tokenizer.of_bytes(), np.random.default_rng(0)
    tokenizer.save(folder / "tokenizer.json")
    sources = (
        _make_source(folder, "plain", tokens * 3 // 4, 2.0, False, random),
        _make_source(folder, "masked", tokens // 4, 1.0, True, random),
    )
    info = TokenizerInfo(kind="bytes", sha256=tokenizer.sha256)
    index = Index(dtype="uint16", vocabulary=257, document_token=256, tokenizer=info, recipe={}, sources=sources)
    return write_index(folder, index)


def _make_source(
    folder: Path, name: str, tokens: int, weight: float, masked: bool, random: np.random.Generator
) -> Source:
    splits = {}
    for split, share in (("train", tokens), ("validation", tokens // 20)):
        shards = [
            _make_shard(folder / f"{name}-{split}-{n:05d}.tar", min(share - at, 8_000_000), masked, random)
            for n, at in enumerate(range(0, share, 8_000_000))
        ]
        used = sum(each for _, each in shards)
        documents = sum(shard.documents for shard, _ in shards)
        total = sum(shard.tokens for shard, _ in shards)
        splits[split] = Split(
            shards=tuple(shard for shard, _ in shards),
            documents=documents,
            tokens=total,
            text_bytes=total - documents,
            loss_tokens=used,
        )
    train, validation = splits["train"], splits["validation"]
    return Source(
        name=name,
        kind="random",
        options={},
        weight=weight,
        epochs=None,
        masked=masked,
        train=train,
        validation=validation,
    )


def _make_shard(path: Path, tokens: int, masked: bool, random: np.random.Generator) -> tuple[Shard, int]:
    """The shard, and how many of its tokens carry loss."""
    used = 0

    def documents() -> Iterator[TokenizedDocument]:
        nonlocal used
        left = tokens
        while left:
            size = min(left, int(random.integers(100, 4000)))
            ids = random.integers(0, 256, size, np.uint16)
            ids[0] = 256
            use = random.random(size) < 0.5 if masked else None
            used += size if use is None else int(use.sum())
            left -= size
            yield TokenizedDocument(ids, use)

    return write_tar_shard(path, documents(), "uint16", masked), used


if __name__ == "__main__":
    run("Reading data", questions)
