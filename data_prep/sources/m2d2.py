"""M2D2: Massively Multi-domain Language Modeling (Reid et al., EMNLP 2022, arXiv:2210.07370).

Layout: `{domain}.tar.gz` holding `{domain}/train.txt`, `valid.txt` and `test.txt`, one text a line; one archive, a
folder of them, or unpacked folders (of which large files are cut between lines). Some official names are misspelt
(`General_referece`, `Human_activites`); both spellings are taken.

Licence: CC-BY-NC-4.0. What is trained on it is not for commercial use.
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
    """`domains`: empty takes all that are there."""

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
    """Texts of M2D2's domains, a document a line."""

    kind = "m2d2"
    expected = "{domain}.tar.gz with {domain}/train.txt, valid.txt and test.txt, or such folders"
    endings = (".txt",)
    license = "CC-BY-NC-4.0 (not for commercial use)"
    options_class = M2D2Options

    def file_filter(self) -> FileFilter:
        """Cut between lines; leave whole archives of other domains unread."""
        return super().file_filter()._replace(boundary=b"\n", accepts_archive=self._archive)

    def accepts(self, name: str) -> bool:
        """Take the files of the split and the domains that were asked for."""
        parts = name.split("/")
        splits = ("train", "valid", "test") if self.options.split == "all" else (self.options.split,)
        domain = official_name(parts[-2]) if len(parts) > 1 else ""
        return parts[-1] in {f"{split}.txt" for split in splits} and domain in (self.options.domains or (domain,))

    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Yield a document a line."""
        return parse_text_lines(member)

    def _archive(self, name: str) -> bool:
        stem = name.rpartition("/")[2]
        for ending in sorted(ARCHIVES, key=len, reverse=True):
            stem = stem.removesuffix(ending)
        domain = official_name(stem)
        return not self.options.domains or domain in self.options.domains or domain not in DOMAINS
