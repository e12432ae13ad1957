"""python -m dataset preview: what is coloured is what is trained, answer and end token, exactly."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from dataset.preview import main
from dataset.sources import find_row_sources
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.text.conversation import IGNORE_INDEX, encode_conversation
from novelgpt.text.statistics import row_spans

ROOT = Path(__file__).resolve().parents[2]
TOKENIZERS = ROOT.parent / "shared" / "tokenizers"
GREEN = re.compile(r"\x1b\[(?:1;)?32m(.*?)\x1b\[0m", re.DOTALL)
ANY = re.compile(r"\x1b\[[\d;]*m")
Message = dict[str, str]


def text(draw: random.Random, most: int) -> str:
    letters = "的一是了我他说，。！？“”龘𠮷😀é\ufffdab 　<&>{}\n\t"
    return "".join(draw.choices(letters, k=draw.randint(1, most))).strip() + "。"


def conversation(seed: int) -> list[Message]:
    draw = random.Random(seed)
    messages = [{"role": "system", "content": text(draw, 20)}] if seed % 3 == 0 else []
    for _ in range(draw.randint(1, 3)):
        messages += [{"role": "user", "content": text(draw, 40)}, {"role": "assistant", "content": text(draw, 60)}]
    return messages


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def show(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    main([str(word) for word in words])
    return capsys.readouterr().out


def answers(messages: list[Message], end: str) -> str:
    return "".join(message["content"] + end for message in messages if message["role"] == "assistant")


def rows_of(shown: str, ids: list[str]) -> dict[str, str]:
    """Row -> what is printed below its name, colours left in; the table at the end belongs to none."""
    places = [shown.index(f"\x1b[1m{name}   ") for name in ids] + [shown.index("\nData")]
    return {name: shown[begin:end] for name, begin, end in zip(ids, places[:-1], places[1:], strict=True)}


@pytest.mark.parametrize("borders", [False, True])
def test_what_is_green_is_answer_and_end_token(
    borders: bool, tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"row{seed}", "messages": conversation(seed)} for seed in range(25)]
    file = write(tmp_path / "rows.jsonl", rows)
    words = ["--model", base_folder, "--rows", 25, "--color", "always", "--max_length", 4096]
    shown = rows_of(show(capsys, file, *words, *(["--borders"] if borders else [])), [row["id"] for row in rows])
    for row in rows:
        assert "".join(GREEN.findall(shown[row["id"]])) == answers(row["messages"], "<|im_end|>")


def test_the_whole_row_is_there_with_its_marks(
    tmp_path: Path, base_folder: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = conversation(3)
    file = write(tmp_path / "rows.jsonl", [{"id": "a", "messages": messages}])
    shown = show(capsys, file, "--model", base_folder, "--color", "always", "--max_length", 4096)
    (piece,) = encode_conversation(messages, tokenizer)
    assert tokenizer.decode(piece.input_ids) in ANY.sub("", shown)
    trained = sum(label != IGNORE_INDEX for label in piece.labels)
    size = len(piece.input_ids)
    assert f"{size:,} tokens: {trained:,} trained, {size - trained:,} context, 0 dropped" in shown
    assert f"{file}:1" in shown


@pytest.mark.parametrize("name", ["embedded", "qwen2", "baichuan2-fast", "baichuan1-fast"])
@pytest.mark.parametrize("by_token", [False, True])
def test_spans_are_the_decoded_row(name: str, by_token: bool, base_folder: Path) -> None:
    folder = base_folder if name == "embedded" else TOKENIZERS / name
    if not folder.is_dir():
        pytest.skip("the real tokenizers are not beside the checkout")
    tokenizer = load_tokenizer(ModelArguments(str(folder)))
    for seed in range(30):
        for piece in encode_conversation(conversation(seed), tokenizer):
            pairs = zip(piece.input_ids, piece.labels, strict=True)
            told = [token if label == IGNORE_INDEX else label for token, label in pairs]
            spans = list(row_spans(piece.input_ids, piece.labels, tokenizer, by_token=by_token))
            assert "".join(span.text for span in spans) == tokenizer.decode(told)
            trained = [label for label in piece.labels if label != IGNORE_INDEX]
            assert "".join(span.text for span in spans if span.trained) == tokenizer.decode(trained)
            if by_token:
                assert [span.begin for span in spans] == list(range(len(told)))
                assert [span.trained for span in spans] == [label != IGNORE_INDEX for label in piece.labels]


def test_without_colour_the_trained_text_stands_in_brackets(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": "问", "completion": "答一"}])
    for words in ([], ["--color", "never"]):
        shown = show(capsys, file, "--model", base_folder, *words)
        assert "\x1b" not in shown
        assert re.findall("⟦(.*?)⟧", shown) == ["答一<|im_end|>"]


def test_weights_other_than_one_stand_before_what_they_weight(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = {"role": "user", "content": "问"}
    answers = [{"role": "assistant", "content": "答", "weight": weight} for weight in (0.5, 0, 1, 1.25)]
    messages = [message for answer in answers for message in (question, answer)]
    file = write(tmp_path / "rows.jsonl", [{"messages": messages}])
    shown = show(capsys, file, "--model", base_folder)
    assert re.findall("(×[0-9.]*)?⟦(.*?)⟧", shown) == [
        ("×0.5", "答<|im_end|>"), ("", "答<|im_end|>"), ("×1.25", "答<|im_end|>")
    ]  # fmt: skip
    coloured = show(capsys, file, "--model", base_folder, "--color", "always")
    assert re.findall("×[0-9.]+", coloured) == ["×0.5", "×1.25"]
    show(capsys, file, "--model", base_folder, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8").partition("</p>")[2]
    assert re.findall('<span class="weight">(×[0-9.]+)</span><span class="trained">答', page) == ["×0.5", "×1.25"]


def test_letters_that_steer_a_terminal_are_shown_as_codes(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "rows.jsonl", [{"id": "\x1b]0;x\x07", "prompt": "问\x1b[2J", "completion": "答\u202e"}])
    shown = show(capsys, file, "--model", base_folder)
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}
    assert "问<U+001B>[2J" in shown and "⟦答<U+202E><|im_end|>⟧" in shown


class Spans(HTMLParser):
    """Text by class, and what the page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.classes: list[str] = []
        self.trained = ""
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.feed(page.partition("</p>")[2])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.classes.append(dict(attrs).get("class") or "")
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href")]
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        self.classes.pop()

    def handle_data(self, data: str) -> None:
        if self.classes and "trained" in self.classes[-1].split():
            self.trained += data


