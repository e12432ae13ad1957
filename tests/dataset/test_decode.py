"""Decoding gives back what was encoded, all but the damaged characters, whose bytes it names; or it refuses."""

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dataset.decode import Decoded, decode_text, decode_tolerant, likeliest_encoding
from dataset.mending import BadBytes, find_shifted
from novelgpt.settings.errors import UserError

NOVELS = Path(__file__).resolve().parents[3] / "shared" / "data" / "novels"

SIMPLIFIED = (
    "　　山里的雪下了一整夜，到天亮才停住。老人推开门，看见院子里有一行小小的脚印，从篱笆外面一直走到灶房的窗下。\n"
    "　　“谁来过？”他问。没有人回答，只有风在松树上面响。他想起去年冬天也是这样，那孩子说要去找他父亲，再也没有回来。\n"
    "　　他把灯点上，坐下来等着。“我知道你会回来的，”他对着那扇窗说，“不管走了多远。”\n"
)
TRADITIONAL = (
    "　　山裡的雪下了一整夜，到天亮纔停住。老人推開門，看見院子裡有一行小小的腳印，從籬笆外面一直走到灶房的窗下。\n"
    "　　「誰來過？」他問。沒有人回答，只有風在松樹上面響。他想起去年冬天也是這樣，那孩子說要去找他的父親，沒有回來。\n"
    "　　他把燈點上，坐下來等著。「我知道你會回來的，」他對著那扇窗說，「不管走了多遠。」\n"
)
RARE = "　　他叫𠮷野，家在㐀山下，姓氏是镕，那𪚥字没有人认得。\n"
HONG_KONG = "　　佢哋喺嗰度，唔係啩？啲人話冇問題，咁我就嚟喇。㗎仔攞咗啲嘢。\n"
ENCODINGS = {
    "utf-8": SIMPLIFIED + RARE + TRADITIONAL,
    "gb18030": SIMPLIFIED + RARE,
    "big5hkscs": TRADITIONAL + HONG_KONG,
    "utf-16-le": SIMPLIFIED + RARE + TRADITIONAL,
    "utf-16-be": SIMPLIFIED + RARE + TRADITIONAL,
}
MARKS = {"utf-8-sig": b"\xef\xbb\xbf", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}


def clean_files() -> dict[str, tuple[bytes, str, str]]:
    """Name -> bytes, text, encoding."""
    files = {}
    for encoding, text in ENCODINGS.items():
        for name, end in {"LF": "\n", "CRLF": "\r\n", "CR": "\r"}.items():
            files[f"{encoding} {name}"] = (text.replace("\n", end).encode(encoding), text, encoding)
        mixed = "".join(line + end for line, end in zip(text.split("\n"), "\n\r\n\r\r\n\r\n\n", strict=False))
        expected = mixed.replace("\r\n", "\n").replace("\r", "\n")
        files[f"{encoding} mixed ends"] = (mixed.encode(encoding), expected, encoding)
        files[f"{encoding} one line"] = (text.replace("\n", "").encode(encoding), text.replace("\n", ""), encoding)
        files[f"{encoding} 12 characters"] = (text[3:15].encode(encoding), text[3:15], encoding)
        files[f"{encoding} long"] = (text.encode(encoding) * 99, text * 99, encoding)
    for encoding, mark in MARKS.items():
        text = ENCODINGS[encoding.removesuffix("-sig")]
        body = text.encode(encoding.removesuffix("-sig"))
        files[f"{encoding} marked"] = (mark + body, text, encoding)
        files[f"{encoding} marked, joined"] = (mark + body + mark + body, text + text, encoding)
        one = text[2].encode(encoding.removesuffix("-sig"))
        files[f"{encoding} marked, 1 character"] = (mark + one, text[2], encoding)
    files |= {
        "gb18030 marked": (("\ufeff" + SIMPLIFIED).encode("gb18030"), SIMPLIFIED, "gb18030"),
        "traditional in gb18030": (TRADITIONAL.encode("gb18030"), TRADITIONAL, "gb18030"),
        "rare characters in gb18030": ((RARE * 9).encode("gb18030"), RARE * 9, "gb18030"),
        "Hong Kong characters": ((HONG_KONG * 9).encode("big5hkscs"), HONG_KONG * 9, "big5hkscs"),
        "gb18030 that is valid utf-8": ("说时为说，".encode("gb18030")[:8], "说时为说", "gb18030"),
        "latin letters": ("Café, déjà vu — “naïve”.\n".encode(), "Café, déjà vu — “naïve”.\n", "utf-8"),
        "ascii": (b"this app can break\n", "this app can break\n", "utf-8"),
        "one hanzi": ("我".encode(), "我", "utf-8"),
        "three hanzi in gb18030": ("我的人".encode("gb18030"), "我的人", "gb18030"),
        "short utf-16": ("也有人来看一看他。\n".encode("utf-16-le"), "也有人来看一看他。\n", "utf-16-le"),
        "ascii, then hanzi": (b"x\n" * 9999 + SIMPLIFIED.encode("gb18030"), "x\n" * 9999 + SIMPLIFIED, "gb18030"),
    }  # fmt: skip
    return files


