"""Pages of an .epub that are no part of the book: contents, imprint, advertisements of those who pass it on."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

_CONTENTS = frozenset((
    "目录", "目錄", "目次", "总目录", "總目錄", "全书目录", "章节目录", "contents", "tableofcontents",
))  # fmt: skip
_IMPRINT = frozenset((
    "版权信息", "版權信息", "版权页", "版權頁", "版权声明", "版權聲明", "版权", "版權", "版权所有", "版權所有",
    "出版信息", "图书信息", "书籍信息", "图书在版编目", "图书在版编目(cip)数据", "制作信息", "制作说明", "copyright",
    "copyrightpage",
))  # fmt: skip
_IMPRINT_LINE = re.compile(
    r"(?:书\s*名|原书名|作\s*者|原著|著者|译者|编者|主编|绘者|出版社|出版发行|出版者|出版人|出版时间|出版日期|发行|字数|印数"
    r"|印张|版次|印次|开本|定价|责任编辑|策划编辑|特约编辑|封面设计|装帧设计|责任印制|统一书号|书号|印刷|地址|邮编|电话|网址"
    r"|制作)\s*[:：／/]|isbn|cip|版权所有|翻印必究|copyright|©",
    re.IGNORECASE,
)
_ADVERTISING = (
    "扫码", "二维码", "公众号", "微信", "微博", "qq群", "书友群", "加群", "关注", "电子书", "下载", "更多好书",
    "更多精彩", "搜索", "回复", "免费", "领取", "客户端", "app", "www.", "http", ".com", "网址", "阅读平台", "打赏",
    "书单",
)  # fmt: skip
LONGEST_CONTENTS_LINE, LONGEST_IMPRINT, LONGEST_ADVERTISEMENT = 60, 5_000, 400
"""Characters: of a line of contents; of the other pages, as a whole."""


def matter_of_page(texts: Sequence[str], titles: Collection[str], at_the_edge: bool) -> str:
    """The rule by which a page is left out; "" for a page of the book.

    Args:
        texts: its paragraphs and headings.
        titles: of the table of contents.
        at_the_edge: whether it is among the first or the last pages of the book.
    """
    if not texts:
        return ""
    if rule := matter_of_section(texts[0], texts[1:]):
        return rule
    known = {_plain(title) for title in titles}
    if len(texts) >= 4 and sum(_plain(text) in known for text in texts) >= 0.8 * len(texts):
        return "contents_page"
    size = sum(map(len, texts))
    named = sum(_IMPRINT_LINE.match(text) is not None for text in texts)
    if named >= 3 and named >= 0.6 * len(texts) and size <= LONGEST_IMPRINT:
        return "imprint_page"
    if at_the_edge and size <= LONGEST_ADVERTISEMENT and all(map(_advertises, texts)):
        return "advertisement_page"
    return ""


def matter_of_section(title: str, texts: Sequence[str]) -> str:
    """The rule by which what stands below a title is left out, as the title says so; "" for a chapter."""
    plain = _plain(title)
    if plain in _CONTENTS and all(len(text) <= LONGEST_CONTENTS_LINE for text in texts):
        return "contents_page"
    if plain in _IMPRINT and sum(map(len, texts)) <= LONGEST_IMPRINT:
        return "imprint_page"
    return ""


def _advertises(text: str) -> bool:
    folded = text.lower()
    return sum(word in folded for word in _ADVERTISING) >= 2


def _plain(text: str) -> str:
    return "".join(text.split()).replace("（", "(").replace("）", ")").strip("【】[]《》—-").lower()
