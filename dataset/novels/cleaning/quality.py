"""Recognises text that is not Chinese prose: other languages, wrongly decoded files, scrambled ones."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from dataset.mending import common_characters
from dataset.novels.normalized import character_codes

WINDOW = 20
"""Characters of the windows whose repetition is counted."""
FEWEST_CHARACTERS = 100
"""Min Chinese characters of a book."""

# Thresholds between values of real novels (classical and modern, both scripts, with poems) and of unusable text.
_LOWEST_CHINESE = 0.5
"""Of the letters. Novels: 0.99; GB18030 read as Korean 0.4 to 0.46, as UTF-16 0.1, other languages 0."""
_LOWEST_FREQUENT = 0.25
"""Novels: 0.54 (classical) to 0.73, a page of 1,500 characters 0.47; GBK read as Big5, UTF-8 as GBK: below 0.06."""
_HIGHEST_STRANGE = 0.15
"""Novels: below 0.01, the worst page of a damaged one 0.1; scrambled or wrongly decoded 0.4 and more."""
_HIGHEST_DAMAGE = 0.01
"""Novels: 0."""
_HIGHEST_PAIRS = 0.98
"""Novels: 0.64 to 0.80, pages of 4,000 characters up to 0.94; shuffled characters 0.995 to 1.01."""
_FEWEST_FOR_PAIRS = 2_000
"""Min Chinese characters for the share of pairs to be reliable."""
_SAMPLE = 1 << 15
"""Chinese characters from which the share of pairs is measured."""
_MAX_WINDOWS = 1 << 16
"""Max windows that are compared, so that memory is bounded: of longer texts, those with certain hashes."""

# Characters that every Chinese book is full of, modern and classical, both scripts.
_FREQUENT = (
    "的一是了不在有人我他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能好都然没日于"
    "起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长知民样现分将外但身些与高意进把法此实回二理美点月明"
    "其种声全工己话儿者向情部正名定女问力机给等几很业最间新什打便位因重被走电四第门相次东政海口使教西再平真听世气信北少关并内加"
    "化由却代军产入先山五太水万市眼体别处总才场师书比住员九笑性通目华报立马命张活难神数件安表原车白应路期叫死常提感金何更反合"
    "放做系计或司利受光王果亲界及今京务制解各任至清物台象记边共风战干接它许八特觉望直服毛林题建南度统色字请交爱让认算论百吃义"
    "這個來國到說們為時會對過學還發當無開經頭動兩長樣現將與進實點聲話兒問機給間業門東聽氣關並內軍產萬電體別處總場師書員華報馬"
    "張難數應親覺許題統請愛讓認論義曰吾汝矣焉乎哉兮云乃即若則故亦皆未且非欲豈令遂復惟卿君臣爺媽哥姐妹娘婆丫嬌裡裏著麼沒後幾"
    "爷妈则岂复娇谁誰倒呢吧罢罷吗嗎啊呀哪咱忙刚剛吩咐坐站飯饭酒茶夜晚早忽取拿拉送帶带请跟往望喜怒哭語语言告訴诉敢怕怎"
)  # fmt: skip
# Characters that only one script has, and their counterparts in the other.
_SIMPLIFIED_ONLY = (
    "这个们来时会对过学还发当无开经头动两长样现将与进实点声话儿问机给间业门东听气关并内军产万电体别处总场师书员华报马张难数应"
    "亲觉许题统请爱让认论义国说为么没岁爷妈岂娇谁罢吗刚饭带语诉边见车风战计记务条战号钱银铁钟阳阴难双义乌乐买卖云龙凤兰兴"
)  # fmt: skip
_TRADITIONAL_ONLY = (
    "這個們來時會對過學還發當無開經頭動兩長樣現將與進實點聲話兒問機給間業門東聽氣關並內軍產萬電體別處總場師書員華報馬張難數應"
    "親覺許題統請愛讓認論義國說為麼沒歲爺媽豈嬌誰罷嗎剛飯帶語訴邊見車風戰計記務條戰號錢銀鐵鐘陽陰難雙義烏樂買賣雲龍鳳蘭興"
)  # fmt: skip
# Traces of wrong decoding: U+FFFD turned into GBK, uninitialised memory, UTF-8 read as Latin-1.
_DAMAGE = ("锟斤拷", "烫烫烫", "屯屯屯", "锘锘锘", "葺葺", "ï¿½", "Ã", "â€", "\ufffd")


class Quality(NamedTuple):
    """The result of `judge`."""

    chinese_share: float
    """Of the characters that are not white space, in [0, 1]."""
    repetition: float
    """Share of the text's windows of 20 characters that it has more than once, in [0, 1]; estimated in long texts."""
    script: str
    """"simplified", "traditional" or "none"."""
    refused: str
    """Why the text is unusable for training, in one line; "" if it is usable."""


