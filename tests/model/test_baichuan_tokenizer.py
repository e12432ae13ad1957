"""Ids are sentencepiece's own, the text comes back exactly, and neither loading nor saving needs remote code."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from transformers import AddedToken, AutoTokenizer

from novelgpt.model.baichuan import BaichuanTokenizer
from tests.launched import PATIENCE
from tests.model.original_checkpoints import ASSISTANT_ID, USER_ID, write_original_baichuan

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "tokenizers"
NOVELS = ROOT.parent / "shared" / "data" / "novels"
LINES = 3000
TEXTS = [
    "灯塔下的信",
    "  两个空格在前，三个在后   ",
    "　　全角缩进，然后是：（１２３）！",
    "回车\r\n换行\n\n制表\t\t尾巴\n",
    "emoji 😀👨‍👩‍👧 and café, naïve",
    "1234567890 3.14159",
    "罕见字：𠮷龘䶮㐂",
    "\u200b\ufeff\x00\x7f",
    "Hello world, a  b   c",
    "<reserved_106>你好<reserved_107>",
    "▁ 不是空格",
    "",
    " ",
    "\n",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("baichuan")
    write_original_baichuan(path, "alibi", norm_head=True)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> BaichuanTokenizer:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def ids_of(text: str, tokenizer: BaichuanTokenizer) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_sentencepiece(
    text: str, tokenizer: BaichuanTokenizer, oracle: sentencepiece.SentencePieceProcessor
) -> None:
    ids = ids_of(text, tokenizer)
    assert ids == oracle.encode(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")  # sentencepiece's sign for a space
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("▁", " ")
    pieces = tokenizer.tokenize(text)
    assert pieces == oracle.encode(text, out_type=str)
    assert tokenizer.convert_tokens_to_ids(pieces) == ids
    assert tokenizer.convert_tokens_to_string(pieces) == tokenizer.decode(ids)
    assert tokenizer([text, "你好"])["input_ids"] == [ids, ids_of("你好", tokenizer)]
    assert tokenizer(text, add_special_tokens=True)["attention_mask"] == [1] * len(ids)


@pytest.mark.parametrize("resaved", [False, True])
def test_special_tokens_in_a_text_are_their_ids_wherever_they_stand(
    resaved: bool, folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    """Baichuan's own files want spaces around them, which no template puts there; so do files that were saved again."""
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    if resaved:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": True, "special": True}
        held = {str(index): {"content": token, **flags} for index, token in enumerate(["<unk>", "<s>", "</s>"])}
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": held}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token == "<unk>" and tokenizer.pad_token_id == 0
    hello = ids_of("你好", tokenizer)
    assert ids_of("<s>你好</s>你好 </s>", tokenizer) == [1, *hello, 2, *ids_of("你好 ", tokenizer), 2]
    assert ids_of("<reserved_106>你好<reserved_107>", tokenizer) == [USER_ID, *hello, ASSISTANT_ID]
    assert tokenizer.decode([1, *hello, 2]) == "<s>你好</s>"
    assert tokenizer.decode([1, *hello, 2, *hello], skip_special_tokens=True) == "你好你好"
    whole = tokenizer("你</s>好", split_special_tokens=True)["input_ids"]
    assert 2 not in whole and tokenizer.decode(whole) == "你</s>好"


def test_an_answer_comes_back_with_its_end(tokenizer: BaichuanTokenizer) -> None:
    for text in TEXTS[:7]:
        assert tokenizer.decode([*ids_of(text, tokenizer), 2]) == text + "</s>"


def test_broken_bytes_do_not_end_decoding(tokenizer: BaichuanTokenizer) -> None:
    """A model may stop within a character, or name a row of its embedding that has no token."""
    ids = ids_of("😀", tokenizer)
    assert len(ids) > 1
    assert tokenizer.decode(ids[:-1]).strip("\ufffd") == ""
    assert tokenizer.decode([*ids, len(tokenizer) + 5]) == "😀"
    assert tokenizer.decode(ids[0]) == tokenizer.decode(ids[:1])


