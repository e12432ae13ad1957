"""Names in pictures: drawn as they are where a font has their letters, as codes where none has."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib
import pytest

from novelgpt.settings.charts import find_chinese_font, lettering
from novelgpt.training.callbacks import draw_losses

DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
HISTORY = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}]
needs_chinese_font = pytest.mark.skipif(find_chinese_font("雪夜") is None, reason="no font with Chinese letters here")


@pytest.mark.parametrize("name", ["红楼梦-第一回", "a$\\frac$_1", "run[/b]", "雪\n夜\x1b[31m", "🙂é", "𠮷"])
def test_loss_png_lacks_no_letter_and_reads_no_formula(name: str, tmp_path: Path) -> None:
    """On any machine: matplotlib warns of each letter that its fonts lack."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_losses(HISTORY, folder / "loss.png")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_chinese_font_letters_are_codes(tmp_path: Path) -> None:
    found = lettering("雪 é", (DEJAVU, tmp_path / "NotoSansCJK-Regular.ttc"))
    assert (found.text, found.families, found.complete) == ("<U+96EA> é", ("DejaVu Sans",), False)
    assert lettering("run é", ()).complete


@needs_chinese_font
def test_with_a_chinese_font_all_letters_but_those_that_no_font_has_are_drawn() -> None:
    assert lettering("红楼梦-第一回（上）").complete
    partly = lettering("红楼梦\U0010fffd")
    assert partly.text == "红楼梦<U+10FFFD>" and len(partly.families) == 2


@needs_chinese_font
def test_a_chinese_font_of_any_name_is_found(tmp_path: Path) -> None:
    font = find_chinese_font("雪夜")
    assert font is not None
    other = tmp_path / f"MyOwnFont{font.path.suffix}"
    other.symlink_to(font.path)
    assert find_chinese_font("雪夜", [DEJAVU, other]) is not None