def judge(text: str) -> Quality:
    """Judge the whole cleaned text of a book; time is linear in its length."""
    codes = character_codes(text)
    codes = codes[_classes()[codes] != _BLANK]
    counts = np.bincount(codes, minlength=0x10000)
    by_class = np.bincount(_classes(), weights=counts, minlength=_RARE + 1)
    size = max(len(codes), 1)
    characters = int(by_class[[_FREQUENT_HAN, _COMMON, _RARE]].sum())
    # Of all characters but blanks, punctuation and signs, the share of Chinese ones.
    letters = characters / max(float(by_class[_LETTER:].sum()), 1.0)
    # Of the Chinese characters, the share of those that every book is full of.
    frequent = float(by_class[_FREQUENT_HAN]) / max(characters, 1)
    # Characters that Chinese books hardly have: rare Chinese ones, other scripts, private use, control.
    strange = float(by_class[_STRANGE] + by_class[_RARE]) / size
    damage = sum(text.count(mark) * len(mark) for mark in _DAMAGE) / size
    pairs = _pairs(codes)
    too_few = characters < FEWEST_CHARACTERS and len(codes) < 2 * FEWEST_CHARACTERS
    reasons = (
        (too_few, f"too short: {characters} Chinese characters, fewer than {FEWEST_CHARACTERS}"),
        (
            letters < _LOWEST_CHINESE,
            f"mostly not Chinese, or wrongly decoded: {letters:.0%} of its letters are Chinese characters",
        ),
        (damage > _HIGHEST_DAMAGE, f"wrongly decoded: {damage:.0%} of it is garbage such as 锟斤拷"),
        (
            strange > _HIGHEST_STRANGE,
            f"scrambled or wrongly decoded: {strange:.0%} of its characters are hardly found in Chinese books",
        ),
        (
            frequent < _LOWEST_FREQUENT,
            f"scrambled or wrongly decoded: only {frequent:.0%} frequent Chinese characters",
        ),
        (
            pairs > _HIGHEST_PAIRS and characters >= _FEWEST_FOR_PAIRS,
            f"scrambled: its characters form no words ({pairs:.0%} of the pairs that chance would give)",
        ),
    )
    refused = next((reason for applies, reason in reasons if applies), "")
    simplified, traditional = (
        int(counts[character_codes(only)].sum()) for only in (_SIMPLIFIED_ONLY, _TRADITIONAL_ONLY)
    )
    script = "simplified" if simplified > traditional else "traditional" if simplified < traditional else "none"
    return Quality(characters / size, _repetition(codes), script, refused)


_BLANK, _MARK, _LETTER, _STRANGE, _FREQUENT_HAN, _COMMON, _RARE = range(7)

_USUAL_RANGES = (
    *((0x21, 0x7E), (0xA1, 0x17F), (0x2010, 0x2046), (0x2150, 0x218F), (0x2190, 0x21FF), (0x2460, 0x24FF)),
    *((0x2500, 0x266F), (0x3001, 0x30FF), (0xFE30, 0xFE4F), (0xFF01, 0xFF65)),
)


@functools.cache
def _classes() -> np.ndarray:
    """(0x10000,) uint8: the class of each character."""
    classes = np.full(0x10000, _STRANGE, np.uint8)
    for first, last in _USUAL_RANGES:
        classes[first : last + 1] = [_LETTER if chr(code).isalnum() else _MARK for code in range(first, last + 1)]
    classes[0x3400:0xA000] = classes[0xF900:0xFB00] = _RARE
    codes = character_codes(common_characters())
    classes[codes[classes[codes] == _RARE]] = _COMMON
    classes[character_codes(_FREQUENT)] = _FREQUENT_HAN
    classes[[code for code in range(0x10000) if chr(code).isspace()]] = _BLANK
    return classes


def _pairs(codes: np.ndarray) -> float:
    """Distinct pairs of adjacent Chinese characters, relative to those of the same characters shuffled."""
    sample = codes[: 2 * _SAMPLE]
    sample = sample[_classes()[sample] >= _FREQUENT_HAN][:_SAMPLE].astype(np.uint32)
    if len(sample) < 2:
        return 1.0
    shuffled = np.random.default_rng(0).permutation(sample)
    distinct, by_chance = (len(np.unique(some[:-1] << 16 | some[1:])) for some in (sample, shuffled))
    return distinct / by_chance


def _repetition(codes: np.ndarray) -> float:
    """Share of the windows of 20 characters, by their hashes, that occur more than once."""
    windows = max(len(codes) - WINDOW + 1, 0)
    shift = (windows // _MAX_WINDOWS).bit_length()
    # Windows are chosen by their hash, so that all occurrences of one are chosen or none.
    chosen = [
        hashes[hashes >> np.uint64(64 - shift) == 0] if shift else hashes
        for begin in range(0, windows, 1 << 18)
        for hashes in [_window_hashes(codes[begin : begin + (1 << 18) + WINDOW - 1])]
    ]
    together = np.sort(np.concatenate([np.zeros(0, np.uint64), *chosen]))
    equal = together[1:] == together[:-1]
    repeated = np.concatenate([equal, [False]]) | np.concatenate([[False], equal])
    return float(repeated.mean()) if len(together) else 0.0


def _window_hashes(codes: np.ndarray) -> np.ndarray:
    """(len(codes) - 19,) uint64: a polynomial hash of each window, from those of 1, 2, 4, 8, 16 and 4 characters."""
    factor = np.uint64(0x9E3779B97F4A7C15)
    spans = {1: codes.astype(np.uint64) + np.uint64(1)}
    for length in (1, 2, 4, 8):
        half = spans[length]
        spans[2 * length] = half[:-length] * np.uint64(pow(int(factor), length, 1 << 64)) + half[length:]
    count = len(codes) - WINDOW + 1
    whole = spans[16][:count] * np.uint64(pow(int(factor), 4, 1 << 64)) + spans[4][16 : 16 + count]
    return (whole ^ (whole >> np.uint64(32))) * factor