def test_vocabulary(tokenizer: BaichuanTokenizer, oracle: sentencepiece.SentencePieceProcessor) -> None:
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == len(tokenizer) == tokenizer.vocab_size == oracle.get_piece_size()
    assert all(tokenizer.convert_tokens_to_ids(piece) == index for piece, index in vocabulary.items())
    assert tokenizer.convert_tokens_to_ids(["</s>", "no such piece", "<reserved_106>"]) == [2, 0, USER_ID]
    assert tokenizer.convert_ids_to_tokens([2, USER_ID]) == ["</s>", "<reserved_106>"]


def test_added_tokens(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["<|im_start|>", AddedToken("<|im_end|>", special=True)])
    for _ in range(2):
        hello = ids_of("你好", tokenizer)
        ids = ids_of("<|im_start|>你好<|im_end|></s>\n", tokenizer)
        assert ids == [size, *hello, size + 1, 2, *ids_of("\n", tokenizer)]
        assert tokenizer.decode(ids) == "<|im_start|>你好<|im_end|></s>\n"
        assert tokenizer.decode(ids, skip_special_tokens=True) in ("<|im_start|>你好\n", "你好\n")
        assert len(tokenizer) == len(tokenizer.get_vocab()) == size + 2
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("norm_head", [False, True])
def test_published_folders_load_without_their_code(
    position: str, norm_head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    original, saved, again = (tmp_path / name for name in ("original", "saved", "again"))
    write_original_baichuan(original, position, norm_head)  # type: ignore[arg-type]
    source, target = original, saved
    for target in (saved, again):
        for trusted in (None, False):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
            assert isinstance(tokenizer, BaichuanTokenizer)
        assert ids_of("你好</s>", tokenizer)[-1] == 2
        assert tokenizer.model_max_length == 4096
        tokenizer.chat_template = "{{ messages[0]['content'] + eos_token }}"
        tokenizer.save_pretrained(target)
        settings = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert "auto_map" not in settings
        assert not list(target.glob("*.py"))
        assert (target / "tokenizer.model").read_bytes() == (original / "tokenizer.model").read_bytes()
        (target / "config.json").write_bytes((original / "config.json").read_bytes())
        source = target
    assert tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False) == "你好</s>"


def test_a_folder_without_settings_loads(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(tokenizer) is BaichuanTokenizer
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_a_fresh_process_loads_what_was_saved(tokenizer: BaichuanTokenizer, folder: Path, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    code = (
        "import sys, novelgpt.model.baichuan\n"
        "from transformers import AutoTokenizer\n"
        "print(AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2])['input_ids'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "你好 </s>"], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ids_of("你好 </s>", tokenizer)


def test_copies_are_the_same(tokenizer: BaichuanTokenizer) -> None:
    """Workers of a data loader get pickled ones."""
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert ids_of("<s>灯塔 😀</s>", twin) == ids_of("<s>灯塔 😀</s>", tokenizer)
        assert twin.decode([USER_ID, 2]) == "<reserved_106></s>"


GOLDEN = {
    "你好": [16829],
    "Hello world": [23160, 2063],
    "1234": [92336, 92338, 92354, 92369],
    "<reserved_106>你好<reserved_107>": [195, 16829, 196],
}


@pytest.mark.skipif(not (REAL / "baichuan2" / "tokenizer.model").is_file(), reason="Baichuan2's tokenizer is not here")
def test_golden_ids_of_baichuan2() -> None:
    tokenizer = BaichuanTokenizer(str(REAL / "baichuan2" / "tokenizer.model"))
    assert len(tokenizer) == 125696
    assert {text: ids_of(text, tokenizer) for text in GOLDEN} == GOLDEN
    for text in TEXTS:
        assert tokenizer.decode(ids_of(text, tokenizer)) == text.replace("▁", " ")


@pytest.mark.skipif(not NOVELS.is_dir(), reason="the novels are not here")
@pytest.mark.parametrize("model", ["baichuan1", "baichuan2"])
def test_lines_of_novels_come_back(model: str) -> None:
    path = REAL / model / "tokenizer.model"
    if not path.is_file():
        pytest.skip(f"{model}'s tokenizer is not here")
    tokenizer = BaichuanTokenizer(str(path))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    lines: list[str] = []
    files = sorted(NOVELS.glob("*.utf8.txt"))
    for file in files:
        lines += file.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)[: LINES // 5]
    assert len(lines) >= LINES
    ids = [ids_of(line, tokenizer) for line in lines]
    assert ids == oracle.encode(lines)
    assert [tokenizer.decode(row) for row in ids] == lines
