"""Train a tokenizer on a corpus of any size.

    python -m dataset tokenizer CORPUS … OUT --kind byte_bpe --vocab_size 8000

CORPUS: text files in any format that pretraining reads, or folders made by `python -m dataset novels`, of which the
held-out books are not read. The same corpus, options and versions give the same tokenizer, byte for byte.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dataset.corpus import TRAIN, CorpusSource, find_sources
from dataset.tokenizers.agreement import measure_agreement
from dataset.tokenizers.byte_level import train_bytes
from dataset.tokenizers.characters import train_characters
from dataset.tokenizers.folder import as_pretrained, write_folder
from dataset.tokenizers.report import report_of, show_report
from dataset.tokenizers.sample import Sample, draw_sample
from dataset.tokenizers.subwords import train_subwords
from dataset.tokenizers.words import SEGMENTERS, Segmenter, load_segmenter, train_words
from novelgpt import __version__
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.atomic_files import new_output_folder
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.paths import from_home
from novelgpt.settings.terminal import say

# More than ten million hardly change a tokenizer, and cost time and memory in proportion.
SAMPLE_CHARACTERS, MOST_SAMPLE_CHARACTERS, REPORT_CHARACTERS = 10_000_000, 30_000_000, 1_000_000
# The most characters of a token, by kind. A hanzi counts as one; in byte-level BPE, so do three letters. Without it, a
# small corpus spends its vocabulary on formulas such as 且听下回分解.
MAX_TOKEN_LENGTH = {"byte_bpe": 4, "bpe": 8, "unigram": 8, "words": 16}
KINDS = {
    "byte_bpe": ("tokenizers",),
    "bpe": ("sentencepiece", "tokenizers"),
    "unigram": ("sentencepiece", "tokenizers"),
    "char": ("tokenizers",),
    "words": ("tokenizers", "jieba", "rjieba"),
}


def make_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(prog="python -m dataset tokenizer", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "corpus", nargs="+", metavar="CORPUS", help="text files, or folders made by `dataset novels`", type=from_home
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the tokenizer")
    parser.add_argument("--kind", required=True, choices=KINDS, help="byte_bpe is the usual choice")
    parser.add_argument("--vocab_size", required=True, type=int, help="exact number of tokens, including special ones")
    parser.add_argument("--text_column", default="text",
                        help="column or key of the text; several are joined by line ends: title,abstract "
                        "[default: text]")  # fmt: skip
    parser.add_argument("--sample_characters", type=int, default=SAMPLE_CHARACTERS,
                        help="maximum characters to train on, sampled from the whole corpus; up to 30000000 "
                        "[default: 10000000]")  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, help="of that sample [default: 42]")
    parser.add_argument("--max_token_length", type=int, metavar="CHARACTERS",
                        help="maximum characters per token; in byte_bpe, three letters count as one [default: 4 for "
                        "byte_bpe, 8 for bpe and unigram, 16 for words]")  # fmt: skip
    parser.add_argument("--segmenter", choices=SEGMENTERS, help="of words [default: jieba]")
    parser.add_argument("--compare", nargs="+", default=[], metavar="MODEL",
                        help="tokenizers to report beside it: folders or hub names")  # fmt: skip
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Train and report a tokenizer."""
    args = _parse(argv)
    segmenter = load_segmenter(args.segmenter) if args.kind == "words" else None
    compared = {name: load_tokenizer(ModelArguments(name)) for name in args.compare}
    sources = find_sources(args.corpus)
    with new_output_folder(args.out) as folder:
        sample = draw_sample(sources, args.text_column, args.sample_characters, _report_share(args), args.seed)
        say(
            f"{sample.characters:,} of {sample.corpus_characters:,} characters are trained on, "
            f"{sum(map(len, sample.report)):,} others reported on"
        )
        tokenizer = as_pretrained(train(args, sample.pieces, segmenter), args.kind)
        names = shown_names(args.out, list(compared))
        report = report_of(zip(names, (tokenizer, *compared.values()), strict=True), sample.report)
        if segmenter is not None:
            report["word_ends_f1"] = measure_agreement(tokenizer.backend_tokenizer, sample.report, segmenter)
        write_folder(folder, tokenizer, _record(args, sources, sample), report)
    show_report(report)
    say(f"train a model with it: --tokenizer_name {shlex.quote(str(args.out))}")


