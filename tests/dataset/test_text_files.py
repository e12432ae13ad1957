"""A text file that is read in blocks is what `decode_text` makes of its bytes, wherever they end, or the same error."""

import os
import threading
from pathlib import Path

import pytest

from dataset.decode import decode_text, read_bytes
from dataset.text_files import open_text
from novelgpt.settings.errors import UserError

TEXT = "山里𠮷野，\r\n\r\rCafé\n\r\n说：“好”\r"
BIG5 = "佢哋喺嗰度，\r\n\r\r唔係啩\n\r\n說：「好」\r"
MARKS = {"utf-8": b"\xef\xbb\xbf", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}
SIZES = range(1, 51)
FILES = {
    "utf-8": TEXT.encode(),
    "gb18030": TEXT.encode("gb18030"),
    "big5hkscs": BIG5.encode("big5hkscs"),
    **{f"{encoding}, marked": mark + TEXT.encode(encoding) for encoding, mark in MARKS.items()},
    "marked twice": 2 * (MARKS["utf-8"] + TEXT.encode()),
    "ascii": b"\ra\r\nb",
    "cut at the end": TEXT.encode()[:-6],
    "utf-16, cut at the end": MARKS["utf-16-le"] + TEXT.encode("utf-16-le")[:-1],
    "half of a pair": MARKS["utf-16-be"] + "好".encode("utf-16-be") + b"\xd8\x42",
    "a surrogate in utf-8": b"ab\xed\xa0\x80",
    "nothing but a mark": MARKS["utf-8"],
    "blank": " \r\n\u3000\t\n".encode(),
    "NULs at the end": TEXT.encode("gb18030") + b"\0" * 50,
}


def decoded(path: Path) -> str | UserError:
    try:
        return decode_text(read_bytes(path), str(path))
    except UserError as error:
        return error


@pytest.mark.parametrize("name", FILES)
def test_blocks_end_anywhere(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(FILES[name])
    expected = decoded(path)
    for size in SIZES:
        if isinstance(expected, str):
            file = open_text(path, size)
            assert "".join(file.blocks()) == expected
            assert list(file.lines()) == expected.split("\n")
            continue
        with pytest.raises(UserError) as caught:
            open_text(path, size)
        assert (caught.value.cause, caught.value.remedy) == (expected.cause, expected.remedy)


@pytest.mark.parametrize("name", ["utf-8", "gb18030", "big5hkscs", "utf-16-le, marked"])
def test_the_first_invalid_byte_is_named_before_any_text_comes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    data = FILES[name]
    errors = 0
    for at in range(len(data)):
        for bad in (b"\xff", b"\xd8\xd8"):
            path.write_bytes(data[:at] + bad + data[at:])
            expected = decoded(path)
            try:
                found: str | UserError = "".join(open_text(path, 7).blocks())
            except UserError as error:
                found = error
                errors += 1
            assert str(found) == str(expected)
    assert errors > 20


def test_samples_decide_the_encoding_of_a_long_file(tmp_path: Path) -> None:
    """Plain ASCII at first, then more than the samples of either encoding, and one byte that fits none."""
    for encoding, text in (("gb18030", TEXT), ("big5hkscs", BIG5)):
        data = b'{"a": 1}\n' * 999 + text.encode(encoding) * 999
        path = tmp_path / encoding
        path.write_bytes(data)
        assert open_text(path).encoding == encoding
        path.write_bytes(data + b"\xff\n")
        with pytest.raises(
            UserError, match=f"byte 0xff at offset {len(data)} fits no encoding .*{encoding} reads best"
        ):
            open_text(path)


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(FILES["gb18030"] * 99,))
    writer.start()
    file = open_text(pipe)
    writer.join()
    assert "".join(file.blocks()) == "".join(file.blocks()) == decode_text(FILES["gb18030"] * 99, "x")


@pytest.mark.parametrize("change", ["longer", "shorter", "rewritten", "replaced", "removed"])
def test_a_file_that_another_program_changes_is_an_error(change: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(FILES["utf-8"] * 9_999)
    file = open_text(path, 1_000)
    other = tmp_path / "other"
    other.write_bytes(FILES["utf-8"] * 9_999)
    if change == "longer":
        path.write_bytes(FILES["utf-8"] * 10_000)
    elif change == "rewritten":
        path.write_bytes(FILES["utf-8"] * 9_999)
        os.utime(path, ns=(0, file.status.st_mtime_ns + 1_000_000))
    elif change == "replaced":
        other.replace(path)
    elif change == "removed":
        path.unlink()
    blocks = file.blocks()
    if change == "shorter":
        next(blocks)
        os.truncate(path, 300_000)
    with pytest.raises(UserError, match="No such file" if change == "removed" else "changed while it was read"):
        list(blocks)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    for path, cause in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=cause):
            open_text(path)
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="is empty"):
        open_text(tmp_path / "empty")
