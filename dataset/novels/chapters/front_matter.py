"""What stands before the first heading: the name of the book and a blurb, or a prologue without a heading."""

from __future__ import annotations

import re
from collections.abc import Sequence

PROLOGUE_CHARACTERS = 300
"""Prose of at least this length before the first heading is a prologue, and kept; shorter is a blurb."""
BLURB_CHARACTERS = 1_500
"""The same where a line such as 内容简介 stands above it."""

_BLURB = re.compile(
    r"\W*(?:内容|內容|作品|作者|故事|小[说說]|本?[书書]籍?|[图圖][书書])?(?:[简簡]介|提要|介[绍紹]|文案|[导導][读讀])(?:\W.{0,20})?"
)
_ABOUT = re.compile(
    r"\W*(?:[书書]名|作者|作品|[类類][别別型]|分[类類]|字[数數]|[状狀][态態]|[标標][签籤]|主角|[关關][键鍵]字|出版社?|ISBN"
    r"|[来來]源|更新|[声聲]明|版[权權])\s*(?:[：:；/].{0,60})?|.*(?:https?:|www\.).*|\W+|\W*正文\W*|\W*《[^》]*》.{0,20}|.{0,20}[著撰]\W*"
)


def first_line_of_prologue(texts: Sequence[str]) -> int:
    """Where the prologue begins among the lines before the first heading; their number, where there is none.

    Lines about the book (作者：…, 书名, rules, web addresses) and titles are never part of it. What follows is a
    prologue if it is prose of at least 300 characters; below a line such as 内容简介, of at least 1,500. Such a line
    in a prologue ends nothing.
    """
    start, least = 0, PROLOGUE_CHARACTERS
    for index, text in enumerate(texts):
        stripped = text.strip()
        if _BLURB.fullmatch(stripped):
            if _is_prose(texts[start:index], least):
                break  # a word of the prologue's own: what stands above it is no front matter
            start, least = index + 1, BLURB_CHARACTERS
        elif not stripped or _ABOUT.fullmatch(stripped):
            start = index + 1 if least == PROLOGUE_CHARACTERS and start == index else start
    while start < len(texts) and (not texts[start].strip() or _ABOUT.fullmatch(texts[start].strip())):
        start += 1
    return start if _is_prose(texts[start:], least) else len(texts)


def _is_prose(texts: Sequence[str], least: int) -> bool:
    """Whether the lines are prose of at least so many characters."""
    length = sum(len("".join(text.split())) for text in texts)
    sentences = sum(text.count("。") + text.count("！") + text.count("？") for text in texts)
    return length >= least and sentences >= 3
