"""Show rows as training sees them, the trained tokens in colour.

    python -m dataset preview rows.jsonl
    python -m dataset preview rows.jsonl --model Qwen/Qwen3-0.6B --row p001 --borders
    python -m dataset preview prepared/ --html preview.html
    python -m dataset preview hf://OWNER/NAME --columns prompt=question,response=answer

In conversations, the prompt is dim and the answer green, behind its weight where that is not 1; preference rows show
both answers; in text, the boundaries of documents are marked.
"""

from __future__ import annotations

import itertools
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from transformers import PreTrainedTokenizerBase

from dataset.conversation_rows.sources import find_splits
from dataset.encoded_rows import encode_rows
from dataset.instructions import load_instructions
from dataset.preferences import PreferenceRow, is_preference, read_preference
from dataset.readers import (
    TEXT_COLUMN,
    SourceRow,
    messages_of,
    read_conversation,
    read_sourced_rows,
    read_text_rows,
    text_fields,
)
from dataset.sources import RowSource, find_row_sources
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import DATASET_DIR, ConversationArguments, ModelArguments
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.console import make_console
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.html_pages import page_templates
from novelgpt.settings.parser import mapping_of
from novelgpt.settings.paths import from_home
from novelgpt.settings.small_bases import TINY
from novelgpt.settings.terminal import counted, say, visible
from novelgpt.text.conversation import IGNORE_INDEX, encode_conversation
from novelgpt.text.data_names import TEXT, find_files, is_prepared
from novelgpt.text.encoding import document_end_id, encode_document
from novelgpt.text.messages import Message
from novelgpt.text.packing import PackedBlocks, TokenizedText
from novelgpt.text.statistics import TokenCounts, TokenSpan, row_spans, show_counts

GREEN, BOLD_GREEN, DIM, BOLD, YELLOW, RESET = "\x1b[32m", "\x1b[1;32m", "\x1b[2m", "\x1b[1m", "\x1b[33m", "\x1b[0m"
TRAINED_OPEN, TRAINED_CLOSE = "⟦", "⟧"
BORDER = "│"


