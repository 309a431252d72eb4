"""Text from tokens: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class AnswerText:
    """The text of an answer that is being written.

    Args:
        stops: Strings that end it, and are no part of it.
        trim: Whether white space at its beginning is left out.
    """

    def __init__(self, stops: Sequence[str], trim: bool = False) -> None:
        self._stops, self._trim = [stop for stop in stops if stop], trim
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, content: bytes) -> str:
        """Take the bytes of a token.

        Args:
            content: The bytes; a part of a character is held until the rest has come.

        Returns:
            What may be shown now; "" if that is nothing yet.
        """
        if self.stopped:
            return ""
        self._held += self._decoder.decode(content)
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._show(min(places))
        return self._show(len(self._held) - self._held_back())

    def finish(self) -> str:
        """Return the rest: what might have become a stop string, and did not."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", True)
        return self._show(len(self._held))

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string may begin with."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _show(self, size: int) -> str:
        shown, self._held = self._held[:size], self._held[size:]
        if self._trim:
            shown = shown.lstrip()
            self._trim = not shown
        self.text += shown
        return shown
