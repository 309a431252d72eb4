"""What `benchmarks/data_prep.py` times: recipes of ours, and the rivals, each in a process of its own.

As a program, `JOB FOLDER CORES`: does the job on cores such as "0,1" and prints last the seconds of it without imports,
the seconds of what else is not to be counted, and the tokens it has made.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer


def set_of(folder: Path, job: str) -> Path:
    """Where a job's result goes; the recipe, if it has one, lies beside it as .yaml."""
    return folder / job.replace(" ", "-")


def clear(folder: Path, job: str) -> None:
    """Forget an earlier turn: a finished set would not be made again."""
    shutil.rmtree(set_of(folder, job), ignore_errors=True)


def write_recipes(folder: Path, cleaning: Mapping[str, Mapping[str, object]], shard_mb: float) -> None:
    """A recipe for each way of cleaning `folder`/texts with `folder`/tokenizer.json. JSON is YAML."""
    for job, clean in cleaning.items():
        tree = {
            "out": str(set_of(folder, job)),
            "root": str(folder),
            "tokenizer": {"file": str(folder / "tokenizer.json")},
            "clean": clean,
            "sources": [{"name": "texts", "kind": "jsonl", "input": "texts"}],
            "shard_mb": shard_mb,
            # A document that is divided to hold out a stretch of it has other tokens around the cut.
            "validation_share": 0,
        }
        set_of(folder, job).with_suffix(".yaml").write_text(json.dumps(tree), encoding="utf-8")


def tokenizers_alone(folder: Path) -> Callable[[], int]:
    """Token ids of all texts, which are in memory, by the library's own threads. Returns how many there are."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # In batches of about a MB, as ours: all at once would measure the memory.
    batches: list[list[str]] = [[]]
    size = 0
    for path in sorted((folder / "texts").iterdir()):
        for line in path.read_text(encoding="utf-8").splitlines():
            batches[-1].append(json.loads(line)["text"])
            size += len(batches[-1][-1])
            if size > 1 << 20:
                batches.append([])
                size = 0

    def encode() -> int:
        count = 0
        for batch in batches:
            # The ids as Python has them, which any use of them needs.
            count += sum(len(found.ids) for found in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
        return count

    return encode


def datatrove(folder: Path, cores: int) -> Callable[[], int]:
    """Reader and tokeniser, a task a core, without its shuffle, which would write everything once more.

    Its defaults otherwise. Returns the number of tokens, of two bytes each.
    """
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    out = set_of(folder, "datatrove")
    tokenizer = DocumentTokenizer(
        str(out), tokenizer_name_or_path=str(folder / "tokenizer.json"), eos_token=None, shuffle_documents=False
    )
    steps = [JsonlReader(str(folder / "texts")), tokenizer]
    executor = LocalPipelineExecutor(pipeline=steps, tasks=cores, workers=cores, logging_dir=f"{out}/logs")

    def work() -> int:
        executor.run()
        return sum(path.stat().st_size for path in out.glob("*.ds")) // 2

    return work


def ours(folder: Path, job: str, workers: int) -> Callable[[], int]:
    """The whole command. Its other workers start within it, so that is part of the work."""
    from data_prep.__main__ import main
    from kabrn_dist.data.index_io import read_index

    out = set_of(folder, job)

    def work() -> int:
        code = main(["--recipe", str(out.with_suffix(".yaml")), "--workers", str(workers)])
        if code:
            raise RuntimeError(f"the command ended with {code}")
        index = read_index(out)
        # The rivals put no token between documents.
        return sum(index.tokens(split) - index.documents(split) for split in ("train", "validation"))

    return work


def main(arguments: Sequence[str]) -> int:
    """Run one job and print its seconds and tokens.

    Returns:
        The exit code.
    """
    job, folder, named = arguments
    cores = {int(core) for core in named.split(",")}
    os.sched_setaffinity(0, cores)
    began = time.perf_counter()
    if job == "tokenizers alone":
        do = tokenizers_alone(Path(folder))
    elif job == "datatrove":
        do = datatrove(Path(folder), len(cores))
    else:
        do = ours(Path(folder), job, len(cores))
    ready = time.perf_counter()
    tokens = do()
    work = time.perf_counter() - ready
    # Texts in memory are no part of what the tokenizer alone is asked for, nor of its start.
    prepared = ready - began if job == "tokenizers alone" else 0.0
    print(f"\n{work:.6f} {prepared:.6f} {tokens}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
