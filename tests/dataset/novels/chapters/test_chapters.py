"""Chapters of books in all the shapes that books come in; no character is ever lost or made up."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset.novels.chapters.chapters import ChapterSplit, split_chapters
from dataset.novels.chapters.numerals import to_number, to_numbers
from dataset.novels.records import Line

NOVELS = Path(__file__).resolve().parents[5] / "shared" / "data" / "novels"
ENCODINGS = {"gbk": "gb18030", "big5": "big5hkscs", "utf8": "utf-8-sig", "utf8bom": "utf-8-sig"}

# file: chapters with a number, others, how the first and the last heading begin, what a finding must say.
EDITIONS = {
    "hongloumeng.bookbao.gbk.txt": (120, 0, "第一回 甄士隐梦幻识通灵", "第一二零回 甄士隐详说太虚情", ""),
    "hongloumeng.arabic.utf8.txt": (120, 0, "第1章 甄士隐梦幻识通灵", "第120章 甄士隐详说太虚情", ""),
    "shuihuzhuan.rain8.gbk.txt": (
        120,
        0,
        "第一回 王教头私走延安府",
        "第一百二十回 宋公明神聚蓼儿",
        "hard-wrapped at about 72",
    ),
    "sanguoyanyi.readnovel.gbk.txt": (120, 0, "第一回 宴桃园豪杰三结义", "第一百二十回 荐杜预老将献新谋", ""),
    "sanguoyanyi.readnovel.utf8.txt": (120, 0, "第一回 宴桃园豪杰三结义", "第一百二十回 荐杜预老将献新谋", ""),
    "hulanhezhuan.daocaoren.utf8.txt": (7, 2, "序 作者：茅盾", "尾声", ""),
    "xiaohong_quanji.xstt.utf8bom.txt": (39, 0, "第1章 失眠之夜（代序）", "第39章 旷野的呼喊", ""),
    "nahan.gutenberg.utf8.txt": (0, 15, "", "白光", "prose before the first heading is kept"),
    "panghuang.oneline.utf8.txt": (0, 11, "", "", "no headings: cut at paragraph ends into 11 parts"),
    "guanchangxianxingji.big5.txt": (
        60,
        0,
        "第一回 望成名學究訓頑兒",
        "第六十回 苦辣甜酸遍嘗滋味",
        "contents with 60 entries",
    ),
    "rulinwaishi.trad.gbk.txt": (
        55,
        0,
        "第一回 說楔子敷陳大義",
        "第五十五回 添四客述往思來",
        "contents with 55 entries",
    ),
    "yulihun.gutenberg.utf8.txt": (29, 0, "第一章 葬花", "第三十章 憑吊", "chapter 20 is missing between 19 and 21"),
    "ernvyingxiongzhuan.gutenberg.utf8.txt": (
        40,
        1,
        "緣起首回 開宗明義",
        "第四十回 虛吃驚遠奏陽關曲",
        "hard-wrapped at about 72",
    ),
}

SENTENCES = [
    "天色渐渐暗了下来，他沿着河边慢慢地走。",
    "“你为什么不去？”她问。",
    "他没有回答，只是看着远处的灯火，一盏一盏地亮起来。",
    "第二天，雨还没有停。",
    "第一次见面是在河边，那时他十七岁。",
    "他翻开书，第三章里夹着一片叶子。",
    "“第二回合！”有人喊道。",
    "第十章的结尾她记得很清楚，可是她不愿意再读。",
    "一、二、三，他数着台阶。",
    "卷子发下来了，他得了九十分。",
]
PROSE = [
    "　　天色渐渐暗了下来，他沿着河边慢慢地走，心里想着白天的事。“你为什么不去？”她问。",
    "　　他没有回答，只是看着远处的灯火，一盏一盏地亮起来，又一盏一盏地熄灭。",
    "　　第二天，雨还没有停，路上的人都打着伞，低着头，谁也不看谁一眼。他站在门口。",
] * 2


def split(texts: Iterable[str], **options: int) -> ChapterSplit:
    """The chapters of some lines, once the law is found to hold: kept + removed = given, in order, nothing else."""
    lines = [Line(number, text) for number, text in enumerate(texts, start=1)]
    found = split_chapters(lines, **options)
    given_text = visible(text for _, text in lines)
    kept = visible(chapter.text for chapter in found.chapters)
    removed = visible(entry.text for entry in found.removed)
    assert Counter(kept) + Counter(removed) == Counter(given_text)
    assert is_subsequence(kept, given_text)
    assert is_subsequence(removed, given_text)
    for entry in found.removed:
        assert is_subsequence(visible([entry.text]), visible([lines[entry.number - 1].text]))
    for chapter in found.chapters:
        paragraphs = chapter.text.split("\n")
        assert all(paragraph and paragraph == paragraph.strip() for paragraph in paragraphs)
        assert not chapter.heading or paragraphs[0] == chapter.heading
    return found


def visible(texts: Iterable[str]) -> str:
    return "".join("".join(texts).split())


def is_subsequence(part: str, whole: str) -> bool:
    characters = iter(whole)
    return all(character in characters for character in part)


def book(*headings: str | Sequence[str], prose: Sequence[str] = PROSE) -> list[str]:
    """Lines of a book: each heading (one line or several) with prose below."""
    return [line for one in headings for line in (*([one] if isinstance(one, str) else one), *prose)]


def headings(found: ChapterSplit) -> list[str]:
    return [chapter.heading for chapter in found.chapters]


def rules(found: ChapterSplit) -> Counter[str]:
    return Counter(entry.rule for entry in found.removed)


@pytest.mark.parametrize("name", EDITIONS)
def test_real_editions_have_their_true_chapters(name: str) -> None:
    if not (NOVELS / name).exists():
        pytest.skip("the real novels are not here")
    text = (NOVELS / name).read_bytes().decode(ENCODINGS[name.split(".")[-2]])
    found = split(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    numbered, others, first, last, finding = EDITIONS[name]
    assert sum(chapter.number is not None for chapter in found.chapters) == numbered
    assert len(found.chapters) == numbered + others
    assert found.chapters[0].heading.startswith(first) and found.chapters[-1].heading.startswith(last)
    assert finding in " ".join(found.findings)
    if numbered:
        expected = [number for number in range(1, numbered + 2) if name[:4] != "yuli" or number != 20][:numbered]
        assert [chapter.number for chapter in found.chapters if chapter.number is not None] == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["第一章 雪", "第二章 夜"], ["第一章 雪", "第二章 夜"]),
        (["    第一章　雪", "    第二章　夜"], ["第一章 雪", "第二章 夜"]),
        (["　　第１章：雪", "　　第２章：夜"], ["第１章：雪", "第２章：夜"]),
        (["第　一　回　雪", "第 二 回 夜"], ["第一回 雪", "第二回 夜"]),
        (["第一章雪", "第二章夜", "第三章火"], None),
        (["正文 第一章 雪", "正文 第二章 夜"], ["第一章 雪", "第二章 夜"]),
        (["VIP章节 第一章 雪", "VIP章节 第二章 夜"], ["第一章 雪", "第二章 夜"]),
        (["雪夜 第一章 雪", "雪夜 第二章 夜", "雪夜 第三章 火"], ["第一章 雪", "第二章 夜", "第三章 火"]),
        (["【第一章 雪（上）】", "【第二章 雪（下）】"], ["第一章 雪（上）", "第二章 雪（下）"]),
        (["【第一章】雪", "【第二章】夜"], ["第一章 雪", "第二章 夜"]),
        (["［第一章］雪", "［第二章］夜"], ["第一章 雪", "第二章 夜"]),
        (["=== 第一章 雪 ===", "*** 第二章 夜 ***"], ["第一章 雪", "第二章 夜"]),
        (["Chapter 1 Snow", "Chapter 2 Night"], ["Chapter 1 Snow", "Chapter 2 Night"]),
        (["1. 雪", "2. 夜", "3. 火"], ["1. 雪", "2. 夜", "3. 火"]),
        (["001 雪", "002 夜", "003 火"], ["001 雪", "002 夜", "003 火"]),
        (["一、雪", "二、夜", "三、火"], ["一、 雪", "二、 夜", "三、 火"]),
        (["（一）", "（二）", "（三）"], ["（一）", "（二）", "（三）"]),
        (["第一章 你是谁？", "第二章 我来了！", "第三章 走……"], None),
        (["序章", "第一章 雪", "第二章 夜", "番外一 旧事", "番外之雪", "尾声", "后记"],
         ["序章", "第一章 雪", "第二章 夜", "番外一 旧事", "番外 之雪", "尾声", "后记"]),
        (["楔子", "第零章 雪", "第一章 夜", "终章", "大结局"], ["楔子", "第零章 雪", "第一章 夜", "终章", "大结局"]),
        (["第1章 雪", "第2-3章 夜", "第4章 火"], None),
        (["第一章 雪", "二章 夜", "第三章 火"], None),
        (["第一章 雪", "第二节 夜", "第三章 火", "第四章 灰"], None),
        (["第一部 雪", "第二部 夜", "第三部 火"], None),
        (["卷一", "卷二", "卷三"], None),
        (["第五十七章 雪"], None),
    ],
)  # fmt: skip
def test_headings_of_every_style(lines: list[str], expected: list[str] | None) -> None:
    found = split(book(*lines))
    assert [visible([heading]) for heading in headings(found)] == [visible([one]) for one in expected or lines]
    if expected:
        assert headings(found) == expected
    assert set(rules(found)) <= {"heading_prefix", "heading_decoration"}


def test_parts_of_a_heading() -> None:
    one, two = split(book("第二卷 山雨 第一章：雪  夜", "第二卷 山雨 第二章")).chapters
    assert (one.heading, one.label, one.title, one.number, one.volume) == (
        "第一章：雪 夜", "第一章", "雪 夜", 1, "第二卷 山雨",
    )  # fmt: skip
    assert (two.heading, two.label, two.title, two.number, two.volume) == ("第二章", "第二章", "", 2, "第二卷 山雨")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[
            ("12", 12),
            ("１２", 12),
            ("001", 1),
            ("十", 10),
            ("一十", 10),
            ("十二", 12),
            ("二十", 20),
            ("一百二十", 120),
        ],
        *[
            ("一百零一", 101),
            ("一百一十", 110),
            ("一一零", 110),
            ("一○一", 101),
            ("二〇〇", 200),
            ("廿三", 23),
            ("卅", 30),
        ],
        *[("两千零一", 2001), ("壹佰贰拾", 120), ("　三　", 3), ("雪", None), ("", None)],
    ],
)
def test_numbers(text: str, number: int | None) -> None:
    assert to_number(text) == number


DASHES = "—－―ー-–─ㄧ"


@pytest.mark.parametrize("dash", DASHES)
def test_a_dash_in_a_number_is_a_misprint_of_one(dash: str) -> None:
    for written, number in (("十{}", 11), ("{}百", 100), ("一百{}十二", 112), ("{}百{}十{}", 111), ("二十{}", 21)):
        assert to_numbers(written.replace("{}", dash)) == (number, number)
    lines = ["第十章 雪", f"第十{dash}章 夜", "第十二章 火"]
    found = split(book(*lines))
    assert [(one.number, one.title) for one in found.chapters] == [(10, "雪"), (11, "夜"), (12, "火")]
    assert found.findings == ["the numbering begins at 10"]


@pytest.mark.parametrize(
    ("lines", "numbers"),
    [
        (["十、雪", "十—、夜", "十二、火"], []),
        (["卷—", "卷二", "卷三"], [1, 2, 3]),
        (["第—卷 雪", "第二卷 夜", "第三卷 火"], [1, 2, 3]),
        (["第九十九回 雪", "第—百回 夜", "第—百零—回 火"], [99, 100, 101]),
        (["第十—十二章 雪", "第十三章 夜"], [10, 13]),
        (["第1—2章 雪", "第3章 夜"], [1, 3]),
    ],
)
def test_dashes_of_misprints_and_of_ranges(lines: list[str], numbers: list[int]) -> None:
    assert [one.number for one in split(book(*lines)).chapters if one.number] == numbers


def test_a_dash_before_speech_is_no_number() -> None:
    speech = ["—— 你来了。", "— 来了。", "——他没有回答。"]
    found = split(book("第一章 雪", ["第二章 夜", *speech], "第三章 火"))
    assert headings(found) == ["第一章 雪", "第二章 夜", "第三章 火"]
    assert found.chapters[1].text.split("\n")[1:4] == speech


GOES_ON = ["里城夜火", "裡城夜火", "中原逐鹿", "的卢救主", "是非之地", "时来运转", "才子佳人", "就义东市", "也是英雄"]


@pytest.mark.parametrize("title", [*GOES_ON, "合浦珠还"])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_title_behind_no_blank_may_begin_with_any_word(title: str, place: int) -> None:
    titles = ["雨夜孤舟", "渡口旧信", "开船北去", "青苔石阶"]
    titles.insert(place, title)
    found = split(book(*(f"第{number}回{title}" for number, title in zip("一二三四五", titles, strict=True))))
    assert [one.title for one in found.chapters] == titles
    assert found.findings == []


def test_words_of_the_prose_are_no_titles_behind_no_blank() -> None:
    lines = [f"第{number}回雨夜孤舟" for number in "一二三四五六"]
    for line in ["第四回里说过的话", "　　第六回中的人", "第七回里说过的话", "　　第七回是他的信", "第二回合开始了"]:
        texts = book(*lines, prose=[text.strip() for text in PROSE])
        assert headings(split([*texts[:-3], line, *texts[-3:]])) == [
            f"第{number}回 雨夜孤舟" for number in "一二三四五六"
        ]
    spaced = [f"第{number}回 雨夜孤舟" for number in "一二四五六"]
    assert headings(split([*book(*spaced[:2]), "第三回里说过的话", *book(*spaced[2:])])) == spaced


@pytest.mark.parametrize(
    "line",
    [
        "　　第一件，径回，不可酒。",
        "　　第四回中既将薛家母子在荣府内寄居等事略已表明，此回则暂不能写矣。",
        "　　第七天上，儿子又回来了，带着野鸡。",
        "　　此开卷第一回也。",
        "第二回合开始了",
        "第一次见面是在河边",
        "第三章里说过的话",
        "因這第二回是個小團圓",
        "第二节课，他没有来",
        "（第二章完）",
        "第三集团军",
        "他说第四章 写得好",
        "第二回中的人",
        "第一部电影",
        "　　第四回 写得真好",
        "第四回 她想起来了，那时的雪，那时的夜，那时的人，都到哪里去了",
    ],
)
def test_false_headings_stay_prose(line: str) -> None:
    texts = book("第一回 雪", "第二回 夜", "第三回 火", "第四回 灰", "第五回 归人")
    at = 2 * (len(PROSE) + 1) - 2
    found = split([*texts[:at], line, *texts[at:]])
    assert headings(found) == ["第一回 雪", "第二回 夜", "第三回 火", "第四回 灰", "第五回 归人"]
    assert line.strip() in found.chapters[1].text.split("\n")
    assert not found.removed


def test_a_line_unlike_the_headings_fills_no_gap_of_several() -> None:
    lines = [f"第{number}章 雪夜" for number in (1, 2, *range(5, 20))]
    texts = book(*lines)
    line = "　　第3章 是他的信，写得真好！"
    at = 2 * (len(PROSE) + 1) - 2
    assert headings(split([*texts[:at], line, *texts[at:]])) == lines
    exact = book(*lines[:2], line, "第4章 雪夜", *lines[2:])
    assert headings(split(exact))[2] == line.strip()


def test_a_single_false_heading_makes_no_chapters() -> None:
    assert headings(split([*PROSE, "第二章", *PROSE])) == [""]


def test_title_on_a_line_of_its_own() -> None:
    found = split(book(["第一章", "", "雪夜"], ["第二章", "", "归人"]))
    assert [(chapter.heading, chapter.title) for chapter in found.chapters] == [
        ("第一章 雪夜", "雪夜"),
        ("第二章 归人", "归人"),
    ]


def test_prose_below_bare_headings_is_no_title() -> None:
    found = split(book(["第一章", "　　晚饭一过，火烧云就上来了。"], ["第二章", "　　一"]))
    assert headings(found) == ["第一章", "第二章"]


def test_prose_on_the_line_of_a_heading() -> None:
    """It goes to the text; where it stops in the middle of a sentence, the next line goes on."""
    texts = book(*(f"第{number}回 王教头私走延安府 九纹龙大闹史家村" for number in "一二三四五"))
    texts[len(PROSE) + 1] = "第二回 撕扇子作千金一笑 因麒麟伏白首双星 话说那人见了自己吐"
    texts[len(PROSE) + 2] = "　　的鲜血在地，也就冷了半截。"
    chapter = split(texts).chapters[1]
    assert chapter.heading == "第二回 撕扇子作千金一笑 因麒麟伏白首双星"
    assert chapter.text.split("\n")[1] == "话说那人见了自己吐的鲜血在地，也就冷了半截。"


def test_a_book_with_one_line_a_chapter() -> None:
    found = split(f"第{number}章 雪夜 {visible(PROSE)}" for number in "一二三四")
    assert headings(found) == [f"第{number}章 雪夜" for number in "一二三四"]
    assert all(chapter.text.split("\n")[1:] == [visible(PROSE)] for chapter in found.chapters)


BEHIND = "老周把船系在木桩上，拍了拍手上的泥。岸边的芦苇被风压得很低，他听见远处有人喊他的名字，却看不清是谁。"


@pytest.mark.parametrize("alone", [(), (2,), (0,), (5,), (1, 2)])
@pytest.mark.parametrize("text", [BEHIND, "他没有回答，雨还没有停。", f"“你来了。”{BEHIND}", f"话说{BEHIND}"])
def test_text_behind_most_headings(alone: tuple[int, ...], text: str) -> None:
    titles = ["雨夜", "渡口", "旧信", "开船", "青苔", "铜铃"]
    lines = [f"第{number}回    {title}" for number, title in zip("一二三四五六", titles, strict=True)]
    found = split(book(*(line if place in alone else f"{line}　{text}" for place, line in enumerate(lines))))
    assert [one.title for one in found.chapters] == titles
    assert [one.text.split("\n")[1] == text for one in found.chapters] == [place not in alone for place in range(6)]
    assert found.findings == []


def test_text_behind_a_few_headings_in_a_row() -> None:
    lines = [f"第{number}回 雨夜" for number in "一二三四五六七八"]
    found = split(book(*(f"{line} {BEHIND}" if place in (3, 4) else line for place, line in enumerate(lines))))
    assert headings(found) == lines


def test_sections_stay_in_their_chapter() -> None:
    for first, second in (("一", "二"), ("1", "2"), ("第一节 甲", "第二节 乙")):
        found = split(book(["第一章 雪", first], second, ["第二章 夜", first], second))
        assert headings(found) == ["第一章 雪", "第二章 夜"]
        assert second in found.chapters[0].text.split("\n")


def test_volumes() -> None:
    for anew in (True, False):
        third = "第一章 火" if anew else "第三章 火"
        found = split(["第一卷 山雨", *book("第一章 雪", "第二章 夜"), "　　第二卷 风", *book(third)])
        assert [(one.heading, one.number, one.volume) for one in found.chapters] == [
            ("第一章 雪", 1, "第一卷 山雨"), ("第二章 夜", 2, "第一卷 山雨"), (third, 1 if anew else 3, "第二卷 风"),
        ]  # fmt: skip
        assert rules(found) == {"volume_heading": 2}
        assert found.findings == []


def test_a_volume_with_text_of_its_own_is_a_chapter_without_number() -> None:
    found = split(["第一卷 山雨", *PROSE, *book("第一章 雪", "第二章 夜")])
    assert [(one.heading, one.number) for one in found.chapters] == [
        ("第一卷 山雨", None), ("第一章 雪", 1), ("第二章 夜", 2),
    ]  # fmt: skip


CONTENTS = ["第一回 甲乙丙丁", "第二回 戊己庚辛", "第三回 子丑", "第四回 寅卯"]


@pytest.mark.parametrize(
    ("contents", "entries"),
    [
        (CONTENTS, 4),
        ([f" {entry.replace('第', '第　').replace('回', '　回')}  " for entry in CONTENTS], 4),
        ([f"{entry}…………{page}" for page, entry in enumerate(CONTENTS)], 4),
        ([" ".join(CONTENTS[:2]), " ".join(CONTENTS[2:])], 4),
        ([entry.split()[1] for entry in CONTENTS], 4),
        (["第一卷 山雨", *CONTENTS[:2], "第二卷 风", *CONTENTS[2:]], 6),
    ],
)
def test_tables_of_contents(contents: list[str], entries: int) -> None:
    found = split(["雪夜归人", "作者：某人", "", "目　录", "", *contents, "", *book(*CONTENTS)])
    assert headings(found) == CONTENTS
    assert rules(found) == {"front_matter": 2, "table_of_contents": len(contents) + 1}
    assert found.findings == [f"a table of contents with {entries} entries was left out"]


@pytest.mark.parametrize(
    "contents",
    [
        [*CONTENTS, "第五回 午未"],
        [entry.replace("一", "1").replace("二", "2").replace("三", "3").replace("四", "4") for entry in CONTENTS]
        + ["第5回 午未"],
        [*CONTENTS, "后记"],
        ["序章", *CONTENTS, "第五回 午未", "番外 申酉"],
        [*CONTENTS, "第五回 午未", "", "内容简介：", "一个人在雪夜里回家的故事，写了三年，改了又改。"],
    ],
)
def test_entries_of_chapters_that_the_book_lacks_are_no_chapters(contents: list[str]) -> None:
    found = split(["目录", *contents, "", *book(*CONTENTS)])
    assert headings(found) == CONTENTS
    assert not any("without text" in finding or "begins" in finding for finding in found.findings)


def test_the_first_chapter_right_below_a_table_of_contents_is_none_of_its_entries() -> None:
    assert headings(split(["目录", *CONTENTS, "", *book("楔子", *CONTENTS)])) == ["楔子", *CONTENTS]


def test_titles_without_numbers() -> None:
    """They are told by a table of contents, or by being the only lines without an indent."""
    titles = ["雪", "夜里", "归人的路"]
    assert headings(split(["目录", *titles, "", *book(*titles)])) == titles
    assert headings(split(book(*titles, prose=PROSE * 5))) == titles


def test_what_stands_before_the_first_chapter() -> None:
    chapters = book("第一章 雪", "第二章 夜")
    blurb = ["《雪夜》", "作者：某人", "内容简介：", PROSE[0], PROSE[1]]
    assert headings(split([*blurb, *chapters])) == ["第一章 雪", "第二章 夜"]
    assert rules(split([*blurb, *chapters])) == {"front_matter": 5}
    prologue = split(["雪夜", "作者：某人", *PROSE * 3, *chapters])
    assert prologue.chapters[0].heading == "" and prologue.chapters[0].number is None
    assert visible([prologue.chapters[0].text]).endswith(visible(PROSE * 3))
    assert "prose before the first heading is kept as a chapter without heading" in prologue.findings


def test_repeated_headings() -> None:
    found = split(
        book(
            ["第一章 雪", "", "第一章 雪"],
            ["第二章 夜", "　　正文 第二章 夜"],
            ["第三章", "第三章 火"],
            ["第四章 灯火", "　　灯火"],
        )
    )
    assert headings(found) == ["第一章 雪", "第二章 夜", "第三章 火", "第四章 灯火"]
    assert rules(found) == {"repeated_heading": 4}
    assert found.findings == []


@pytest.mark.parametrize("indent", ["", "　　"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        *[("第12章 雪夜", other) for other in ("第十二章 雪夜", "第１２章 雪夜", "第拾贰章 雪夜", "第一二章 雪夜")],
        *[("第十二章 雪夜", other) for other in ("第12章 雪夜", "第012章 雪夜", "十二、雪夜", "12. 雪夜", "12 雪夜")],
        *[("第十二节 灯（上）", other) for other in ("第12節 灯(上)", "第12节：灯（上）", "正文 第12节 灯（上）")],
        ("第12章", "第十二章"),
        ("第12章 雪夜", "第十二章"),
        ("第12章 雪夜", "雪夜归人 第十二章 雪夜"),
        ("第12章 雪夜", "第十二回 雪夜"),
    ],
)
def test_a_heading_in_other_digits_is_one_heading(first: str, second: str, indent: str) -> None:
    unit = "节" if "节" in first else "章"
    found = split(
        book(
            f"第11{unit} 火", [first, indent + second], [f"第13{unit} 灰", f"{indent}第十三{unit} 灰"], f"第14{unit} 归"
        )
    )
    assert [one.number for one in found.chapters] == [11, 12, 13, 14]
    assert found.chapters[1].heading == first
    assert rules(found)["repeated_heading"] == 2
    assert found.findings == ["the numbering begins at 11"]


def test_what_is_no_repetition_stays() -> None:
    for line in ("第十三章 雪夜", "第十二章 别的", "十二", "一、雪夜", "第十二章里写着雪夜。", "雪夜里，他来了。"):
        found = split(book("第11章 火", ["第12章 雪夜", f"　　{line}"], "第14章 归"))
        assert line in "\n".join(one.text for one in found.chapters).split("\n")
        assert rules(found)["repeated_heading"] == 0


LONG = [text for number in range(8) for text in (*PROSE[:3], f"　　第{number}天，他又来了，站在门口，不说话。")]


@pytest.mark.parametrize("word", ["导读：", "導讀", "内容简介", "【内容简介】", "作者简介", "作品介绍：", "文案"])
def test_a_word_of_blurbs_in_the_middle_of_prose_ends_nothing(word: str) -> None:
    chapters = book("第一章 雪", "第二章 夜")
    found = split([*LONG, f"　　{word}", *PROSE[:3], "", *chapters])
    assert visible(one.text for one in found.chapters) == visible([*LONG, word, *PROSE[:3], *chapters])
    assert not found.removed
    blurb = split(["雪夜", "作者：某人", word, *PROSE[:3], "", *chapters])
    assert headings(blurb) == ["第一章 雪", "第二章 夜"]


def test_findings_about_numbers() -> None:
    found = split(book(*(f"第{number}章 雪" for number in (3, 4, 4, 6, 9, 8, 9, 1, 2))))
    assert len(found.chapters) == 9
    assert found.findings == [
        "the numbering begins at 3",
        "chapter 4 comes twice in a row",
        "chapter 5 is missing between 4 and 6",
        "chapters 7 to 8 are missing between 6 and 9",
        "the numbering goes back from 9 to 8",
        "the numbering begins anew at 1 after 9",
    ]


def test_chapters_without_text_are_kept_and_told() -> None:
    found = split([*book("第一章 雪"), "第二章 夜", "第三章 火", *book("第四章 灰")])
    assert [chapter.text for chapter in found.chapters[1:3]] == ["第二章 夜", "第三章 火"]
    assert found.findings == ["2 chapters without text: 第二章 夜; 第三章 火"]


@pytest.mark.parametrize("texts", [PROSE * 100, ["".join(map(str.strip, PROSE * 100))]])
def test_books_without_headings_are_cut_into_even_parts(texts: list[str]) -> None:
    found = split(texts, part_characters=2_000)
    lengths = [len(visible([chapter.text])) for chapter in found.chapters]
    assert found.findings == [f"no headings: cut at paragraph ends into {len(lengths)} parts"]
    assert len(lengths) == round(sum(lengths) / 2_000)
    assert all(abs(length - 2_000) < 900 for length in lengths)
    assert {chapter.text[-1] for chapter in found.chapters} <= set("。”")


def test_nothing_gives_nothing() -> None:
    assert split([]) == split(["", " 　"]) == ChapterSplit([], [], [])


def chinese(number: int) -> str:
    digits = "零一二三四五六七八九"
    if number < 20:
        return ("十" if number >= 10 else "") + (digits[number % 10] if number % 10 else "")
    if number < 100:
        return digits[number // 10] + chinese(10 + number % 10)
    rest = number % 100
    below = ("零" + digits[rest] if rest < 10 else ("一" if rest < 20 else "") + chinese(rest)) if rest else ""
    return digits[number // 100] + "百" + below


def random_book(seed: int, chapters: int) -> tuple[list[str], list[tuple[int, str]]]:
    """Lines of a book in a format drawn by `seed`, full of false headings, and its chapters' numbers and titles."""
    draw = random.Random(seed)
    unit = draw.choice("章回节话")
    script = draw.choice([chinese, str, "{:03d}".format])
    separator = draw.choice([" ", "　", "：", "  ", "、", "", " · "])
    indent, paragraph_indent = draw.choice(["", "　　", "    "]), draw.choice(["", "　　", "    ", "\t"])
    before, behind = draw.choice([("", "")] * 3 + [("正文 ", ""), ("雪夜 ", ""), ("【", "】"), ("=== ", " ===")])
    blank_lines, titled, below = [""] * draw.randint(0, 2), draw.random() < 0.8, not before and draw.random() < 0.2
    volume_length, contents = draw.choice([0, 0, 40]), draw.random() < 0.3
    lines, expected, entries = [], [], []
    for place in range(chapters):
        number = place + 1
        if volume_length and place % volume_length == 0:
            entries.append(f"第{chinese(place // volume_length + 1)}卷 {draw.choice(['山雨', '风', '归人'])}")
            lines += [indent + entries[-1], *blank_lines]
        if volume_length:
            number = place % volume_length + 1
        title = (
            "".join(draw.choices("雪夜归人河灯山雨欲来风满楼旧事重提故园春深远行客", k=draw.randint(2, 9)))
            if titled
            else ""
        )
        label = f"第{script(number)}{unit}"
        entries.append(label + separator + title)
        lines += (
            [indent + label, indent + title] if below and title else [indent + before + entries[-1].strip() + behind]
        )
        expected.append((number, title))
        paragraphs = [
            paragraph_indent + "".join(draw.choices(SENTENCES, k=draw.randint(1, 5))) for _ in range(draw.randint(4, 8))
        ]
        lines += [*blank_lines, *paragraphs, *blank_lines]
    return (["雪夜", "作者：某人", "目录", *entries, ""] if contents else []) + lines, expected