def damaged_files() -> dict[str, tuple[bytes, Decoded]]:
    """Name -> bytes, what they decode to."""
    files = {}
    for encoding, text in ENCODINGS.items():
        body = text * 9  # more than a thousand bytes, of which one may be bad
        at = len(text) * 3 + text.index("面")
        before, character, after = (part.encode(encoding) for part in (body[:at], body[at], body[at + 1 :]))
        rest = body[:at] + body[at + 1 :]
        wide = encoding.startswith("utf-16")
        # For UTF-16 half of a pair, as nearly all other pairs of bytes are characters.
        bad = {"utf-16-le": b"\x01\xd9", "utf-16-be": b"\xd9\x01"}.get(encoding, b"\xff" + character[1:])
        files[f"{encoding}: a wrong byte"] = (
            before + bad + after,
            Decoded(rest, encoding, (BadBytes(len(before), bad),)),
        )
        bad = bad if wide else b"\xff"
        inserted = Decoded(body, encoding, (BadBytes(len(before), bad),))
        files[f"{encoding}: a byte too many"] = (before + bad + character + after, inserted)
        for last in "松" if encoding == "big5hkscs" else "松𠮷":
            whole, code = body.encode(encoding), last.encode(encoding)
            for size in range(1, len(code)):
                cut = Decoded(body, encoding, (BadBytes(len(whole), code[:size]),))
                files[f"{encoding}: {last} cut after byte {size}"] = (whole + code[:size], cut)
        nul = "\0".encode(encoding)
        files[f"{encoding}: a NUL"] = (
            before + nul + character + after,
            Decoded(body, encoding, (BadBytes(len(before), nul),)),
        )
        padded = Decoded(body, encoding, (BadBytes(len(body.encode(encoding)), b"\0" * 512),))
        files[f"{encoding}: NULs at the end"] = (body.encode(encoding) + b"\0" * 512, padded)
        files[f"{encoding}: short"] = (
            text[:40].encode(encoding) + code[:1],
            Decoded(text[:40], encoding, (BadBytes(len(text[:40].encode(encoding)), code[:1]),)),
        )
    marked = b"\xef\xbb\xbf" + SIMPLIFIED.encode() * 9
    files["utf-8-sig: a byte too many"] = (
        marked + b"\xff\n",
        Decoded(SIMPLIFIED * 9 + "\n", "utf-8-sig", (BadBytes(len(marked), b"\xff"),)),
    )
    many = SIMPLIFIED.encode() * 30
    files["utf-8: bad bytes far apart"] = (
        b"\xff" + many + b"\xfe\xfe" + many,
        Decoded(SIMPLIFIED * 60, "utf-8", (BadBytes(0, b"\xff"), BadBytes(len(many) + 1, b"\xfe\xfe"))),
    )
    return files  # fmt: skip