def test_the_page_says_the_same_and_loads_nothing(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack = "<script>alert(1)</script>\"'&amp;"
    messages = [{"role": "user", "content": attack}, {"role": "assistant", "content": f"答{attack}"}]
    rows = [{"id": attack, "messages": messages}, {"id": "b", "messages": conversation(6)}]
    file, page = write(tmp_path / "rows.jsonl", rows), tmp_path / "pages" / "preview.html"
    for borders in ([], ["--borders"]):
        show(capsys, file, "--model", base_folder, "--html", page, "--max_length", 4096, *borders)
        content = page.read_text(encoding="utf-8")
        spans = Spans(content.replace("<br>", "").partition("</body>")[0])
        assert spans.trained == "".join(answers(row["messages"], "<|im_end|>") for row in rows)
        assert spans.loaded == [] and spans.tags <= {"section", "h2", "div", "span"}
        assert "url(" not in content and "http" not in content
    assert [path.name for path in page.parent.iterdir()] == ["preview.html"]


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_cuts_are_marked_and_counted(
    overlong: str, tmp_path: Path, base_folder: Path, tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "的一是了" * 30}]
    file = write(tmp_path / "rows.jsonl", [{"messages": messages}])
    (whole,) = encode_conversation(messages, tokenizer)
    shown = show(capsys, file, "--model", base_folder, "--max_length", 40, "--overlong", overlong)
    trained = "".join(re.findall("⟦(.*?)⟧", shown))
    if overlong == "truncate":
        assert f"✂ cut here: {len(whole.input_ids) - 40} tokens are not trained on" in shown
        assert trained == tokenizer.decode([label for label in whole.labels[:40] if label != IGNORE_INDEX])
    else:
        assert "cut here" not in shown and "part 2 of " in shown
        assert trained == messages[1]["content"] + "<|im_end|>"


