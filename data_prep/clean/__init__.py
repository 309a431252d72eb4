"""Clean or remove documents. All functions are pure functions of the document and the configuration.

`pipeline.Cleaner` runs the stages in this order: encoding and Unicode, language, quality, repetition, contamination.
Near duplicates need the whole corpus: `minhash` computes the keys of one document, and pairs documents by their keys.
"""
