"""Every kind of file gives the books that are in it, exactly; what cannot be used is refused in one line."""

import gzip
import io
import json
import random
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dataset.mending import BadBytes
from dataset.novels.records import BookSection, RawBook
from dataset.novels.sources.sources import FREE_BYTES, list_folder, read_books
from novelgpt.settings.errors import UserError

SIMPLIFIED = "第一回　雪夜\n　　山里的雪下了一整夜，到天亮才停住。“谁来过？”他问。\n" * 3
TRADITIONAL = "第一回　雪夜\n　　山裡的雪下了一整夜，到天亮纔停住。「誰來過？」他問。\n" * 3


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def zipped_by_old_program(members: dict[str, bytes], encoding: str) -> bytes:
    """Names in the code page of a Chinese Windows, without the flag for UTF-8."""
    data = zipped({f"{index:04}".ljust(len(name.encode(encoding)), "x"): one
                   for index, (name, one) in enumerate(members.items())})  # fmt: skip
    for index, name in enumerate(members):
        data = data.replace(f"{index:04}".ljust(len(name.encode(encoding)), "x").encode(), name.encode(encoding))
    return data


def encrypted(data: bytes) -> bytes:
    """A .zip whose flags say that its only member is encrypted."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        local, central = archive.infolist()[0].header_offset + 6, archive.start_dir + 8
    changed = bytearray(data)
    for offset in (local, central):
        struct.pack_into("<H", changed, offset, struct.unpack_from("<H", changed, offset)[0] | 1)
    return bytes(changed)


def rows(*records: object) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


CONTAINER = (
    b'<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    b'<rootfile full-path="OEBPS/content.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)


def epub(pages: dict[str, str | bytes], contents: str = "", version: int = 3, **more: bytes) -> bytes:
    """An epub of `pages` in order; `contents` is the body of the nav (EPUB 3) or of the ncx (EPUB 2)."""
    kind = 'media-type="application/xhtml+xml"'
    manifest = "".join(f'<item id="p{i}" href="{name.replace(" ", "%20")}" {kind}/>' for i, name in enumerate(pages))
    spine = "".join(f'<itemref idref="p{index}"/>' for index in range(len(pages)))
    toc = f'<item id="nav" href="nav.xhtml" properties="nav" {kind}/>'
    if version == 2:
        toc = '<item id="ncx" href="toc.ncx" media-type="application/x-dtbncx+xml"/>'
    package = (
        '<?xml version="1.0" encoding="utf-8"?><package xmlns="http://www.idpf.org/2007/opf"><metadata/>'
        f"<manifest>{toc if contents else ''}{manifest}</manifest>"
        f'<spine><itemref idref="nav"/>{spine}</spine></package>'
    )
    ncx = '<?xml version="1.0"?><!DOCTYPE ncx PUBLIC "-//NISO//DTD ncx 2005-1//EN" "ncx-2005-1.dtd">'
    members: dict[str, bytes] = {"mimetype": b"application/epub+zip", "META-INF/container.xml": CONTAINER}
    members["OEBPS/content.opf"] = package.encode()
    if contents and version == 3:
        ops = 'xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"'
        members["OEBPS/nav.xhtml"] = f'<html {ops}><body><nav epub:type="toc">{contents}</nav></body></html>'.encode()
    elif contents:
        members["OEBPS/toc.ncx"] = f'{ncx}<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/">{contents}</ncx>'.encode()
    for name, page in pages.items():
        members[f"OEBPS/{name}"] = page if isinstance(page, bytes) else page.encode()
    return zipped(members | {name.replace("__", "/"): data for name, data in more.items()})


def page(body: str) -> str:
    return (
        '<?xml version="1.0" encoding="utf-8"?><!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.1//EN" "x.dtd">'
        f"<html><head><title>不是正文</title><style>p {{color: red}}</style></head><body>{body}</body></html>"
    )


def point(title: str, href: str) -> str:
    return f'<navPoint><navLabel><text>{title}</text></navLabel><content src="{href}"/></navPoint>'


GBK, BIG5 = SIMPLIFIED.encode("gb18030"), TRADITIONAL.encode("big5hkscs")
PLAIN = {  # file name -> content, books
    "书.txt": (GBK, [RawBook("书", "书.txt", SIMPLIFIED, "gb18030")]),
    "深/书 一 .TXT": (BIG5, [RawBook("书 一", "深/书 一 .TXT", TRADITIONAL, "big5hkscs")]),
    "bad.txt": (GBK + b"\xff", [RawBook("bad", "bad.txt", SIMPLIFIED, "gb18030", (BadBytes(len(GBK), b"\xff"),))]),
    "书.txt.gz": (gzip.compress(GBK), [RawBook("书", "书.txt.gz", SIMPLIFIED, "gb18030")]),
    "书.gz": (gzip.compress(GBK[:50]) + gzip.compress(GBK[50:]), [RawBook("书", "书.gz", SIMPLIFIED, "gb18030")]),
    "集.zip": (
        zipped({"一/甲.txt": GBK, "二/乙.TXT": BIG5, "图.jpg": b"\xff\xd8", "__MACOSX/._甲.txt": b"\0\5", "空/": b""}),
        [
            RawBook("甲", "集.zip!一/甲.txt", SIMPLIFIED, "gb18030"),
            RawBook("乙", "集.zip!二/乙.TXT", TRADITIONAL, "big5hkscs"),
        ],
    ),
    "gbk.zip": (
        zipped_by_old_program({"小说/呼兰河传.txt": GBK, "小说/生死场.txt": GBK}, "gb18030"),
        [RawBook(name, f"gbk.zip!小说/{name}.txt", SIMPLIFIED, "gb18030") for name in ("呼兰河传", "生死场")],
    ),
    "big5.zip": (
        zipped_by_old_program({"小說/官場現形記.txt": BIG5}, "big5hkscs"),
        [RawBook("官場現形記", "big5.zip!小說/官場現形記.txt", TRADITIONAL, "big5hkscs")],
    ),
    "up.zip": (zipped({"../../up.txt": GBK}), [RawBook("up", "up.zip!../../up.txt", SIMPLIFIED, "gb18030")]),
    "bz.zip": (zipped({"a.txt": GBK}, zipfile.ZIP_BZIP2), [RawBook("a", "bz.zip!a.txt", SIMPLIFIED, "gb18030")]),
    "行.jsonl": (
        rows(
            {"text": "甲一\r\n甲", "book": "甲", "chapter": "第一回", "title": "雪"},
            {"text": "甲二", "book": "甲", "chapter": 2},
            {"text": "乙", "book": "乙"},
            {"text": "丙", "other": [1]},
            {"text": "丁", "book": None, "title": ""},
            {"text": "甲三", "book": "甲", "chapter": "第三回", "title": "第三回 风"},
        ),
        [
            RawBook(
                "甲", "行.jsonl:1", "", "utf-8", (), (BookSection("第一回 雪", "甲一\n甲"), BookSection("2", "甲二"))
            ),
            RawBook("乙", "行.jsonl:3", "乙", "utf-8"),
            RawBook("行-4", "行.jsonl:4", "丙", "utf-8"),
            RawBook("行-5", "行.jsonl:5", "丁", "utf-8"),
            RawBook("甲", "行.jsonl:6", "", "utf-8", (), (BookSection("第三回 风", "甲三"),)),
        ],
    ),
    "章.jsonl": (
        b"\xef\xbb\xbf\r\n" + rows({"text": "一", "title": "上"}, {"text": "二", "title": "下"}),
        [RawBook("章", "章.jsonl:2", "", "utf-8-sig", (), (BookSection("上", "一"), BookSection("下", "二")))],
    ),
    "gbk.jsonl": (
        json.dumps({"text": SIMPLIFIED}, ensure_ascii=False).encode("gb18030"),
        [RawBook("gbk-1", "gbk.jsonl:1", SIMPLIFIED, "gb18030")],
    ),
    "行.jsonl.gz": (gzip.compress(rows({"text": "好"})), [RawBook("行-1", "行.jsonl.gz:1", "好", "utf-8")]),
}  # fmt: skip

LONG = "他沿着河岸走了很久，谁也没有说话，只有远处的钟声。" * 10
EPUBS = {  # content -> sections
    "epub 3": (
        epub(
            {
                "cover.xhtml": page('<img src="cover.jpg" alt="封面"/>'),
                "one.xhtml": page(
                    "<h1>第一章 雪</h1><p>　　他说：“来。”</p>\n<p>第二段，<em>有</em>字<br/>换行</p><script>x</script>"
                ),
                "one b.xhtml": page("<p>接着\n说 two\nwords&nbsp;&mdash;好</p>"),
                "two.xhtml": page(
                    "<div><h2>第二章</h2><h3>风</h3></div><div>话<p>里</p>话</div><ul><li>甲</li><li>乙</li></ul>"
                ),
            },
            '<ol><li><a href="one.xhtml">第一章 雪</a></li><li><a href="two.xhtml">第二章&nbsp;风</a></li></ol>',
        ),
        [
            BookSection("第一章 雪", "　　他说：“来。”\n第二段，有字\n换行\n接着说 two words\xa0—好"),
            BookSection("第二章 风", "话\n里\n话\n甲\n乙"),
        ],
    ),
    "epub 2, chapters inside a page": (
        epub(
            {"all.html": page('<p>题记</p><h2 id="c1">一</h2><p>甲</p><a id="c2"/><h2>二</h2><p>乙</p>').encode("gbk")},
            "<navMap>" + point("一", "all.html#c1") + point("二", "all.html#c2") + "</navMap>",
            version=2,
        ),
        [BookSection("", "题记"), BookSection("一", "甲"), BookSection("二", "乙")],
    ),
    "headings only": (
        epub({"a": page("<h1>序</h1><p>甲</p>"), "b": page("<h1>一</h1><p>乙</p>"), "c": page("<p>丙</p>")}),
        [BookSection("序", "甲"), BookSection("一", "乙\n丙")],
    ),
    "a volume's page": (
        epub({"v.html": page("<h1>上卷</h1>"), "a.html": page("<h1>一</h1><p>甲</p>")}),
        [BookSection("上卷", ""), BookSection("一", "甲")],
    ),
    "headings in one page": (
        epub({"all": page("<h1>书名</h1><h2>雨</h2><p>甲</p><h2>渡</h2><h3>一</h3><p>乙</p><h2>信</h2><p>丙</p>")}),
        [BookSection("书名", ""), BookSection("雨", "甲"), BookSection("渡 一", "乙"), BookSection("信", "丙")],
    ),
    "numbered headings in the pages of volumes": (
        epub(
            {
                "v1": page(
                    "<h1>第一卷 江湖</h1><h2>第一章 雨</h2><p>甲</p><h3>其一</h3><p>乙</p>"
                    "<h2>第二章</h2><h3>渡</h3><p>丙</p>"
                ),
                "v2": page("<h2>第三章 信</h2><p>丁</p><h4>第一节</h4><p>戊</p>"),
            },
            "<navMap>" + point("第一卷 江湖", "v1") + point("第三章 信", "v2") + "</navMap>",
            version=2,
        ),
        [
            BookSection("第一卷 江湖", ""), BookSection("第一章 雨", "甲\n其一\n乙"), BookSection("第二章 渡", "丙"),
            BookSection("第三章 信", "丁\n第一节\n戊"),
        ],
    ),
    "readings": (
        epub(
            {
                "a": page(
                    "<p>名叫<ruby>饕<rt>tāo</rt>餮<rt>tiè</rt></ruby>，握着<ruby><rb>剑</rb><rp>（</rp><rt>咖喱棒</rt><rp>）</rp>"
                    "</ruby>来。</p><p><ruby>漢<rt>かん<rt>k</ruby>字。<ruby>甲<rtc><rt>a</rt></rtc></ruby>乙</p>"
                )
            }
        ),
        [BookSection("", "名叫饕餮，握着剑来。\n漢字。甲乙")],
    ),
    "what readers do not see": (
        epub(
            {
                "a": page(
                    '<p>甲<span epub:type="pagebreak" title="12">12</span>乙<span role="doc-pagebreak"/>丙</p>'
                    '<p hidden="">无</p><div style="display: none"><p>无</p><br/>无</div><p>丁</p>'
                )
            }
        ),
        [BookSection("", "甲乙丙\n丁")],
    ),
    "images of characters": (
        epub(
            {
                "a": page(
                    '<p>身<img alt="体" src="w1.png"/>微微<img class="g" src="龘.png" alt="龘靐"/>。</p>'
                    '<p><img src="p.png" alt="图"/></p><p>看<img src="b.png" alt="封面"/>海</p>'
                )
            }
        ),
        [BookSection("", "身体微微龘靐。\n看海")],
    ),
    "pages that are no part of the book": (
        epub(
            {
                "i": page("<h1>版权信息</h1><p>书名：雨</p><p>ISBN：9787</p>"),
                "j": page("<p>书名：雨</p><p>作者：某</p><p>出版社：某社</p><p>雨</p>"),
                "t": page("<p>雨</p><p>渡</p><p>信</p><p>船</p>"),
                "m": page("<h1>目錄</h1><p>雨</p>"),
                "a": page("<h2>雨</h2><p>甲</p>"), "b": page("<h2>渡</h2><p>乙</p>"),
                "c": page("<h2>信</h2><p>他说：“关注我的公众号，免费领取电子书。”</p>"),
                "d": page("<h2>目录</h2><p>" + "他翻开目录，一页一页地看了下去。" * 8 + "</p>"),
                "e": page("<h2>船</h2><p>丁</p>"),
                "x": page("<p>扫码关注公众号，领取电子书。</p><p>更多好书：www.x.com</p>"),
            },
            "".join(point(title, name) for name, title in zip("abce", "雨渡信船", strict=True)), version=2,
        ),
        [
            BookSection("", "版权信息\n书名：雨\nISBN：9787", "imprint_page"),
            BookSection("", "书名：雨\n作者：某\n出版社：某社\n雨", "imprint_page"),
            BookSection("", "雨\n渡\n信\n船", "contents_page"), BookSection("", "目錄\n雨", "contents_page"),
            BookSection("雨", "甲"), BookSection("渡", "乙"),
            BookSection("信", "他说：“关注我的公众号，免费领取电子书。”"),
            BookSection("目录", "他翻开目录，一页一页地看了下去。" * 8), BookSection("船", "丁"),
            BookSection("", "扫码关注公众号，领取电子书。\n更多好书：www.x.com", "advertisement_page"),
        ],
    ),
    "headings over several lines and in two parts": (
        epub(
            {
                "a": page("<h2><span>第一章</span><br/><span>雨夜</span></h2><p>甲</p>"),
                "b": page("<h2>第二章</h2><h2>渡口</h2><p>乙</p>"),
                "c": page("<h2>旧<br/>信</h2><p>丙</p>"),
            }
        ),
        [BookSection("第一章 雨夜", "甲"), BookSection("第二章 渡口", "乙"), BookSection("旧 信", "丙")],
    ),
    "headings that are paragraphs": (
        epub(
            {
                name: page(f"<h1>{volume}</h1>" + "".join(f"<p>第{n}章 {t}</p><p>{LONG}{t}。</p>" for n, t in titles))
                for name, volume, titles in (("v1", "上卷", ("一雨", "二渡")), ("v2", "下卷", ("三信", "四船")))
            },
            point("上卷", "v1") + point("下卷", "v2"),
            version=2,
        ),
        [
            BookSection("上卷", ""), BookSection("第一章 雨", f"{LONG}雨。"), BookSection("第二章 渡", f"{LONG}渡。"),
            BookSection("下卷", ""), BookSection("第三章 信", f"{LONG}信。"), BookSection("第四章 船", f"{LONG}船。"),
        ],
    ),
    "signs of notes": (
        epub({"a": page('<p>他来<a href="n#b1"><img alt="注" src="n.png"/></a>了<img alt="靐" src="w"/>。</p>')}),
        [BookSection("", "他来了靐。")],
    ),
    "no headings": (epub({"a.html": page("<p>甲</p>"), "b.html": page("<p>乙</p>")}), [BookSection("", "甲\n乙")]),
}  # fmt: skip

BOMB = zipped({"a.txt": b"\xe5\xa5\xbd" * (FREE_BYTES // 2)})
BILLION_LAUGHS = CONTAINER.replace(b"?><", b'?><!DOCTYPE x [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;">]><', 1)
GOOD_EPUB = epub({"a.html": page("<p>甲</p>")})
PROTECTED = {"META-INF__encryption.xml": b'<e><CipherReference URI="OEBPS/a"/></e>'}
REFUSED = {  # file name -> content, what the cause must say
    "empty.txt": (b"", ["empty"]),
    "blank.txt": (b" \n", ["empty"]),
    "png.txt": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + random.Random(1).randbytes(3000), ["png.txt", "offset"]),
    "empty.txt.gz": (gzip.compress(b""), ["empty.txt.gz", "empty"]),
    "no.txt.gz": (GBK, ["no.txt.gz", "damaged"]),
    "cut.txt.gz": (gzip.compress(GBK)[:-9], ["cut.txt.gz", "damaged"]),
    "bomb.txt.gz": (gzip.compress(bytes(FREE_BYTES + 1)), ["bomb.txt.gz", "unpacks to more"]),
    "no.zip": (GBK, ["no.zip", "damaged"]),
    "cut.zip": (zipped({"a.txt": GBK})[:-30], ["cut.zip", "damaged"]),
    "wrong.zip": (zipped({"a.txt": GBK}, 0).replace(GBK[:9], GBK[9:18], 1), ["wrong.zip!a.txt", "damaged"]),
    "locked.zip": (encrypted(zipped({"a.txt": GBK})), ["locked.zip!a.txt", "encrypted"]),
    "lzma.zip": (zipped({"a.txt": GBK}, zipfile.ZIP_LZMA), ["lzma.zip!a.txt", "method 14"]),
    "nothing.zip": (zipped({"a.jpg": b"x"}), ["nothing.zip", "no .txt"]),
    "bomb.zip": (BOMB, ["bomb.zip!a.txt", "unpacks to more"]),
    "no.epub": (GBK, ["no.epub", "damaged"]),
    "bare.epub": (zipped({"a.html": b"x"}), ["bare.epub", "META-INF/container.xml"]),
    "xml.epub": (zipped({"META-INF/container.xml": b"<container>"}), ["xml.epub!META-INF/container.xml", "damaged"]),
    "lol.epub": (zipped({"META-INF/container.xml": BILLION_LAUGHS}), ["lol.epub!META-INF/container.xml", "entities"]),
    "wide.epub": (zipped({"META-INF/container.xml": BILLION_LAUGHS.decode().encode("utf-16")}), ["entities"]),
    "gone.epub": (epub({}), ["gone.epub", "no text"]),
    "drm.epub": (epub({"a": page("<p>甲</p>")}, **PROTECTED), ["drm.epub", "protected"]),
    "bad.jsonl": (rows({"text": "好"}) + b'{"text": \n', ["bad.jsonl:2", "invalid JSON"]),
    "list.jsonl": (rows(["好"]), ["list.jsonl:1", "'text'"]),
    "other.jsonl": (rows({"text": "好"}, {"content": "好"}), ["other.jsonl:2", "'text'"]),
    "none.jsonl": (b"\n \n", ["none.jsonl", "empty"]),
    "utf8.jsonl": (rows({"text": "好"}) + b'{"text": "\xff"}\n', ["utf8.jsonl:2", "0xff at byte 10"]),
    "wide.jsonl": (rows({"text": "好"}).decode().encode("utf-16"), ["wide.jsonl", "UTF-16"]),
    "half.jsonl": (b'{"text": "a\\ud800"}\n', ["half.jsonl:1", "half a character"]),
    "deep.jsonl": (b'{"text": ' + b"[" * 200_000 + b"\n", ["deep.jsonl:1", "invalid JSON"]),
    "what.docx": (b"x", [".docx"]),
}  # fmt: skip


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", PLAIN)
def test_books_come_back_exactly(tmp_path: Path, name: str) -> None:
    content, books = PLAIN[name]
    assert list(read_books(written(tmp_path, name, content), tmp_path)) == books
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [Path(name).name]


@pytest.mark.parametrize("name", EPUBS)
def test_chapters_of_an_epub(tmp_path: Path, name: str) -> None:
    content, sections = EPUBS[name]
    (book,) = read_books(written(tmp_path, "书.epub", content), tmp_path)
    assert book.sections == tuple(sections)
    assert (book.name, book.source, book.text, book.bad_bytes) == ("书", "书.epub", "", ())
    assert book.encoding == ("gb18030" if "epub 2" in name else "utf-8")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, parts = REFUSED[name]
    path = written(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        list(read_books(path, tmp_path))
    assert "\n" not in caught.value.cause
    for part in parts:
        assert part in caught.value.cause
    assert caught.value.remedy


def test_what_an_epub_lacks_costs_no_more_than_itself(tmp_path: Path) -> None:
    pages = {name: page(f"<h2>第{number}章</h2><p>{number}</p>") for name, number in zip("abc", "一二三", strict=True)}
    contents = "".join(point(f"第{number}章", name) for name, number in zip("abc", "一二三", strict=True))
    whole = epub(pages, contents, version=2)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def read(changed: dict[str, bytes | None]) -> RawBook:
        kept = {name: data for name, data in (members | changed).items() if data is not None}
        return next(read_books(written(tmp_path, "书.epub", zipped(kept)), tmp_path))

    def titles(book: RawBook) -> list[str]:
        return [section.title for section in book.sections or ()]

    assert titles(read({})) == ["第一章", "第二章", "第三章"]
    usual = read({}).findings
    assert usual == ("a page is lost: the manifest has no 'nav', which the reading order names",)
    book = read({"OEBPS/b": None})
    assert (titles(book), book.findings) == (["第一章", "第三章"], (*usual, "a page is lost: there is no OEBPS/b"))
    for damaged in (None, b"<ncx><navMap>", b"\x00\xff"):
        book = read({"OEBPS/toc.ncx": damaged})
        assert titles(book) == ["第一章", "第二章", "第三章"]
        assert len(book.findings) == 2 and "table of contents is lost" in book.findings[0]
    manifest = members["OEBPS/content.opf"].replace(b'id="p1"', b'id="q"')
    book = read({"OEBPS/content.opf": manifest})
    assert titles(book) == ["第一章", "第三章"] and "'p1'" in book.findings[1]
    lost = epub({"a": page('<p>微微一<img src="w.png" alt=""/>，停了。</p><p><img src="all.png"/></p>')})
    *_, finding = next(read_books(written(tmp_path, "图.epub", lost), tmp_path)).findings
    assert "(1): …微微一[w.png]" in finding
    for attack in (BILLION_LAUGHS,):  # no damage
        with pytest.raises(UserError, match="entities"):
            read({"OEBPS/toc.ncx": attack})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("他是&#39;狂魔&#39;&#x4f60;&#22909;。", "他是'狂魔'你好。"),
        ("&hellip;&ldquo;来&rdquo;&mdash;&nbsp;&emsp;好", "…“来”—\xa0\u2003好"),
        ("&amp;#39; &amp;amp;", "&#39; &amp;"),  # once
        ("甲&#10;乙&#13;丙&Tab;丁", "甲 乙 丙 丁"),  # no line ends, and no line of its own
        ("AT&T; a&b &copy 他&她 &#0; &#xD800; &#99999999; &nosuch;", None),
    ],
)
def test_character_references_are_decoded_once(text: str, expected: str | None, tmp_path: Path) -> None:
    for name, content in (("书.txt", text.encode()), ("书.jsonl", rows({"text": text}))):
        (book,) = read_books(written(tmp_path, name, content), tmp_path)
        assert book.text == (text if expected is None else expected)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.zip", "a.epub", "a.jsonl"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=name):
        list(read_books(tmp_path / name, tmp_path))


def test_wrong_media_types_and_mixed_case_cost_no_page(tmp_path: Path) -> None:
    pages = {
        name: page(f"<p>{text}</p>") for name, text in zip(("a.html", "b.xml", "Text/c.xhtml"), "甲乙丙", strict=True)
    }
    contents = "".join(point(title, name) for title, name in zip("雨渡信", pages, strict=True))
    with zipfile.ZipFile(io.BytesIO(epub(pages, contents, version=2))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    package = members["OEBPS/content.opf"].decode().replace('<spine><itemref idref="nav"/>', '<spine toc="ncx">')
    for name, kind in (("a.html", "text/x-oeb1-document"), ("b.xml", "application/xml"), ("toc.ncx", "text/xml")):
        package = re.sub(f'href="{name}" media-type="[^"]*"', f'href="{name}" media-type="{kind}"', package)
    members["OEBPS/content.opf"] = package.encode()
    members["OEBPS/text/C.xhtml"] = members.pop("OEBPS/Text/c.xhtml")
    (book,) = read_books(written(tmp_path, "书.epub", zipped(members)), tmp_path)
    assert book.sections == (BookSection("雨", "甲"), BookSection("渡", "乙"), BookSection("信", "丙"))
    assert book.findings == ()
    svg = package.replace('media-type="application/xml"', 'media-type="image/svg+xml"').replace("b.xml", "b.svg")
    (book,) = read_books(written(tmp_path, "图.epub", zipped(members | {"OEBPS/content.opf": svg.encode()})), tmp_path)
    assert any("OEBPS/b.svg" in finding for finding in book.findings)


def test_members_left_out_are_reported_and_the_others_read(tmp_path: Path) -> None:
    path = written(tmp_path, "集.zip", zipped({"甲.txt": GBK, "空.txt": b"", "图.jpg": b"x", "乙.txt": GBK}))
    left_out: dict[str, str] = {}
    assert [book.name for book in read_books(path, tmp_path, left_out.__setitem__)] == ["乙", "甲"]
    assert sorted(left_out) == ["集.zip!图.jpg", "集.zip!空.txt"]
    with pytest.raises(UserError, match=r"集\.zip!空\.txt is empty"):
        list(read_books(path, tmp_path))
    locked = written(tmp_path, "bomb.zip", BOMB)
    with pytest.raises(UserError, match="unpacks to more"):
        list(read_books(locked, tmp_path, left_out.__setitem__))


def test_rows_are_read_one_by_one(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        with path.open("wb") as stream:
            stream.writelines(rows({"text": SIMPLIFIED * 9, "book": str(index)}) for index in range(count))
        tracemalloc.start()
        assert sum(1 for _ in read_books(path, tmp_path)) == count
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(2000) < 2 * peak(20) + 2**18


TO_DAMAGE = {
    "a.zip": zipped({"a.txt": GBK, "b.txt": BIG5}),
    "a.epub": GOOD_EPUB,
    "a.txt.gz": gzip.compress(GBK),
    "a.jsonl": rows({"text": SIMPLIFIED}),
}


@pytest.mark.parametrize("name", TO_DAMAGE)
@pytest.mark.parametrize("change", ["byte", "cut", "doubled"])
def test_damage_never_ends_in_another_error(tmp_path: Path, name: str, change: str) -> None:
    content = TO_DAMAGE[name]
    choose = random.Random(name + change)
    changes: dict[str, Callable[[int], bytes]] = {
        "byte": lambda at: content[:at] + choose.randbytes(1) + content[at + 1 :],
        "cut": lambda at: content[:at],
        "doubled": lambda at: content[:at] + content[at // 2 :],
    }
    read = 0
    for _ in range(150):
        path = written(tmp_path, name, changes[change](choose.randrange(len(content))))
        try:
            read += sum(1 for _ in read_books(path, tmp_path))
        except UserError as error:
            assert error.cause.startswith((name, str(path)))
    assert read or change != "byte"


def test_listing_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    kept = ["b.TXT", "a/c.zip", "a/b/d.jsonl", "e.epub", "f.txt.gz", "z z.txt"]
    others = [".h.txt", "~$x.txt", "x.txt.part", "y.docx", "z.tar.gz", "README", ".git/a.txt", "x.txt~"]
    for name in kept + others:
        written(folder, name, b"x")
    outside = written(tmp_path, "outside/secret.txt", b"x")
    (folder / "link.txt").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    files, left_out = list_folder(folder)
    assert [path.relative_to(folder).as_posix() for path in files] == sorted(kept)
    told = dict(left_out)
    assert sorted(told) == sorted([*others[:-2], ".git", "x.txt~", "link.txt", "linked"])
    assert told["linked"] == told["link.txt"] == "a link"
    assert told["y.docx"] == ".docx is not read"


def test_a_folder_without_novels_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "x.docx", b"x")
    for folder, part in (
        (tmp_path, "1 others"),
        (tmp_path / "no", "does not exist"),
        (tmp_path / "x.docx", "not a folder"),
    ):
        with pytest.raises(UserError, match=part):
            list_folder(folder)
