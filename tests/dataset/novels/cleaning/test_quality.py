"""Which texts are fit to train on: figures of real books against scrambled and wrongly decoded ones."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from dataset.novels.cleaning.quality import FEWEST_CHARACTERS, WINDOW, judge

ROOT = Path(__file__).resolve().parents[4]
SAMPLES = sorted((ROOT / "dataset" / "samples" / "novels").glob("*.txt"))
SHARED = ROOT.parent / "shared" / "data"
ENCODINGS = {"gbk": "gb18030", "big5": "big5hkscs", "utf8": "utf-8-sig", "utf8bom": "utf-8-sig"}
NOVELS = sorted((SHARED / "novels").glob("*.txt"))

MODERN = SAMPLES[0].read_text(encoding="utf-8")
POEM = (
    "云淡风轻近午天，傍花随柳过前川。时人不识余心乐，将谓偷闲学少年。"
    "胜日寻芳泗水滨，无边光景一时新。等闲识得东风面，万紫千红总是春。"
)
CLASSICAL = (
    "昔有士人居山中，夜读书，闻户外有声，启视之，无所见。复坐，声又作，如人长叹。士人曰：君若有冤，何不入而言之？"
    "俄有白衣者揖于灯下，曰：仆亡于此山三十年矣，遗骨在东涧松下，愿公怜而葬之。士人诺，明日往寻，果得枯骨，遂葬焉。"
    "其夜复至，再拜而谢曰：公之恩，没齿不忘。他日若渡江，遇黑云起于西，慎勿行也。后十年，士人将渡，忽忆其言，遂止。"
    "是日风大作，舟皆覆，独士人得免。由是乡人皆知鬼亦有信，岁时祀之不绝。"
)
DECODINGS = [
    ("gb18030", "big5hkscs"),
    ("gb18030", "utf-16-le"),
    ("gb18030", "shift_jis"),
    ("gb18030", "euc_kr"),
    ("gb18030", "latin-1"),
    ("utf-8", "gb18030"),
    ("utf-8", "big5hkscs"),
    ("utf-8", "latin-1"),
    ("utf-8", "cp1252"),
    ("utf-16-le", "gb18030"),
    ("utf-16-le", "utf-16-be"),
]


def read(path):
    return path.read_bytes().decode(ENCODINGS[path.name.split(".")[-2]])


def shuffled(text, seed=0):
    characters = list(text)
    random.Random(seed).shuffle(characters)
    return "".join(characters)


def share_of_repeated_windows(text):
    text = "".join(text.split())
    windows = Counter(text[place : place + WINDOW] for place in range(len(text) - WINDOW + 1))
    return sum(count for count in windows.values() if count > 1) / max(sum(windows.values()), 1)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_the_samples_and_their_pages_are_good(path):
    text = path.read_text(encoding="utf-8")
    assert judge(text).refused == "" and judge(text).script == "simplified"
    for length in (300, 1_000, 4_000):
        for start in range(0, len(text) - length, 400):
            assert judge(text[start : start + length]).refused == ""


def test_verse_classical_prose_and_text_without_punctuation_are_good():
    assert judge(POEM * 2).refused == "" and judge(CLASSICAL).refused == ""
    assert judge("".join(filter(str.isalnum, MODERN))).refused == ""


def test_dialogue_full_of_marks_and_a_little_english_is_good():
    assert judge("“你……你来了？！”“嗯——来了。”“OK，那我们走吧！”" * 20).refused == ""


@pytest.mark.parametrize(("written", "read_as"), DECODINGS)
def test_a_wrong_decoding_is_refused(written, read_as):
    for text in (MODERN, MODERN[:1_500], CLASSICAL * 4):
        assert judge(text.encode(written).decode(read_as, "ignore")).refused


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_characters_are_refused(seed):
    assert "form no words" in judge(shuffled(MODERN, seed)).refused
    assert "form no words" in judge(shuffled(MODERN, seed)[:4_000]).refused


def test_shifted_bytes_in_every_few_lines_are_refused():
    """As a scraper does that loses single bytes of UTF-16: a part of the words stays readable."""
    pieces = [MODERN[start : start + 12] for start in range(0, len(MODERN), 12)]
    scrambled = [
        (b"\x00" + piece.encode("utf-16-le")[:-1]).decode("utf-16-le", "ignore") if number % 2 else piece
        for number, piece in enumerate(pieces)
    ]
    assert judge("".join(scrambled)).refused


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "too short"),
        ("他来了。" * 5, "too short"),
        ("字" * (FEWEST_CHARACTERS - 1), "too short"),
        ("It was a dark and stormy night; the rain fell in torrents. " * 50, "not Chinese"),
        ("吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 20, "not Chinese"),
        ("나는 고양이로소이다. 이름은 아직 없다. " * 50, "not Chinese"),
        ("Я кот, и имени у меня пока нет. " * 50, "not Chinese"),
        (MODERN[:3_000] + "锟斤拷" * 30, "锟斤拷"),
        (MODERN[:3_000] + "烫烫烫烫烫烫" * 20, "锟斤拷"),
        ("\ue000\ue123" * 300 + MODERN[:1_500], "hardly found"),
    ],
)
def test_the_reason_is_given(text, reason):
    assert reason in judge(text).refused and "\n" not in judge(text).refused


def test_chinese_share_is_of_what_is_no_white_space():
    assert judge("天地 a\n，\u3000玄黄").chinese_share == pytest.approx(4 / 6)


def test_script_is_that_of_the_characters_only_one_has():
    assert judge("这个人说话").script == "simplified"
    assert judge("這個人說話").script == "traditional"
    assert judge("天地玄黄").script == judge("").script == "none"


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_repetition_is_the_share_of_windows_that_occur_more_than_once(copies):
    text = MODERN[:9_000] + MODERN[1_000:3_000] * copies
    assert judge(text).repetition == pytest.approx(share_of_repeated_windows(text), abs=1e-9)


def test_repetition_of_a_long_text_is_estimated():
    page = "".join(random.Random(1).choices("".join(MODERN.split()), k=120_000))
    text = page + page[:30_000]
    assert judge(text).repetition == pytest.approx(share_of_repeated_windows(text), rel=0.03)
    assert judge(page).repetition < 0.001


def test_extremes_of_repetition():
    assert judge("天" * 500).repetition == 1.0
    assert judge("天地玄黄").repetition == 0.0


@pytest.mark.skipif(not NOVELS, reason="no real novels beside the checkout")
@pytest.mark.parametrize("path", NOVELS, ids=lambda path: path.name)
def test_real_novels_are_good_and_their_scrambles_are_not(path):
    text = read(path)
    quality = judge(text)
    assert quality.refused == "" and 0.8 < quality.chinese_share < 0.9
    traditional = ("nahan", "panghuang", "guanchang", "rulin", "yulihun", "ernv")
    assert quality.script == ("traditional" if path.name.startswith(traditional) else "simplified")
    page = text[20_000:50_000]
    assert judge(page).refused == ""
    assert judge(shuffled(page)).refused
    for written, read_as in DECODINGS:
        assert judge(page.encode(written, "ignore").decode(read_as, "ignore")).refused, (written, read_as)


@pytest.mark.skipif(not (SHARED / "messy").is_dir(), reason="no scrambled file beside the checkout")
def test_a_really_scrambled_file_is_refused():
    text = (SHARED / "messy" / "garbage_mojibake.utf8.txt").read_text(encoding="utf-8")
    assert "hardly found in Chinese books" in judge(text).refused
    assert all(judge(text[start : start + 4_000]).refused for start in range(0, len(text) - 4_000, 2_000))
