"""Tokenizer, conversations to tokens and labels, packing, the collator."""
