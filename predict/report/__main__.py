"""A page about one or several runs: scores, pictures, examples.

    python -m predict.report RUN
    python -m predict.report RUN OTHER --output FOLDER

RUN: a folder with predictions.jsonl, row_scores.jsonl and scores.json, a run folder that has such a folder `predict`,
or another tool's prediction file that `python -m predict.score` has scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from novelgpt.scoring.summary import Comparison, compare_rows
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.charts import INSTALL_REMEDY, ChineseFont, draw_picture, find_chinese_font
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.terminal import say
from predict.report.charts import LABELS, PICTURES, make_charts
from predict.report.examples import choose_examples
from predict.report.page import make_page
from predict.report.runs import ReportRun, matched_rows, read_runs

FOLDER = "report"
_OF_REFERENCES = ("reference_nats", "reference_tokens", "reference_tokens_right", "reference_characters")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Write the report that the command line asks for."""
    parser = CommandParser(prog="python -m predict.report", description="A page about one or several runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders or folders with predictions")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where to write [default: beside the predictions of the first]"
    )
    args = parser.parse_args(argv)
    runs = read_runs(args.runs)
    folder = args.output or runs[0].file.parent
    font = find_chinese_font(LABELS)
    page = write_report(runs, folder, font)
    say(f"  report     {page}", f"  pictures   {folder / FOLDER}")
    if font is None:
        say("  No font with Chinese letters was found: labels in the pictures are English only.")
        say(f"  To have them in Chinese, {INSTALL_REMEDY}, and run this again.")


def write_report(runs: Sequence[ReportRun], folder: Path, font: ChineseFont | None) -> Path:
    """Write report.html, and its pictures into `report/` beside it; the same runs and font give the same bytes.

    Args:
        runs: what the page is about.
        folder: created if missing.
        font: for Chinese labels in the pictures; None for English labels only.

    Returns:
        The page's path.

    Raises:
        UserError: the folder cannot be written.
    """
    matches = [matched_rows(runs[0], run) for run in runs]
    pictures = {
        section: [draw_picture(chart, font) for chart in charts] for section, charts in make_charts(runs).items()
    }
    comparisons = {run.number: _compare(runs[0], run, matches[run.number]) for run in runs[1:]}
    text = make_page(runs, comparisons, pictures, choose_examples(runs, matches), font is None)
    page = folder / "report.html"
    files = {picture.chart.name: picture.png for drawn in pictures.values() for picture in drawn}
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        for name, png in files.items():
            atomic_write(folder / FOLDER / f"{name}.png", png)
        for name in set(PICTURES) - files.keys():  # of an earlier report
            (folder / FOLDER / f"{name}.png").unlink(missing_ok=True)
        atomic_write(page, text.encode())
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}", "name an --output that can be written") from error
    return page


def _compare(first: ReportRun, other: ReportRun, match: Sequence[int] | None) -> list[Comparison] | None:
    """Comparison of the predictions' scores; those of the references, which are the same, only where a sum needs them.

    None where `other` answers other rows.
    """
    if match is None:
        return None
    before, after = (
        [
            {name: row[name] for name in row if name in _OF_REFERENCES or not name.startswith("reference_")}
            for row in rows
        ]
        for rows in (first.rows, [other.rows[number] for number in match])
    )
    return compare_rows(before, after)


if __name__ == "__main__":
    main()
