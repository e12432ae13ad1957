"""Prints a digest of a tokenizer of each kind, trained in this process."""

import hashlib

from novelgpt.settings.terminal import say
from tests.dataset.tokenizers.trained import SIZES, sample_pieces, trained

if __name__ == "__main__":
    pieces = sample_pieces()[:150]
    for kind in SIZES:
        text = trained(kind, pieces, 600).to_str()
        say(f"{kind} {hashlib.sha256(text.encode()).hexdigest()}")