RANDOM = random.Random(7)
REFUSED = {
    "empty": b"",
    "blank": b" \r\n\t\n",
    "blank in utf-16": "　\n".encode("utf-16"),
    "a mark alone": b"\xef\xbb\xbf",
    "NULs alone": b"\0" * 4096,
    "like a PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x02\0\0\0\x02\0\x08\x06\0\0\0" + RANDOM.randbytes(4000),
    "like a ZIP": b"PK\x03\x04\x14\0\0\0\x08\0" + RANDOM.randbytes(3000),
    **{f"{size} random bytes": RANDOM.randbytes(size) for size in (100, 1000, 10_000, 1_000_000)},
    "random bytes behind a mark": b"\xff\xfe" + RANDOM.randbytes(5000),
    "text with NULs everywhere": b"\0".join(SIMPLIFIED[i].encode() for i in range(100)),
    "two encodings": SIMPLIFIED.encode("gb18030") * 9 + SIMPLIFIED.encode() * 9,
    "every hundredth byte": b"".join(SIMPLIFIED[i : i + 33].encode() + b"\xff" for i in range(0, 150, 33)) * 9,
    "a text, then a picture": SIMPLIFIED.encode() + RANDOM.randbytes(3000),
}  # fmt: skip


@pytest.mark.parametrize("name", clean_files())
def test_clean_files_come_back_exactly(name: str) -> None:
    data, text, encoding = clean_files()[name]
    assert decode_tolerant(data, name) == Decoded(text, encoding, ())


FIRST, LAST = "他沿着河边慢慢地走，心里想着白天的事。", "“你为什么不去？”她问。"
ENGLISH = "He walked along the river and thought about the day. Nobody came to see him, and the light went out. "
# Between two sentences, far more of what says nothing about the encoding.
FILLINGS = {
    "blanks": " " * 5_000, "line ends": "\n" * 5_000, "digits": "0" * 5_001, "dashes": "-" * 5_000,
    "letters": "e" * 5_000, "pairs": "- " * 3_000, "words": "all work " * 500, "wide blanks": "　" * 5_000,
    "dots": "…" * 5_000, "numbers": "10 2003 40 " * 500, "English": ENGLISH * 50,
}  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("edges", [(FIRST, LAST), ("你好", "再见")], ids=["sentences", "words"])
def test_what_stands_between_two_sentences_decides_no_encoding(
    encoding: str, filling: str, edges: tuple[str, str]
) -> None:
    if encoding == "big5hkscs":
        edges = ("她沒有回答，只是看著遠處的燈火。", "「你為什麼不去？」她問。")
    text = FILLINGS[filling].join(edges)
    if text.encode(encoding).isascii():
        pytest.skip("also reads as English")
    assert decode_tolerant(text.encode(encoding), "x") == Decoded(text, encoding, ())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_many_nuls_at_the_end_decide_no_encoding(encoding: str) -> None:
    body = ENCODINGS[encoding].encode(encoding)
    padding = BadBytes(len(body), b"\0" * 65_536)
    assert decode_tolerant(body + padding.data, "x") == Decoded(ENCODINGS[encoding], encoding, (padding,))


@pytest.mark.parametrize("damage", [b"\xff", b"\x80", b"\xe9", b"\x92", b"\0"])
@pytest.mark.parametrize("behind", ["", "t", " "])
def test_a_bad_byte_in_english_is_named_and_makes_no_hanzi(damage: bytes, behind: str) -> None:
    front, back = ENGLISH.encode() * 20, behind.encode() + ENGLISH.encode() * 20
    expected = Decoded((front + back).decode(), "utf-8", (BadBytes(len(front), damage),))
    assert decode_tolerant(front + damage + back, "x") == expected


