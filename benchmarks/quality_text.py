"""The text that quality is measured on: characters, the first 90 % to train on and the last 10 % to validate.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kabrn_dist.data.dataset import Batch

STDLIB = "stdlib"
TRAINED_ON = 0.9
# Of the standard library so much is taken, about as long as the plays that the figures in the README are from.
STDLIB_CHARACTERS = 1_100_000


@dataclass(frozen=True)
class Text:
    """Attributes:
    train, validation: int64 [N], numbers of characters in the alphabet of the whole text.
    alphabet: its characters, in the order of their numbers.
    """

    train: Tensor
    validation: Tensor
    alphabet: str

    @property
    def vocabulary(self) -> int:
        """Size of the alphabet."""
        return len(self.alphabet)

    def draw(self, generator: torch.Generator, rows: int, length: int) -> Batch:
        """Rows that begin anywhere in the training part."""
        starts = torch.randint(len(self.train) - length, (rows,), generator=generator)
        return make_batch(torch.stack([self.train[start : start + length + 1] for start in starts.tolist()]))

    def windows(self, rows: int, length: int, most: int) -> Iterator[Batch]:
        """The validation part cut into rows, up to `most` of them, evenly chosen; each character is a target once."""
        starts = range(0, len(self.validation) - length, length)
        chosen = [starts[i * len(starts) // min(most, len(starts))] for i in range(min(most, len(starts)))]
        for first in range(0, len(chosen), rows):
            part = chosen[first : first + rows]
            yield make_batch(torch.stack([self.validation[start : start + length + 1] for start in part]))


def read_text(source: str, length: int) -> Text:
    """A UTF-8 file, or the Python standard library.

    Raises:
        ValueError: where there is no such file, it is no text, or a part of it is shorter than one row of `length`.
    """
    try:
        text = read_library() if source == STDLIB else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {source}: cannot be read ({error}); name a UTF-8 text file, or {STDLIB}") from None
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([alphabet[character] for character in text], dtype=torch.int64)
    cut = int(TRAINED_ON * len(tokens))
    if len(tokens) - cut <= length:
        raise ValueError(
            f"--text {source}: its {len(tokens)} characters leave {len(tokens) - cut} to validate on, fewer than a row "
            f"of {length} and its last target; use a text of {10 * (length + 2)} characters or more"
        )
    return Text(tokens[:cut], tokens[cut:], "".join(alphabet))


def read_library() -> str:
    """Modules of the Python standard library, by name; only ASCII ones, for an alphabet of about 100."""
    parts, characters = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_bytes()
        if source.isascii() and characters < STDLIB_CHARACTERS:
            parts.append(source.decode("ascii"))
            characters += len(source)
    return "".join(parts)[:STDLIB_CHARACTERS]


def make_batch(streams: Tensor) -> Batch:
    """[B,T+1] characters → rows that are one document each."""
    tokens, targets = streams[:, :-1], streams[:, 1:]
    nothing = torch.zeros_like(tokens)
    return Batch(tokens, targets, nothing, torch.arange(tokens.shape[1]).expand_as(tokens), nothing[:, 0])
