"""Which documents are cleaned, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from kabrn_dist.utils.yaml_section import ConfigSection

Proportion = Annotated[float, Field(ge=0, le=1)]
LanguageCode = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]


class QualityLimits(ConfigSection):
    """Limits of Gopher's quality rules (Rae et al., arXiv 2112.11446, A1.1). The defaults are the published ones."""

    min_words: int = Field(50, ge=0, description="Smallest number of words in a document.")
    max_words: PositiveInt = Field(100_000, description="Largest number of words in a document.")
    min_mean_word_length: float = Field(3.0, ge=0, description="Smallest mean length of a word in characters.")
    max_mean_word_length: float = Field(10.0, gt=0, description="Largest mean length of a word in characters.")
    max_symbols_per_word: float = Field(0.1, ge=0, description="Largest number of '#', and of ellipses, per word.")
    max_bullet_lines: Proportion = Field(0.9, description="Largest fraction of lines that begin with a bullet.")
    max_ellipsis_lines: Proportion = Field(0.3, description="Largest fraction of lines that end with an ellipsis.")
    min_letter_words: Proportion = Field(0.8, description="Smallest fraction of words that contain a letter.")
    min_stop_words: int = Field(
        2,
        ge=0,
        le=8,
        description="Smallest number of the words the, be, to, of, and, that, have, with; only in English texts.",
    )

    @model_validator(mode="after")
    def _check_order(self) -> QualityLimits:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}: no text passes")
        if self.min_mean_word_length > self.max_mean_word_length:
            raise ValueError(
                f"min_mean_word_length {self.min_mean_word_length} is above max_mean_word_length "
                f"{self.max_mean_word_length}: no text passes"
            )
        return self


class RepetitionLimits(ConfigSection):
    """Limits of Gopher's repetition rules (Rae et al., arXiv 2112.11446, table A1), with the published defaults.

    Characters are those of words; whitespace does not count.
    """

    max_line_share: Proportion = Field(0.30, description="Largest fraction of lines that repeat an earlier line.")
    max_paragraph_share: Proportion = Field(0.30, description="Largest fraction of paragraphs that repeat another.")
    max_line_characters: Proportion = Field(0.20, description="Largest fraction of characters in repeated lines.")
    max_paragraph_characters: Proportion = Field(
        0.20, description="Largest fraction of characters in repeated paragraphs."
    )
    max_top_2gram: Proportion = Field(0.20, description="Largest fraction of characters in the most frequent 2-gram.")
    max_top_3gram: Proportion = Field(0.18, description="Largest fraction of characters in the most frequent 3-gram.")
    max_top_4gram: Proportion = Field(0.16, description="Largest fraction of characters in the most frequent 4-gram.")
    max_repeated_5gram: Proportion = Field(0.15, description="Largest fraction of characters in repeated 5-grams.")
    max_repeated_6gram: Proportion = Field(0.14, description="Largest fraction of characters in repeated 6-grams.")
    max_repeated_7gram: Proportion = Field(0.13, description="Largest fraction of characters in repeated 7-grams.")
    max_repeated_8gram: Proportion = Field(0.12, description="Largest fraction of characters in repeated 8-grams.")
    max_repeated_9gram: Proportion = Field(0.11, description="Largest fraction of characters in repeated 9-grams.")
    max_repeated_10gram: Proportion = Field(0.10, description="Largest fraction of characters in repeated 10-grams.")


class ContaminationConfig(ConfigSection):
    """Removal of documents that contain text of evaluation sets (as for GPT-3, arXiv 2005.14165, appendix C)."""

    paths: tuple[Path, ...] = Field((), description="Evaluation sets; empty: nothing is removed.")
    words: int = Field(13, ge=2, description="Length of the n-grams that must match; shorter texts match as a whole.")
    min_words: PositiveInt = Field(5, description="Evaluation texts with fewer words are not searched for.")
    max_share: float = Field(
        0.0, ge=0, lt=1, description="Largest fraction of a document's words that may match evaluation sets."
    )

    @model_validator(mode="after")
    def _check_order(self) -> ContaminationConfig:
        if self.min_words > self.words:
            raise ValueError(f"min_words {self.min_words} is above words {self.words}: give it at most {self.words}")
        return self


class CleaningConfig(ConfigSection):
    """How the documents of one source are cleaned. Every stage can be switched off; `off()` switches off all."""

    unicode: Literal["nfc", "off"] = Field("nfc", description="nfc: canonically composed characters.")
    control: bool = Field(
        True,
        description="Remove control characters other than newline and tab, and byte order marks; end lines with \\n.",
    )
    broken: Literal["repair", "refuse", "drop"] = Field(
        "repair",
        description="What to do about bytes that are not UTF-8, and half surrogates: repair (also mojibake), stop with "
        "an error, or drop the document.",
    )
    tag: bool = Field(True, description="Identify the language of each document.")
    language: tuple[LanguageCode, ...] = Field((), description="Languages to keep (ISO 639-1: en, de); empty: all.")
    min_probability: Proportion = Field(0.0, description="Smallest probability of the language; needs `language`.")
    quality: Literal["gopher", "off"] = Field("gopher", description="Gopher's quality rules.")
    quality_limits: QualityLimits = Field(default_factory=QualityLimits, description="Limits of the quality rules.")
    repetition: Literal["gopher", "off"] = Field("gopher", description="Gopher's repetition rules.")
    repetition_limits: RepetitionLimits = Field(
        default_factory=RepetitionLimits, description="Limits of the repetition rules."
    )
    contamination: ContaminationConfig = Field(
        default_factory=ContaminationConfig, description="Evaluation sets to keep out."
    )
    exact: bool = Field(True, description="Keep one of all documents with the same text.")
    near: bool = Field(True, description="Keep one of all documents with nearly the same text.")
    near_numbers: Literal["alike", "distinct"] = Field(
        "alike",
        description="Whether `near` treats all numbers as equal; exercises that differ only in numbers need distinct.",
    )

    @model_validator(mode="after")
    def _check_language(self) -> CleaningConfig:
        if self.language and not self.tag:
            raise ValueError(f"language {', '.join(self.language)} is given and tag is false: set tag to true")
        if self.min_probability and not self.language:
            raise ValueError(f"min_probability {self.min_probability} is given without language: name the languages")
        return self

    @classmethod
    def off(cls) -> CleaningConfig:
        """Return the configuration that changes no document and refuses what is not text."""
        return cls(
            unicode="off",
            control=False,
            broken="refuse",
            tag=False,
            quality="off",
            repetition="off",
            exact=False,
            near=False,
        )
