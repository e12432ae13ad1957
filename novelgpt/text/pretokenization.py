"""How tokenizers that are trained here cut a text before its tokens are made, and the special tokens that they have."""

# Qwen's special tokens; ChatML is written with the last two.
QWEN_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen's pre-tokenization (the pattern in its tokenizer.json): each digit by itself, line ends behind punctuation.
QWEN_PRETOKENIZATION = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Quotation marks and title marks of Chinese text, simplified and traditional. A token that merges one with its
# neighbours hides where somebody begins or stops to speak.
QUOTATION_MARKS = "“”‘’「」『』《》〈〉"
