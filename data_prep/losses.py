"""Say what of the input was not kept, and refuse to go on where too much of it was lost."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.read import ReadRecord
from data_prep.recipe import Recipe, SourceRecipe
from data_prep.samples import DuplicateSummary
from kabrn_dist.utils.errors import UserError

# Reasons of removal that mean a loss, not a choice of the recipe.
_DAMAGE = ("binary", "encoding", "not Unicode", "unreadable")
_MAX_DAMAGED = 0.5
_SHOWN = 4
_FIELD_REMEDY = "; name the key that holds the text: --field KEY, or options: {field: KEY} in a recipe"


def check_readable(recipe: Recipe, records: Sequence[ReadRecord], expected: Sequence[str]) -> None:
    """Check that no source has another layout, or has lost more than `max_unreadable` allows, in documents or bytes.

    Args:
        recipe: the recipe.
        records: one record per source.
        expected: the layout that each source expects, in words.

    Raises:
        UserError: for the first source that does.
    """
    for source, record, layout in zip(recipe.sources, records, expected, strict=True):
        if record.mismatches and record.unreadable == record.documents:
            first = next((name for name in record.unreadable_names if ": found " in name), record.unreadable_names[0])
            remedy = _FIELD_REMEDY if "found no text under" in first else ""
            raise UserError(f"{first}; source {source.kind} expects {layout}{remedy}")
        limit, total = recipe.max_unreadable, record.bytes + record.lost_bytes
        if record.unreadable > limit * record.documents or record.lost_bytes > limit * total:
            raise UserError(
                f"source {source.name!r}: {record.unreadable} of {record.documents} documents cannot be read (first: "
                f"{record.unreadable_names[0]}), {_megabytes(record.lost_bytes)} of {_megabytes(total)}; repair or "
                f"remove them, or raise max_unreadable, which is {limit:g}, in a recipe"
            )
        if record.malformed > recipe.max_malformed * record.documents:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in record.removed.most_common(_SHOWN))
            raise UserError(
                f"source {source.name!r}: {record.malformed:,} of {record.documents:,} conversations are malformed "
                f"({reasons}; first: {record.malformed_names[0]}); repair or remove them, or raise max_malformed, "
                f"which is {recipe.max_malformed:g}, in a recipe"
            )
        damaged = sum(record.removed_bytes[reason] for reason in _DAMAGE)
        if damaged > _MAX_DAMAGED * record.bytes:
            raise UserError(
                f"source {source.name!r}: {_megabytes(damaged)} of {_megabytes(record.bytes)} are no UTF-8 text; "
                "convert the files to UTF-8, or give a recipe with clean.broken: repair"
            )
        if not record.clean_documents:
            raise UserError(
                f"source {source.name!r}: nothing to train on, as none of {record.documents:,} documents was kept"
                f"{_reasons(record)}; give files with text, or a recipe that removes less"
            )


def summarize_records(recipe: Recipe, records: Sequence[ReadRecord]) -> str:
    """Return one line per source: what was read, and what was removed or left out for which reason."""
    return "\n".join(_summary(source, record) for source, record in zip(recipe.sources, records, strict=True))


def describe_losses(recipe: Recipe, records: Sequence[ReadRecord]) -> str:
    """Return the lines of `summarize_records`, each with its end, of the sources of which not all was kept."""
    pairs = zip(recipe.sources, records, strict=True)
    return "".join(f"{_summary(source, record)}\n" for source, record in pairs if _has_losses(record))


def describe_duplicates(recipe: Recipe, duplicates: Sequence[DuplicateSummary]) -> str:
    """Return a line, with its end, for each source of which duplicates were dropped."""
    return "".join(
        f"{source.name}: dropped {dropped.exact:,} documents that equal another, {dropped.near:,} nearly\n"
        for source, dropped in zip(recipe.sources, duplicates, strict=True)
        if dropped.exact or dropped.near
    )


def _has_losses(record: ReadRecord) -> bool:
    # An empty file is no loss.
    removed = sum(count for reason, count in record.removed.items() if reason != "empty")
    return bool(removed or record.unreadable or record.left_out or record.stretches)


def _summary(source: SourceRecipe, record: ReadRecord) -> str:
    size = _megabytes(record.bytes + record.lost_bytes)
    line = f"{source.name}: {record.documents:,} documents, {size}; kept {record.clean_documents:,}{_reasons(record)}"
    if record.left_out:
        files = [f"{count:,} {reason}" for reason, count in record.left_out.most_common(_SHOWN)]
        rest = sum(record.left_out.values()) - sum(count for _, count in record.left_out.most_common(_SHOWN))
        line += f"; files not read: {', '.join(files)}{f', {rest:,} others' if rest else ''}"
    if record.stretches:
        line += f"; {record.stretches:,} of the documents are stretches of larger texts"
    return line


def _reasons(record: ReadRecord) -> str:
    """What was removed or could not be read, as the end of a clause; empty if nothing was."""
    reasons = [
        f"{count:,} {reason} ({_megabytes(record.removed_bytes[reason])})"
        for reason, count in sorted(record.removed.items())
    ]
    if record.unreadable:
        size = f", {_megabytes(record.lost_bytes)}" if record.lost_bytes else ""
        reasons.append(f"{record.unreadable:,} unreadable{size} (first: {record.unreadable_names[0]})")
    first = f" (first malformed: {record.malformed_names[0]})" if record.malformed else ""
    return f"; removed {', '.join(reasons)}{first}" if reasons else ""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size:,} bytes"
