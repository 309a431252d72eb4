"""Which documents are cleaned, and how: frozen sections, unknown keys refused, every field documented."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
LanguageCode = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class QualityLimits(Section):
    """Gopher's quality rules (Rae et al., arXiv 2112.11446, A1.1). The defaults are the published limits."""

    min_words: int = Field(50, ge=0, description="Fewest words of a document.")
    max_words: PositiveInt = Field(100_000, description="Most words of a document.")
    min_mean_word_length: float = Field(3.0, ge=0, description="Least mean length of a word in characters.")
    max_mean_word_length: float = Field(10.0, gt=0, description="Greatest mean length of a word in characters.")
    max_symbols_per_word: float = Field(0.1, ge=0, description="Most '#' a word, and most ellipses a word.")
    max_bullet_lines: Fraction = Field(0.9, description="Greatest share of lines that begin with a bullet.")
    max_ellipsis_lines: Fraction = Field(0.3, description="Greatest share of lines that end with an ellipsis.")
    min_letter_words: Fraction = Field(0.8, description="Least share of words with a letter in them.")
    min_stop_words: int = Field(
        2, ge=0, le=8, description="Fewest of the, be, to, of, and, that, have, with; only in texts tagged English."
    )

    @model_validator(mode="after")
    def _limits_in_order(self) -> QualityLimits:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}: no text passes")
        if self.min_mean_word_length > self.max_mean_word_length:
            raise ValueError(
                f"min_mean_word_length {self.min_mean_word_length} is above max_mean_word_length "
                f"{self.max_mean_word_length}: no text passes"
            )
        return self


class RepetitionLimits(Section):
    """Gopher's repetition rules (Rae et al., arXiv 2112.11446, table A1). The defaults are the published limits.

    Characters are those of words; blanks and line ends do not count.
    """

    max_line_share: Fraction = Field(0.30, description="Greatest share of lines that repeat an earlier line.")
    max_paragraph_share: Fraction = Field(0.30, description="Greatest share of paragraphs that repeat an earlier one.")
    max_line_characters: Fraction = Field(0.20, description="Greatest share of characters in repeated lines.")
    max_paragraph_characters: Fraction = Field(0.20, description="Greatest share of characters in repeated paragraphs.")
    max_top_2gram: Fraction = Field(0.20, description="Greatest share of characters in the most frequent word pair.")
    max_top_3gram: Fraction = Field(0.18, description="Greatest share of characters in the most frequent 3 words.")
    max_top_4gram: Fraction = Field(0.16, description="Greatest share of characters in the most frequent 4 words.")
    max_repeated_5gram: Fraction = Field(0.15, description="Greatest share of characters in repeated runs of 5 words.")
    max_repeated_6gram: Fraction = Field(0.14, description="The same for 6 words.")
    max_repeated_7gram: Fraction = Field(0.13, description="The same for 7 words.")
    max_repeated_8gram: Fraction = Field(0.12, description="The same for 8 words.")
    max_repeated_9gram: Fraction = Field(0.11, description="The same for 9 words.")
    max_repeated_10gram: Fraction = Field(0.10, description="The same for 10 words.")


class ContaminationConfig(Section):
    """Removal of documents that hold pieces of evaluation documents (as for GPT-3, arXiv 2005.14165, appendix C)."""

    paths: tuple[Path, ...] = Field((), description="Evaluation sets; empty: nothing is removed.")
    words: int = Field(13, ge=2, description="Words in a row that must agree; shorter evaluation texts match whole.")
    min_words: PositiveInt = Field(5, description="Evaluation texts shorter than this are not looked for.")
    max_share: float = Field(
        0.0, ge=0, lt=1, description="Greatest share of a document's words that evaluation sets may hold."
    )

    @model_validator(mode="after")
    def _short_is_short(self) -> ContaminationConfig:
        if self.min_words > self.words:
            raise ValueError(f"min_words {self.min_words} is above words {self.words}: give it at most {self.words}")
        return self


class CleaningConfig(Section):
    """How one source is cleaned. Each stage can be left out; `Clean.off()` leaves out all."""

    unicode: Literal["nfc", "off"] = Field("nfc", description="nfc: canonically composed characters.")
    control: bool = Field(
        True, description="Remove control characters but newline and tab, and byte order marks; end lines with \\n."
    )
    broken: Literal["repair", "refuse", "drop"] = Field(
        "repair",
        description="Bytes that are no UTF-8, and half surrogates: repaired (mojibake too), an error, or removed.",
    )
    tag: bool = Field(True, description="Find the language of each document.")
    language: tuple[LanguageCode, ...] = Field((), description="Languages to keep (ISO 639-1: en, de); empty: all.")
    min_probability: Fraction = Field(0.0, description="Least probability of the language found; needs `language`.")
    quality: Literal["gopher", "off"] = Field("gopher", description="Gopher's quality rules.")
    quality_limits: QualityLimits = Field(default_factory=QualityLimits, description="The limits of the quality rules.")
    repetition: Literal["gopher", "off"] = Field("gopher", description="Gopher's repetition rules.")
    repetition_limits: RepetitionLimits = Field(default_factory=RepetitionLimits, description="The limits of these.")
    contamination: ContaminationConfig = Field(
        default_factory=ContaminationConfig, description="Evaluation sets to keep out."
    )
    exact: bool = Field(True, description="Keep one of all documents of the corpus with the same text.")
    near: bool = Field(True, description="Keep one of all documents of the corpus with nearly the same text.")
    near_numbers: Literal["alike", "distinct"] = Field(
        "alike", description="Whether `near` takes all numbers as one; exercises that differ in numbers need distinct."
    )

    @model_validator(mode="after")
    def _languages_need_tags(self) -> CleaningConfig:
        if self.language and not self.tag:
            raise ValueError(f"language {', '.join(self.language)} is given and tag is false: set tag to true")
        if self.min_probability and not self.language:
            raise ValueError(f"min_probability {self.min_probability} is given without language: name the languages")
        return self

    @classmethod
    def off(cls) -> CleaningConfig:
        """Return the settings that give every document back as it is, and refuse what is no text."""
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