def test_utf_8_that_is_damaged_around_blanks_stays_utf_8() -> None:
    front = (FIRST + " " * 5_000).encode()
    damaged = decode_tolerant(front + b"\xff" + LAST.encode(), "x")
    assert damaged == Decoded(FIRST + " " * 5_000 + LAST, "utf-8", (BadBytes(len(front), b"\xff"),))


@pytest.mark.parametrize("name", damaged_files())
def test_a_damaged_character_is_left_out_and_named(name: str) -> None:
    data, expected = damaged_files()[name]
    decoded = decode_tolerant(data, name)
    assert decoded.bad_bytes == expected.bad_bytes
    assert decoded == expected
    for run in decoded.bad_bytes:
        assert data[run.offset : run.offset + len(run.data)] == run.data


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_in_one_line(name: str) -> None:
    data = REFUSED[name]
    with pytest.raises(UserError) as caught:
        decode_tolerant(data, "book.txt")
    cause = caught.value.cause
    assert cause.startswith("book.txt")
    assert "\n" not in cause
    assert caught.value.remedy
    if data.strip(b" \r\n\t\0") and name not in ("blank in utf-16", "a mark alone"):
        assert "tried" in cause
        assert " at offset " in cause


def test_the_first_bad_byte_is_the_one_named() -> None:
    good = SIMPLIFIED.encode()
    with pytest.raises(UserError, match=rf"byte 0xff at offset {len(good)} "):
        decode_tolerant(good + b"\xff" + good + b"\xfe" * 99, "book.txt")


def test_a_thousandth_may_be_bad_and_no_more() -> None:
    unit = SIMPLIFIED.encode()
    allowed = (b"\xff" + unit * 3) * 99
    assert decode_tolerant(allowed, "x").text == SIMPLIFIED * 297
    with pytest.raises(UserError):
        decode_tolerant((b"\xff" + unit) * 99, "x")


def test_strict_and_tolerant_agree_on_clean_files() -> None:
    for name, (data, text, _) in clean_files().items():
        # Without a mark, decode_text knows no UTF-16, and takes as UTF-8 what can be.
        if ("utf-16" not in name or "marked" in name) and name != "gb18030 that is valid utf-8":
            assert decode_text(data, name).replace("\ufeff", "") == text
    for name, (data, _) in damaged_files().items():
        if "NUL" not in name:
            with pytest.raises(UserError):
                decode_text(data, name)


def hanzi(codec: str, *codes: range) -> list[str]:
    """The hanzi at these double bytes."""
    found = (code.to_bytes(2, "big").decode(codec, "ignore") for block in codes for code in block)
    return [character for character in found if len(character) == 1 and character >= "\u3400"]


DAILY = {"gb18030": hanzi("gb2312", range(0xB0A1, 0xD7FA)), "big5hkscs": hanzi("big5", range(0xA440, 0xC67F))}
ANY = {
    "gb18030": st.characters(min_codepoint=0x3400, max_codepoint=0x2FFFF, categories=["Lo"]),
    "big5hkscs": st.sampled_from(hanzi("big5hkscs", range(0x8740, 0xA0FF), range(0xA440, 0xFEFF))),
}


@st.composite
def mixtures(draw: st.DrawFn, encoding: str) -> str:
    """At least 24 hanzi in any order, most of them in daily use (in two encodings that alone tells them apart)."""
    script = encoding if encoding in DAILY else draw(st.sampled_from(sorted(DAILY)))
    daily = st.sampled_from(DAILY[script])
    characters = st.one_of(daily, daily, daily, daily, daily, st.sampled_from("，。：“”「」？！\n　"), ANY[script])
    return "".join(draw(st.lists(daily, min_size=24)) + draw(st.lists(characters)))


