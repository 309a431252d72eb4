"""M2D2: Massively Multi-domain Language Modeling (Reid et al., EMNLP 2022, arXiv:2210.07370).

Layout: `{domain}.tar.gz` with `{domain}/train.txt`, `valid.txt` and `test.txt`, one text per line; one
archive, a folder of archives, or unpacked folders, whose large files are divided between lines. Some official names are
misspelled (`General_referece`, `Human_activites`); both spellings are accepted.

License: CC-BY-NC-4.0. Models trained on it must not be used commercially.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Literal

from pydantic import field_validator

from data_prep.documents import Document
from data_prep.sources.archive import Member
from data_prep.sources.base import FileSource, SourceOptions
from data_prep.sources.files import ARCHIVES, FileFilter
from data_prep.sources.layout import LayoutMismatch
from data_prep.sources.m2d2_domains import DOMAINS, official_name
from data_prep.sources.text import parse_text_lines


class M2D2Options(SourceOptions):
    """Options of M2D2.

    Attributes:
        split: the split.
        domains: domains to read; empty: all.
    """

    split: Literal["train", "valid", "test", "all"] = "train"
    domains: tuple[str, ...] = ()

    @field_validator("domains")
    @classmethod
    def _known(cls, domains: tuple[str, ...]) -> tuple[str, ...]:
        for domain in domains:
            if official_name(domain) not in DOMAINS:
                near = difflib.get_close_matches(domain, DOMAINS, 3, 0.5)
                raise ValueError(f"no domain {domain!r}; near are {', '.join(near) or 'none'}, such as cs.CL or Art")
        return tuple(map(official_name, domains))


class M2D2(FileSource):
    """Texts of M2D2's domains, one document per line."""

    kind = "m2d2"
    expected = "{domain}.tar.gz with {domain}/train.txt, valid.txt and test.txt, or such folders"
    endings = (".txt",)
    license = "CC-BY-NC-4.0 (not for commercial use)"
    options_class = M2D2Options

    def file_filter(self) -> FileFilter:
        """Return which files to read; they may be cut between lines, and archives of other domains are not opened."""
        return super().file_filter()._replace(boundary=b"\n", accepts_archive=self._archive)

    def accepts(self, name: str) -> bool:
        """Accept the files of the selected split and domains."""
        parts = name.split("/")
        splits = ("train", "valid", "test") if self.options.split == "all" else (self.options.split,)
        domain = official_name(parts[-2]) if len(parts) > 1 else ""
        return parts[-1] in {f"{split}.txt" for split in splits} and domain in (self.options.domains or (domain,))

    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Yield one document per line."""
        return parse_text_lines(member)

    def _archive(self, name: str) -> bool:
        stem = name.rpartition("/")[2]
        for ending in sorted(ARCHIVES, key=len, reverse=True):
            stem = stem.removesuffix(ending)
        domain = official_name(stem)
        return not self.options.domains or domain in self.options.domains or domain not in DOMAINS
