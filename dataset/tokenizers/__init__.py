"""Tokenizers trained on a corpus: `python -m dataset tokenizer`."""
