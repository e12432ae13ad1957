"""Rows as training sees them, the trained tokens coloured.

    python -m dataset preview rows.jsonl
    python -m dataset preview rows.jsonl --model Qwen/Qwen3-0.6B --row p001 --borders
    python -m dataset preview prepared/ --html preview.html

Of conversations, the prompt is dim and the answer green; of text, the borders of documents are marked.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy
from transformers import PreTrainedTokenizerBase

from dataset.conversation_rows.sources import find_splits
from dataset.conversations import encode_rows
from dataset.instructions import load_instructions
from dataset.preview_page import Part, Shown, in_html, in_text
from dataset.readers import messages_of, read_conversation, read_source_rows, read_text_rows
from dataset.records import read_records
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ConversationArguments, ModelArguments
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.console import make_console
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.paths import TINY, from_home
from novelgpt.settings.terminal import counted, say
from novelgpt.text.encoding import document_end_id, encode_document
from novelgpt.text.packing import PackedBlocks, TokenizedText
from novelgpt.text.statistics import TokenCounts, row_spans, show_counts


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Show the first rows of a file, or one row."""
    words = _parse(argv)
    if words.model is None:
        say(f"no --model: in the tokens and the template of the small base ({TINY})")
    tokenizer = load_tokenizer(ModelArguments(words.model or TINY))
    reader = _blocks if _holds_text(words) else _conversations
    console = make_console()
    coloured = words.color == "always" or (words.color == "auto" and console.is_terminal and not console.no_color)
    total = TokenCounts()
    rows = []
    for shown in reader(words, tokenizer):
        _add(total, shown.counts)
        if words.html:
            rows.append(shown)
        else:
            print(in_text(shown, coloured, words.borders))  # noqa: T201 - visible but for its colours
    if not total.tokens_in:
        raise UserError(
            f"{words.file} has no row {words.row}" if words.row else f"{words.file} holds no row", "name another"
        )
    if words.html:
        try:
            words.html.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(words.html, in_html(rows, words.file.name, total, words.borders))
        except OSError as error:
            raise UserError(f"{words.html}: {error.strerror}", "name a page that can be written") from error
        say(f"  page   {words.html}")
    else:
        show_counts({"shown": total}, console if coloured else make_console(no_color=True))


def _parse(argv: list[str] | None) -> Namespace:
    parser = CommandParser(prog="python -m dataset preview", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="conversation rows, text, or a folder of prepared novels")
    parser.add_argument("--model", help="folder or hub name whose tokenizer and chat template are used "
                        "[default: tiny, the small base]")  # fmt: skip
    parser.add_argument("--rows", type=int, default=3, help="how many, from the first on [default: 3]")
    parser.add_argument("--row", help="the id of one row instead")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens of a row at most, as in training")
    parser.add_argument("--overlong", choices=("truncate", "split", "refuse"), default="truncate", help="see training")
    parser.add_argument("--instruction_templates", nargs="+", type=from_home, default=[], help="as in training")
    parser.add_argument("--instruction_seed", type=int, default=42, help="as in training")
    parser.add_argument("--wording", choices=("drawn", "first"), default="drawn", help="drawn: as rows to train on; "
                        "first: as rows to evaluate on")  # fmt: skip
    parser.add_argument("--text_column", default="text", help="field of the text, in files of text rows")
    parser.add_argument("--borders", action="store_true", help="show where tokens begin")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal")
    parser.add_argument("--html", type=Path, help="write a page instead, in one file")
    words = parser.parse_args(argv)
    if words.rows < 1 or words.max_length < 2:
        raise UserError("nothing to show", "take at least 1 of --rows and 2 of --max_length")
    return words


def _holds_text(words: Namespace) -> bool:
    """Whether the file holds text to continue pretraining on, not conversations; its first row tells."""
    if words.file.is_dir() or words.file.suffix.lower() == ".txt":
        return True
    where, record = next(read_records(words.file), (str(words.file), {}))
    if words.text_column not in record:
        return False
    try:
        messages_of(record, where, load_instructions(words.instruction_templates))
    except UserError:
        return not record.get("task")
    return False