@dataclass(frozen=True)
class RowPreview:
    """A row.

    Attributes:
        name: its id.
        source: file and line.
        counts: of its tokens.
        parts: in order, each with a heading ("" for none).
    """

    name: str
    source: str
    counts: TokenCounts
    parts: list[tuple[str, list[TokenSpan]]]


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Show the first rows of a file, or one row."""
    args = _parse(argv)
    if args.model is None:
        say(f"no --model: in the tokens and the template of the small base ({TINY})")
    tokenizer = load_tokenizer(ModelArguments(args.model or TINY))
    sources = _find_sources(args)
    shown_rows = _conversations(args, sources, tokenizer) if sources else _blocks(args, tokenizer)
    name = args.name or ", ".join(args.dataset)
    console = make_console()
    coloured = args.color == "always" or (args.color == "auto" and console.is_terminal and not console.no_color)
    total = TokenCounts()
    rows = []
    for shown in shown_rows:
        total += shown.counts
        if args.html:
            rows.append(shown)
        else:
            print(preview_text(shown, coloured, args.borders))  # noqa: T201 - visible text in colours
    if not total.tokens_in:
        raise UserError(f"{name} has no row {args.row}" if args.row else f"{name} holds no row", "name another")
    if args.html:
        try:
            args.html.parent.mkdir(parents=True, exist_ok=True)
            page = page_templates(Path(__file__).parent).get_template("preview.html")
            text = page.render(rows=rows, title=Path(name).name, total=total, borders=args.borders, describe=describe,
                               visible=visible, counted=counted)  # fmt: skip
            atomic_write(args.html, text)
        except OSError as error:
            raise UserError(f"{args.html}: {error.strerror}", "name a page that can be written") from error
        say(f"  page   {args.html}")
    else:
        show_counts({"shown": total}, console if coloured else make_console(no_color=True))


def _parse(argv: list[str] | None) -> Namespace:
    parser = CommandParser(prog="python -m dataset preview", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", nargs="?", metavar="file", type=from_home, help="conversation rows, named as in "
                        "--train_files of training; text; or a folder of prepared novels")  # fmt: skip
    parser.add_argument("--dataset", nargs="+", default=[], help="names in a dataset_info.json instead, as in training")
    parser.add_argument("--dataset_dir", type=from_home, default=DATASET_DIR, help="as in training")
    parser.add_argument("--columns", type=mapping_of("columns", text_too=False), help="as in training")
    parser.add_argument("--model", help="folder or hub name whose tokenizer and chat template are used "
                        "[default: tiny, the small base]")  # fmt: skip
    parser.add_argument("--rows", type=int, default=3, help="number of rows from the start [default: 3]")
    parser.add_argument("--row", help="the id of one row instead")
    parser.add_argument("--max_length", type=int, default=2048, help="maximum tokens per row, as in training")
    parser.add_argument("--overlong", choices=("truncate", "split", "drop", "refuse"), default="truncate",
                        help="see training")  # fmt: skip
    parser.add_argument("--min_length", type=int, default=0, help="see training")
    parser.add_argument("--mask_history", action="store_true", help="see training")
    parser.add_argument("--instruction_templates", nargs="+", type=from_home, default=[], help="as in training")
    parser.add_argument("--instruction_seed", type=int, default=42, help="as in training")
    parser.add_argument("--wording", choices=("drawn", "first"), default="drawn", help="drawn: as in training; "
                        "first: as in evaluation")  # fmt: skip
    parser.add_argument("--text_column", help="column or key of the text; several are joined by line ends: "
                        "title,abstract [default: text]")  # fmt: skip
    parser.add_argument("--borders", action="store_true", help="show token boundaries")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal")
    parser.add_argument("--html", type=Path, help="write a self-contained page instead")
    args = parser.parse_args(argv)
    if args.rows < 1 or args.max_length < 2:
        raise UserError("nothing to show", "take at least 1 of --rows and 2 of --max_length")
    if (args.name is None) == (not args.dataset):
        raise UserError("name one thing to show", "a file, pattern, folder or data set of a hub; or --dataset NAME")
    return args


def _find_sources(args: Namespace) -> list[RowSource]:
    """The sources of conversations; none where the name is that of text for pretraining, judged by its first row."""
    name = args.name or ""
    in_folder = os.path.isdir(name)  # noqa: PTH112 - Path.is_dir raises for names that are too long
    if name.lower().endswith(TEXT) or is_prepared(name) or (in_folder and not find_files(name)):
        return []
    sources = find_row_sources([args.name] if args.name else [], args.dataset, args.dataset_dir, args.columns)
    first = next(itertools.chain.from_iterable(map(read_sourced_rows, sources)), None)
    if first is None or not _is_text(first, args):
        return sources
    if not in_folder and not Path(name).is_file():
        raise UserError(f"{name} holds text, of which one file or folder is shown", "name one")
    return []


def _is_text(row: SourceRow, args: Namespace) -> bool:
    """Whether a row is text; one that may be a conversation as well is one, unless a column of the text is named."""
    if args.text_column is not None:
        return all(field in row.fields for field in text_fields(row.fields, args.text_column))
    if TEXT_COLUMN not in row.fields or row.fields.get("task"):
        return False
    try:
        messages_of(row.fields, row.source, load_instructions(args.instruction_templates))
    except UserError:
        return True
    return False


def _conversations(
    args: Namespace, sources: list[RowSource], tokenizer: PreTrainedTokenizerBase
) -> Iterator[RowPreview]:
    """The first rows, or one row; a row that is split, or whose template rewrites earlier turns, has several parts."""
    data = ConversationArguments(
        max_length=args.max_length, overlong=args.overlong, min_length=args.min_length, mask_history=args.mask_history
    )
    instructions = load_instructions(args.instruction_templates, args.instruction_seed)
    if args.wording == "first":
        instructions = instructions.fixed()
    found = (row for source in sources for row in read_sourced_rows(source) if args.row in (None, row.id))
    for row in itertools.islice(found, None if args.row else args.rows):
        if is_preference(row.fields):
            yield _preference(read_preference(row), tokenizer, args.borders)
            continue
        kept, counts = encode_rows([read_conversation(row, instructions)], tokenizer, data)
        parts = []
        for number, row_part in enumerate(kept, start=1):
            tokens = row_part.input_ids, row_part.labels, tokenizer, row_part.loss_weights
            spans = list(row_spans(*tokens, by_token=args.borders))
            parts.append((f"part {number} of {len(kept)}" if len(kept) > 1 else "", spans))
        if counts.dropped:
            what = f"{'cut here' if kept else 'left out'}: {counted(counts.dropped, 'token')}"
            parts.append((f"✂ {what} {'is' if counts.dropped == 1 else 'are'} not trained on", []))
        yield RowPreview(row.id, row.source, counts, parts)


def _preference(row: PreferenceRow, tokenizer: PreTrainedTokenizerBase, borders: bool) -> RowPreview:
    """Prompt, chosen and rejected answer, whole: how long they may be is for the trainer that reads such rows."""
    counts = TokenCounts(rows=1)
    counts.notes["preference rows, which no pipeline here trains on"] = 1
    context: list[Message] = [{**message, "weight": 0.0} for message in row["messages"]]
    parts: list[tuple[str, list[TokenSpan]]] = []
    prompt: list[int] = []
    lengths = []
    for name, answer in (("chosen", row["chosen"]), ("rejected", row["rejected"])):
        try:
            (encoded,) = encode_conversation([*context, answer], tokenizer, row.get("tools", ()))
        except UserError as error:
            raise UserError(f"{row['source']}: {error.cause}", error.remedy) from error
        ids, labels = encoded.input_ids, encoded.labels
        begin = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
        sides = [("prompt", slice(begin)), (name, slice(begin, None))]
        if ids[:begin] == prompt:  # as a rule; templates may write another before a thought
            sides.pop(0)
        for heading, part in sides:
            parts.append((heading, list(row_spans(ids[part], labels[part], tokenizer, by_token=borders))))
            counts.tokens_in += len(ids[part])
        counts.trained += len(ids) - begin
        lengths.append(len(ids))
        prompt = ids[:begin]
    counts.context = counts.tokens_in - counts.trained
    counts.lengths = numpy.array(lengths, numpy.int64)
    return RowPreview(row["id"], row["source"], counts, parts)


def _blocks(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> Iterator[RowPreview]:
    """The first blocks of a text, with the boundaries of documents."""
    shards = find_splits(Path(args.name))
    column = args.text_column or TEXT_COLUMN
    rows = (row for file in shards["train"] or shards["held_out"] for row in read_text_rows(file, column))
    numbers = itertools.count()
    names: list[str] = []
    documents: list[TokenizedText] = []
    wanted = args.rows * (args.max_length - 1) + 1
    # Neighbouring rows of one book are one document, as in training.
    for book, chapters in itertools.groupby(rows, lambda row: row["book"] or next(numbers)):
        text = "\n\n".join(row["text"].strip("\n") for row in chapters)
        # A token has hardly ever more than four characters: text beyond the blocks shown is not tokenised.
        ids = [*encode_document(text[: 4 * wanted], tokenizer), document_end_id(tokenizer)]
        documents.append(TokenizedText(numpy.array(ids, numpy.int32)))
        names.append(book if isinstance(book, str) else Path(args.name).name)
        wanted -= len(ids)
        if wanted <= 0:
            break
    if not documents:
        return
    blocks = PackedBlocks(documents, args.max_length)
    for index in range(min(args.rows, len(blocks))):
        begin = int(blocks.spans[index][0])
        ids, labels = (blocks[index][name].tolist() for name in ("input_ids", "labels"))
        inside = [int(start) - begin for start in blocks.starts if begin < start < begin + len(ids)]
        parts = []
        for low, high in zip([0, *inside], [*inside, len(ids)], strict=True):
            document = int(numpy.searchsorted(blocks.starts, begin + low, side="right")) - 1
            verb = "begins" if blocks.starts[document] == begin + low else "continues"
            spans = list(row_spans(ids[low:high], labels[low:high], tokenizer, by_token=args.borders))
            parts.append((f"document {document + 1} {verb}: {names[document]}", spans))
        yield RowPreview(f"block {index + 1}", args.name, blocks.subset(range(index, index + 1)).counts(), parts)


def preview_text(shown: RowPreview, coloured: bool, borders: bool) -> str:
    """A row for a terminal: trained tokens green and the others dim or, without colour, trained tokens in ⟦ ⟧.

    Before trained tokens whose weight is not 1, it says which: ×0.5.
    """

    def paint(text: str, style: str) -> str:
        return f"{style}{visible(text)}{RESET}" if coloured and text else visible(text)

    lines = [paint(f"{shown.name}   {shown.source}", BOLD), describe(shown.counts)]
    lines += [paint(f"  {number:,} {note}", YELLOW) for note, number in shown.counts.notes.items()]
    for heading, spans in shown.parts:
        if heading:
            lines.append(paint(f"──── {heading} ────", YELLOW))
        if not spans:
            continue
        text, weight = "", 0.0
        opening, closing = ("", "") if coloured else (TRAINED_OPEN, TRAINED_CLOSE)
        for span in spans:
            if span.weight != weight:
                text += closing if weight else ""
                text += paint(f"×{span.weight:g}", YELLOW) if span.weight not in (0, 1) else ""
                text += opening if span.weight else ""
            weight = span.weight
            style = (BOLD_GREEN if span.special else GREEN) if span.trained else DIM
            text += (BORDER if borders and span.begin else "") + paint(span.text, style)
        lines.append(text + (closing if weight else ""))
    return "\n".join(lines) + "\n"


def describe(counts: TokenCounts) -> str:
    """Token counts in one line."""
    parts = f"{counts.trained:,} trained, {counts.context:,} context, {counts.dropped:,} dropped"
    return f"{counted(counts.tokens_in, 'token')}: {parts}"


if __name__ == "__main__":
    main()