@pytest.mark.parametrize("seed", range(20))
def test_300_chapters_of_any_format_come_back(seed: int) -> None:
    lines, expected = random_book(seed, 300)
    assert [(chapter.number, chapter.title) for chapter in split(lines).chapters] == expected


ATOMS = [
    *["第", "章", "一", "【", "】", "===", "：", "。", "“", "”", "完", "12", "雪夜", "……", "\u200b", "🙂", "…12"],
    *[
        "第一章",
        "第二章",
        "第三章 雪",
        "　　",
        "  ",
        "二、",
        "三. ",
        "正文 ",
        "第一卷 ",
        "卷二",
        "上卷",
        "楔子",
        "番外一",
        "目录",
    ],
    *[
        "hello",
        "World",
        "\t",
        "001 ",
        "他走了。",
        "她说：“好。”",
        "第五节",
        "第一部 山 第四章",
        "（第一章完）",
        "第1-3章",
        "\x1c",
    ],
    *[
        "Chapter 3",
        "内容简介",
        "作者：某",
        "雪" * 36,
        "　　" + "雪" * 34,
        "话说",
        "\u2028",
        "二十章 x",
        "第一章 第二节",
        "第0章",
    ],
    *["第○章", *PROSE, "天色渐渐暗了，他走了。" * 400],
]


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.sampled_from(ATOMS), max_size=5).map("".join) | st.text(max_size=20), max_size=40),
    st.booleans(),
    st.sampled_from([50, 500, 5_000]),
)
def test_no_character_is_lost_or_made_up(lines: list[str], twice: bool, part_characters: int) -> None:
    split([text.replace("\n", " ") for text in lines] * (1 + twice), part_characters=part_characters)