def _conversations(words: Namespace, tokenizer: PreTrainedTokenizerBase) -> Iterator[Shown]:
    """One a row of the file; of a row that is split, or whose template rewrites earlier turns, one a piece."""
    data = ConversationArguments(max_length=words.max_length, overlong=words.overlong)
    instructions = load_instructions(words.instruction_templates, words.instruction_seed)
    if words.wording == "first":
        instructions = instructions.fixed()
    found = (row for row in read_source_rows(words.file) if words.row in (None, row.id))
    for row in islice(found, None if words.row else words.rows):
        kept, counts = encode_rows([read_conversation(row, instructions)], tokenizer, data)
        parts = []
        for number, piece in enumerate(kept, start=1):
            border = f"piece {number} of {len(kept)}" if len(kept) > 1 else ""
            spans = row_spans(piece.input_ids, piece.labels, tokenizer, by_token=words.borders)
            parts.append(Part(border, list(spans)))
        if counts.dropped:
            are = "is" if counts.dropped == 1 else "are"
            what = "cut here" if kept else "left out"
            parts.append(Part(f"✂ {what}: {counted(counts.dropped, 'token')} {are} not trained on", []))
        yield Shown(row.id, row.source, counts, parts)


def _blocks(words: Namespace, tokenizer: PreTrainedTokenizerBase) -> Iterator[Shown]:
    """The first blocks of a text, borders of documents marked."""
    end = document_end_id(tokenizer)
    names: list[str] = []
    documents: list[TokenizedText] = []
    wanted = words.rows * (words.max_length - 1) + 1
    for name, text in _documents(words):
        # A character is a token as a rule and hardly ever four: what no block shows is not tokenised.
        ids = encode_document(text[: 4 * wanted], tokenizer)
        documents.append(TokenizedText(numpy.array([*ids, end], numpy.int32)))
        names.append(name)
        wanted -= len(ids) + 1
        if wanted <= 0:
            break
    if not documents:
        return
    blocks = PackedBlocks(documents, words.max_length)
    for index in range(min(words.rows, len(blocks))):
        row, begin = blocks[index], int(blocks.spans[index][0])
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        inside = [int(start) - begin for start in blocks.starts if begin < start < begin + len(ids)]
        parts = []
        for low, high in zip([0, *inside], [*inside, len(ids)], strict=True):
            document = int(numpy.searchsorted(blocks.starts, begin + low, side="right")) - 1
            verb = "begins" if blocks.starts[document] == begin + low else "goes on"
            spans = list(row_spans(ids[low:high], labels[low:high], tokenizer, by_token=words.borders))
            parts.append(Part(f"document {document + 1} {verb}: {names[document]}", spans))
        counts = blocks.subset(range(index, index + 1)).counts()
        yield Shown(f"block {index + 1}", str(words.file), counts, parts)


def _documents(words: Namespace) -> Iterator[tuple[str, str]]:
    """(name, text) in order; neighbouring rows of one book are one document, as in training."""
    shards = find_splits(words.file)
    name, parts = "", list[str]()
    for file in shards["train"] or shards["held_out"]:
        for row in read_text_rows(file, words.text_column):
            if parts and (not row["book"] or row["book"] != name):
                yield name or file.name, "\n\n".join(parts)
                parts = []
            name = row["book"]
            parts.append(row["text"].strip("\n"))
    if parts:
        yield name or words.file.name, "\n\n".join(parts)


def _add(total: TokenCounts, counts: TokenCounts) -> None:
    total.rows += counts.rows
    total.tokens_in += counts.tokens_in
    total.trained += counts.trained
    total.context += counts.context
    total.dropped += counts.dropped
    total.lengths += counts.lengths
    total.notes.update(counts.notes)


if __name__ == "__main__":
    main()
