"""Cleaning: what is done to a document, or why it is removed. Pure functions of the document and the settings.

The order of the stages is that of `pipeline.Cleaner`: encoding and Unicode, language, quality, repetition,
contamination. Near duplicates need the whole corpus: `near` gives keys of one document and joins those that meet.
"""
