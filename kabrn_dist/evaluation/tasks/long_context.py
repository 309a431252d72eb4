"""Bits per byte by position in long documents: whether a model profits from what it read long before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from kabrn_dist.evaluation.requests import Answer, Request, TextRequest
from kabrn_dist.evaluation.task import Example, Task
from kabrn_dist.evaluation.tasks.perplexity import only_text_score, uniform_losses
from kabrn_dist.evaluation.texts import TEXT_LAYOUT, TEXT_SPLITS, SourceText, describe_left_out, read_texts
from kabrn_dist.utils.errors import UserError

# First position of each range; the next one ends it.
_STARTS = (0, *(1 << power for power in range(8, 17)))
# Of two ranges.
_LEAST_BYTES = 512
_BETWEEN_TEXTS = "\n\n"


class LongContext(Task):
    """Texts joined to documents of equal length, each scored as a whole with its state carried.

    A position is the number of UTF-8 bytes before a token, so that models with different tokenizers are compared at
    the same places; with a tokenizer of bytes it is the number of tokens. Metric `bits_per_byte_4096_8191` is
    of positions 4,096 to 8,191. If the loss does not fall from range to range, the model makes no use of distant text.

    Texts of one source are joined in the order of the files. What is left of a source after its last whole document is
    left out, unless it is all there is.

    Args:
        length: Bytes of a document.
    """

    name = "long_context"
    description = "bits per byte by position in documents of up to 65,536 bytes; by source"
    published = "your own texts"
    layout = TEXT_LAYOUT
    splits = TEXT_SPLITS
    main_metric = "bits_per_byte"

    def __init__(self, length: int = 1 << 16) -> None:
        self._length = length

    def load(self, path: Path, split: str) -> list[Example]:
        """Join the texts of a split to documents.

        Raises:
            UserError: if there are none, or a file is damaged.
        """
        texts = read_texts(path, split)
        examples = [
            Example(f"{source}/{number}", {"text": text}, {"source": source})
            for source in dict.fromkeys(each.source for each in texts)
            for number, text in enumerate(_join([each for each in texts if each.source == source], self._length), 1)
        ]
        longest = max(len(each.record["text"].encode()) for each in examples)
        if longest < _LEAST_BYTES:
            raise UserError(
                f"{path}: {longest} bytes of text in split {split} have no positions to compare; give --data at least "
                f"{_LEAST_BYTES} bytes of one source"
            )
        return examples

    def describe_left_out(self, path: Path) -> str:
        """Return how many .jsonl files in a folder hold no texts."""
        return describe_left_out(path)

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """Return the document."""
        return [TextRequest(example.record["text"])]

    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        """Return the document's sums by range of positions beside its bits per byte."""
        score = only_text_score(answers)
        positions = np.cumsum(score.num_bytes) - score.num_bytes
        ranges = np.searchsorted(_STARTS, positions, "right") - 1
        nats = np.bincount(ranges, score.nats, len(_STARTS))
        count = np.bincount(ranges, score.num_bytes, len(_STARTS))
        sums: dict[str, float] = {}
        for number in np.flatnonzero(np.bincount(ranges, minlength=len(_STARTS))).tolist():
            sums |= {f"nats_{number}": float(nats[number]), f"bytes_{number}": float(count[number])}
        return {"bits_per_byte": _bits_per_byte([sums], range(len(_STARTS))), **sums}

    def combine(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return quotients of sums over documents, of all positions and of each range that some document has."""
        ranges = [number for number in range(len(_STARTS)) if any(f"bytes_{number}" in each for each in scores)]
        return {
            "bits_per_byte": _bits_per_byte(scores, ranges),
            **{_name_range(number): _bits_per_byte(scores, [number]) for number in ranges},
        }

    def gold_answers(self, example: Example) -> list[Answer]:
        """Return the losses of a model that is certain of each byte, and right: 0 bits per byte."""
        return [uniform_losses(example.record["text"], 0.0)]

    def empty_answers(self, example: Example) -> list[Answer]:
        """Return the losses of a model that finds all bytes alike: 8 bits per byte."""
        return [uniform_losses(example.record["text"], math.log(256))]


def _name_range(number: int) -> str:
    start = _STARTS[number]
    return f"bits_per_byte_{start}_{_STARTS[number + 1] - 1}" if number + 1 < len(_STARTS) else f"bits_per_byte_{start}"


def _bits_per_byte(sums: Sequence[Mapping[str, float]], ranges: Sequence[int]) -> float:
    nats, count = (
        math.fsum(each.get(f"{name}_{number}", 0.0) for each in sums for number in ranges) for name in ("nats", "bytes")
    )
    return nats / math.log(2) / max(1.0, count)


def _join(texts: Sequence[SourceText], length: int) -> Iterator[str]:
    content = _BETWEEN_TEXTS.join(each.text for each in texts).encode()
    start = 0
    while start < len(content) and (start == 0 or len(content) - start >= length):
        stop = start + length
        # A character is not divided.
        while stop < len(content) and content[stop] & 0xC0 == 0x80:
            stop -= 1
        yield content[start:stop].decode()
        start = stop