def train(args: Namespace, pieces: list[str], segmenter: Segmenter | None) -> Tokenizer:
    """Train a tokenizer of the kind that is asked for.

    Raises:
        UserError: the pieces give too few tokens, or the vocabulary has no room.
    """
    if args.kind == "byte_bpe":
        return train_bytes(pieces, args.vocab_size, args.max_token_length)
    if args.kind == "char":
        return train_characters(pieces, args.vocab_size)
    if segmenter is not None:
        return train_words(pieces, args.vocab_size, args.max_token_length, segmenter)
    return train_subwords(args.kind, pieces, args.vocab_size, args.max_token_length)


def shown_names(out: Path, compared: list[str]) -> list[str]:
    """Names to show, no two alike: the last part of a path, as long as that says which one is meant.

    Args:
        out: the folder of the new tokenizer, whose name comes first.
        compared: names of other tokenizers, no two alike.
    """
    names = [str(out), *compared]
    last = [Path(name).name or name for name in names]
    own, *others = (short if last.count(short) == 1 else name for short, name in zip(last, names, strict=True))
    return [f"{own} (new)" if own in others else own, *others]


def _parse(argv: list[str] | None) -> Namespace:
    args = make_parser().parse_args(argv)
    for name in ("vocab_size", "sample_characters", "max_token_length"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            raise UserError(f"--{name} {vars(args)[name]} is too small", "take at least 1")
    if args.sample_characters > MOST_SAMPLE_CHARACTERS:
        raise UserError(
            f"--sample_characters {args.sample_characters} is too large", f"take at most {MOST_SAMPLE_CHARACTERS}"
        )
    for name, kinds in (("segmenter", ("words",)), ("max_token_length", tuple(MAX_TOKEN_LENGTH))):
        if vars(args)[name] is not None and args.kind not in kinds:
            raise UserError(f"--{name} means nothing for --kind {args.kind}", "leave it out")
    args.segmenter = args.segmenter or "jieba"
    args.max_token_length = args.max_token_length or MAX_TOKEN_LENGTH.get(args.kind, 1)
    return args


def _report_share(args: Namespace) -> int:
    """Characters to report on: a tenth of those to train on, and at most a million."""
    return max(1, min(REPORT_CHARACTERS, args.sample_characters // 10))


def _record(args: Namespace, sources: list[CorpusSource], sample: Sample) -> dict[str, Any]:
    """How the tokenizer is made: nothing here depends on when or where."""
    files = [path for source in sources if source.split == TRAIN for path in source.files]
    libraries = (*KINDS[args.kind], *(["thulac"] if args.kind == "words" and args.segmenter == "thulac" else []))
    record: dict[str, Any] = {"kind": args.kind, "vocab_size": args.vocab_size}
    if args.kind in MAX_TOKEN_LENGTH:
        record["max_token_length"] = args.max_token_length
    if args.kind == "words":
        record["segmenter"] = args.segmenter
    return record | {
        "seed": args.seed,
        "sample_characters": args.sample_characters,
        "text_column": args.text_column,
        "corpus": {
            "files": [{"name": path.name, "bytes": path.stat().st_size} for path in files],
            "characters": sample.corpus_characters,
        },
        "sample": {"characters": sample.characters, "pieces": len(sample.pieces), "sha256": sample.sha256},
        "versions": {"novelgpt": __version__, **{name: version(name) for name in libraries}},
    }


if __name__ == "__main__":
    main()