def test_one_row_by_its_id_in_the_wording_of_its_seed(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"p{n}", "task": "abstract_to_title", "abstract": f"摘要{n}", "title": f"题{n}"} for n in range(9)]
    file = write(tmp_path / "rows.jsonl", rows)
    words = [file, "--model", base_folder, "--row", "p7"]
    shown = [show(capsys, *words, "--instruction_seed", seed) for seed in range(12)]
    assert all("摘要7" in page and "摘要6" not in page for page in shown)
    assert len(set(shown)) > 5
    first = show(capsys, *words, "--wording", "first")
    assert "请根据下面的论文摘要，拟一个标题。\n摘要：摘要7<|im_end|>" in first and "⟦题7<|im_end|>⟧" in first


def test_text_is_shown_in_blocks_with_the_borders_of_documents(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [("甲", "的一是了" * 5), ("甲", "我他说" * 5), ("乙", "不在人有" * 30)]
    rows = [{"book": book, "text": text} for book, text in texts]
    folder = tmp_path / "prepared"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    write(folder / "train-00000.jsonl", rows)
    write(folder / "held_out-00000.jsonl", [{"book": "丙", "text": "这中大" * 30}])
    for source in (folder, folder / "train-00000.jsonl"):
        shown = show(capsys, source, "--model", base_folder, "--max_length", 64, "--rows", 2)
        first, second = shown.split("block 2")
        assert first.index("document 1 begins: 甲") < first.index("document 2 begins: 乙")
        assert "document 2 continues: 乙" in second and "丙" not in shown
        plain = re.sub("[⟦⟧]", "", first)
        assert f"{rows[0]['text']}\n\n{rows[1]['text']}<|endoftext|>" in plain
        assert "64 tokens: 62 trained, 2 context, 0 dropped" in first


def test_text_in_several_columns_is_shown_as_training_reads_it(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "papers.jsonl", [{"title": "山中", "abstract": "夜里下雨。"}])
    words = [file, "--model", base_folder, "--max_length", 64]
    shown = show(capsys, *words, "--text_column", "title,abstract")
    assert "document 1 begins" in shown and "山中\n夜里下雨。<|endoftext|>" in re.sub("[⟦⟧]", "", shown)
    assert "document 1 begins" not in show(capsys, *words)  # a title and an abstract are a conversation


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["rows.jsonl", "--row", "none"], "rows.jsonl has no row none"),
        (["none.jsonl"], "none.jsonl does not exist"),
        (["folder"], "folder holds no manifest.json"),
        (["rows.jsonl", "--rows", "0"], "nothing to show"),
        (["rows.jsonl", "--max_length", "8", "--overlong", "refuse"], "rows.jsonl:1: "),
        (["rows.jsonl", "--model", "folder"], "folder"),
    ],
)
def test_errors(
    words: list[str], cause: str, tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    write(Path("rows.jsonl"), [{"prompt": "问" * 20, "completion": "答"}])
    with pytest.raises(SystemExit) as caught:
        main(words if "--model" in words else [*words, "--model", str(base_folder)])
    assert caught.value.code == 2
    assert cause in capsys.readouterr().err


def test_whatever_may_be_trained_on_is_shown(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part of the rows of a pattern under other names, a folder, and a data set of a dataset_info.json."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in "ab":
        rows = [json.dumps({"q": f"{name}问{number}", "a": f"{name}答{number}"}) + "\n" for number in range(20)]
        Path(f"data/{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    info = {"mine": {"file_name": "b.jsonl", "columns": {"prompt": "q", "response": "a"}}}
    Path("data/dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    model = ["--model", str(base_folder)]
    drawn = [json.loads(row.text)["a"] for row in find_row_sources(["data/?.jsonl#3"])[0].rows()]
    main(["data/?.jsonl#3", "--columns", "prompt=q,response=a", *model])
    shown = capsys.readouterr().out
    assert len(drawn) == 3 and all(f"⟦{answer}" in shown for answer in drawn) and shown.count("⟦") == 3
    main(["--dataset", "mine", "--rows", "1", *model])
    assert "b问0" in (shown := capsys.readouterr().out) and "⟦b答0" in shown
    for words in ([], ["data", "--dataset", "mine"]):
        with pytest.raises(SystemExit):
            main([*words, *model])
        assert "name one thing to show" in capsys.readouterr().err