@st.composite
def proses(draw: st.DrawFn, encoding: str) -> str:
    """Lines of prose with any hanzi of the encoding at their ends, more than a thousand bytes."""
    lines = draw(st.lists(st.sampled_from(ENCODINGS[encoding].split("\n")[:-1]), min_size=1))
    rare = [draw(ANY["big5hkscs" if encoding == "big5hkscs" else "gb18030"]) for _ in lines]
    text = "".join(f"{line}{one}\n" for line, one in zip(lines, rare, strict=True))
    return text * (1 + 1000 // len(text))


def is_utf_8(body: bytes) -> bool:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_text_comes_back_exactly(encoding: str, data: st.DataObject) -> None:
    text = data.draw(st.one_of(mixtures(encoding), proses(encoding)))
    body = text.encode(encoding)
    # A few characters in UTF-16 can also be read as English, all of it or all but a letter ("啊" * 24 + "菇").
    assume(encoding == "utf-8" or not is_utf_8(body))
    assert decode_tolerant(body, "x") == Decoded(text, encoding, ())


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_wrong_byte_changes_only_what_is_around_it(encoding: str, data: st.DataObject) -> None:
    text = data.draw(proses(encoding))
    body = text.encode(encoding)
    at = data.draw(st.integers(0, len(body) - 1))
    damaged = body[:at] + bytes([data.draw(st.integers(0, 255))]) + body[at + 1 :]
    decoded = decode_tolerant(damaged, "x")
    assert decoded.encoding == encoding
    for run in decoded.bad_bytes:
        assert damaged[run.offset : run.offset + len(run.data)] == run.data
    place = len(body[:at].decode(encoding, "ignore"))
    last = place + 4
    if encoding in DAILY and damaged.decode(encoding, "ignore").encode(encoding) == damaged:
        # What decodes strictly is taken as it is: double bytes may be paired up wrongly, to the line's end at most.
        last = text.find("\n", text.find("\n", place) + 1) % len(text)
    first = max(0, place - 3)
    assert decoded.text[:first] == text[:first]
    assert decoded.text.endswith(text[last + 1 :])


def test_what_became_valid_nonsense_is_found_with_its_meaning() -> None:
    prose = SIMPLIFIED.split("\n")[1].lstrip("　")
    line = "镕" + prose + "镕"
    shifted = (b"a" + line.encode("gb18030")[3:]).decode("gb18030", "ignore")
    ((number, text, reading),) = find_shifted("一\n二\n" + shifted + "\n三")
    assert (number, text) == (3, shifted)
    assert prose[4:-4] in reading
    assert list(find_shifted("\n".join(ENCODINGS.values()))) == []


@pytest.mark.skipif(not NOVELS.is_dir(), reason="the real novels are not here")
@pytest.mark.parametrize("path", sorted(NOVELS.glob("*.txt")), ids=lambda path: path.name)
def test_real_novels(path: Path) -> None:
    data = path.read_bytes()
    kind = path.name.split(".")[-2]
    encoding = {"gbk": "gb18030", "big5": "big5hkscs", "utf8": "utf-8", "utf8bom": "utf-8-sig"}[kind]
    decoded = decode_tolerant(data, path.name)
    assert (decoded.encoding, decoded.bad_bytes) == (encoding, ())
    assert decoded.text == decode_text(data, path.name)
    twin = path.with_name(path.name.replace(f".{kind}.", f".from_{kind}.utf8."))
    if twin.exists():
        assert decoded.text == decode_tolerant(twin.read_bytes(), twin.name).text
    # Any stretch of 12 characters and more is told from its bytes alone.
    choose = random.Random(path.name)
    for length in (12, 20, 50, 200):
        for begin in (choose.randrange(len(decoded.text) - length) for _ in range(20)):
            stretch = decoded.text[begin : begin + length].strip()
            if len(stretch) == length and not any("\ue000" <= character < "\uf900" for character in stretch):
                body = stretch.encode(encoding.removesuffix("-sig"))
                assert body.decode(likeliest_encoding(body)) == stretch
