"""qwen.tiktoken as a fast tokenizer: its ids, its special tokens, and nobody else's code."""

import base64
import itertools
import json
import unicodedata
from pathlib import Path

import pytest
import regex
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from novelgpt.model.qwen1 import QWenTokenizer
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import SAMPLES
from novelgpt.text.conversation import end_token_ids
from novelgpt.text.encoding import document_end_id, encode
from tests.model.original_qwen1 import write_original_qwen1

SHARED = Path(__file__).resolve().parents[3] / "shared"
QWEN2, RANKS = SHARED / "tokenizers" / "qwen2", SHARED / "tokenizers" / "qwen1-tiktoken" / "qwen.tiktoken"
GOLDENS = SHARED / "tokenizers" / "goldens" / "qwen2.inp"
PIECES = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROBES = [
    "他说：“你们来了？”",
    "  two  blanks, tabs\t and\r\nlines\n\n\n",
    "I'll've 12345 岁，③ ½",
    "全角　ＡＢＣ，😀 emoji 👨‍👩‍👧",
    " 前后空格 ",
    "𠮷野家\u3000第一章\u200b",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "qwen"
    write_original_qwen1(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def read_ranks(path: Path) -> dict[bytes, int]:
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}


def reference(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Byte pair encoding by ranks: of all neighbours that make a token, the one of the lowest rank is joined first."""
    ids = []
    for piece in PIECES.findall(unicodedata.normalize("NFC", text)):
        parts = [bytes([value]) for value in piece.encode()]
        while True:
            pairs = enumerate(left + right for left, right in itertools.pairwise(parts))
            joined = [(ranks[pair], place) for place, pair in pairs if pair in ranks]
            if not joined:
                break
            place = min(joined)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_ids_are_those_of_the_ranks(tiny: PreTrainedTokenizerBase, folder: Path) -> None:
    ranks = read_ranks(folder / "qwen.tiktoken")
    lines = (SAMPLES / "novels" / "shan_zhong_yao_pu.txt").read_text(encoding="utf-8").splitlines()[:60]
    texts = [*PROBES, *lines]
    assert [encode(text, tiny) for text in texts] == [reference(text, ranks) for text in texts]
    assert max(len(encode(character, tiny)) for character in "的一了是不我在") == 1


@pytest.mark.parametrize("text", PROBES)
def test_decoding_gives_the_text_back(text: str, tiny: PreTrainedTokenizerBase) -> None:
    assert tiny.decode(encode(text, tiny)) == unicodedata.normalize("NFC", text)


def test_composed_and_decomposed_characters_are_one(tiny: PreTrainedTokenizerBase) -> None:
    assert encode("e\u0301", tiny) == encode("é", tiny)


def test_the_special_tokens_follow_the_ranks_in_order(tiny: PreTrainedTokenizerBase, folder: Path) -> None:
    first = len(read_ranks(folder / "qwen.tiktoken"))
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205))]
    assert tiny.convert_tokens_to_ids(names) == list(range(first, first + 208))
    assert len(tiny) == first + 208
    assert encode("<|im_start|>的<|extra_204|>", tiny) == [first + 1, *encode("的", tiny), first + 207]
    assert tiny.decode([first, *encode("的", tiny), first + 2], skip_special_tokens=True) == "的"
    assert (tiny.eos_token_id, tiny.pad_token_id, tiny.bos_token_id) == (first, first, None)


def test_ends_of_answers_and_of_documents(folder: Path) -> None:
    tokenizer = load_tokenizer(ModelArguments(str(folder)))
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert end_token_ids(tokenizer) == ends
    assert document_end_id(tokenizer) == ends[0]


def test_a_saved_tokenizer_is_the_same_without_code_of_its_own(folder: Path, tmp_path: Path) -> None:
    assert "auto_map" not in AutoTokenizer.from_pretrained(folder).init_kwargs
    tokenizer = load_tokenizer(ModelArguments(str(folder)))
    tokenizer.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    again = load_tokenizer(ModelArguments(str(tmp_path)))
    assert isinstance(again, QWenTokenizer)
    assert again.get_vocab() == tokenizer.get_vocab()
    texts = [*PROBES, "<|im_start|>user\n你<|im_end|>"]
    assert [encode(text, again) for text in texts] == [encode(text, tokenizer) for text in texts]
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("damage", ["IQ==", "!!!! 7", "IQ== 99999"])
def test_a_damaged_rank_file_is_named(damage: str, tmp_path: Path) -> None:
    write_original_qwen1(tmp_path)
    ranks = tmp_path / "qwen.tiktoken"
    ranks.write_bytes(ranks.read_bytes() + damage.encode() + b"\n")
    with pytest.raises(UserError, match=r"qwen\.tiktoken"):
        load_tokenizer(ModelArguments(str(tmp_path)))


def test_no_rank_file_at_all(tmp_path: Path) -> None:
    write_original_qwen1(tmp_path)
    (tmp_path / "qwen.tiktoken").unlink()
    with pytest.raises(UserError):
        load_tokenizer(ModelArguments(str(tmp_path)))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Qwen v1's tokenizer, from ranks that are written out of the vocabulary of Qwen2."""
    if not QWEN2.is_dir():
        pytest.skip("the tokenizer of Qwen2 is not here")
    folder = tmp_path_factory.mktemp("original") / "qwen"
    write_original_qwen1(folder)
    vocabulary = json.loads((QWEN2 / "vocab.json").read_text(encoding="utf-8"))
    # The byte that each character of a token's spelling stands for, as in every byte-level vocabulary.
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printed]
    value_of = {chr(value): value for value in printed}
    value_of |= {chr(256 + place): value for place, value in enumerate(others)}
    lines = [
        base64.b64encode(bytes(value_of[character] for character in token)) + b" %d\n" % rank
        for token, rank in sorted(vocabulary.items(), key=lambda entry: entry[1])
    ]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    if RANKS.is_file():
        assert read_ranks(folder / "qwen.tiktoken") == read_ranks(RANKS)
    return AutoTokenizer.from_pretrained(folder)


def test_the_real_special_tokens(real: PreTrainedTokenizerBase) -> None:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]
    assert real.convert_tokens_to_ids(names) == [151643, 151644, 151645, 151646, 151850]
    assert (len(real), real.eos_token_id, real.pad_token_id) == (151851, 151643, 151643)


def test_the_golden_ids(real: PreTrainedTokenizerBase) -> None:
    if not GOLDENS.is_file():
        pytest.skip("no golden ids here")
    texts = GOLDENS.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = GOLDENS.with_suffix(".out").read_text(encoding="utf-8").split("\n")
    assert [encode(text, real) for text in texts] == [[int(token) for token in line.split()] for line in lines]
    assert len(texts) == 47


def test_three_thousand_lines_of_novels(real: PreTrainedTokenizerBase) -> None:
    files = sorted((SHARED / "data" / "novels").glob("*.utf8.txt"))
    if not files:
        pytest.skip("no novels here")
    lines: list[str] = []
    for file in files:
        texts = file.read_text(encoding="utf-8", errors="ignore").splitlines()
        stable = [line for line in texts if line and line == unicodedata.normalize("NFC", line)]
        lines += stable[: 3000 // len(files) + 300]
    lines = lines[:3000]
    assert len(lines) == 3000
    qwen2 = AutoTokenizer.from_pretrained(QWEN2)
    encoded = [encode(line, real) for line in lines]
    assert encoded == [encode(line, qwen2) for line in lines]
    assert [real.decode(ids) for ids in encoded] == lines
