"""Chunks of documents have the tokens of the whole, and mapped arrays give the blocks of arrays in memory."""

import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.text.chunks import CHUNK, Chunk, ChunkEncoder, DocumentCutter, chunks_are_exact, token_type
from novelgpt.text.encoding import document_end_id, encode
from novelgpt.text.origins import TokenOrigins
from novelgpt.text.packing import PackedBlocks, TokenArray, TokenizedText
from novelgpt.text.token_files import tokenizer_digest
from tests.model.original_checkpoints import write_original_baichuan

SHARED = Path(__file__).resolve().parents[3] / "shared"
# Little text: without a cut inside of chunks of thousands of characters, nothing would be tried.
NOVELS = ["hulanhezhuan.daocaoren.utf8.txt", "nahan.gutenberg.utf8.txt", "xiaohong_quanji.xstt.utf8bom.txt"]
ODD = [
    "",
    "\n",
    "字",
    "　　他说：\n\n\n　\n\n  你好。\r\r\n",
    "a\n b\n\n\tc\x1c\nd\u2028\n é\n\u0301x",
    "<|im_end|>\n好</s>\n",
]


@pytest.fixture(
    scope="module", params=["embedded", "qwen2", "baichuan2", pytest.param("baichuan2-fast", marks=pytest.mark.long)]
)
def any_tokenizer(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    if request.param == "embedded":
        return tokenizer
    folder = SHARED / "tokenizers" / request.param
    if not folder.is_dir():
        pytest.skip("the real tokenizers are not beside the checkout")
    if request.param == "baichuan2":  # beside a model, for its own class
        model = tmp_path_factory.mktemp("models") / "baichuan2"
        write_original_baichuan(model, "alibi", norm_head=True)
        shutil.copy(folder / "tokenizer.model", model / "tokenizer.model")
        folder = model
    return load_tokenizer(ModelArguments(str(folder)))


def cut(cutter: DocumentCutter, texts: list[tuple[str, str]]) -> list[Chunk]:
    """Chunks of rows, given as (text, book), that nothing follows."""
    names = {"chapter": "", "title": "", "source": ""}
    return list(cutter.cut([{"text": text, "book": book} | names for text, book in texts], last=True))


def tokens_of(texts: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens, and where documents start, of (text, book)."""
    encoder = ChunkEncoder(tokenizer)
    chunks = cut(DocumentCutter(encoder.in_chunks), texts)
    batches = list(encoder.encode(chunks, TokenOrigins().add))
    return [token for tokens, _ in batches for token in tokens.tolist()], [at for _, starts in batches for at in starts]


def assert_as_whole(documents: list[list[str]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Documents are given by their chapters."""
    end = document_end_id(tokenizer)
    whole = [
        [*encode("\n\n".join(text.strip("\n") for text in texts), tokenizer), end] if texts else []
        for texts in documents
    ]
    named = [(text, f"{number}") for number, texts in enumerate(documents) for text in texts]
    tokens, starts = tokens_of(named, tokenizer)
    assert tokens == [token for ids in whole for token in ids]
    lengths = [len(ids) for ids in whole if ids]
    assert starts == numpy.cumsum([0, *lengths])[:-1].tolist()


def test_chunks_of_real_novels_have_the_tokens_of_the_whole(any_tokenizer: PreTrainedTokenizerBase) -> None:
    assert chunks_are_exact(any_tokenizer)
    folder = SHARED / "data" / "novels"
    if not folder.is_dir():
        pytest.skip("the real novels are not beside the checkout")
    for name in NOVELS:
        text = (folder / name).read_text(encoding="utf-8-sig")
        cut = len(text) // 3
        assert_as_whole([[text], [text[:cut], text[cut : 2 * cut], text[2 * cut :]]], any_tokenizer)


def test_chunks_of_odd_texts_have_the_tokens_of_the_whole(
    any_tokenizer: PreTrainedTokenizerBase, few_or_all: Callable[[int, int], int]
) -> None:
    draw = random.Random(1)
    parts = [*ODD, "。", "”\n", "\n\n", "\n　　", " \n", "\r\n", "\n ", "1", "ab", "—", "\t", "　", "<s>"]
    for _ in range(few_or_all(4, 8)):
        texts = ["".join(draw.choices(parts, k=draw.choice([1, 3, 3000]))) for _ in range(3)]
        assert_as_whole([texts[:2], texts[2:], texts[1:]], any_tokenizer)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("字。”a1 　\n\r\t-…\x0b\u0301é"), max_size=40), min_size=1, max_size=4))
def test_any_cut_is_exact(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    repeated = [text * (CHUNK // 10 + 1) for text in texts]
    assert_as_whole([repeated], tokenizer)


def test_chunks_are_the_text_and_no_longer_than_their_line_asks_for() -> None:
    lines = [f"　　第{number}行，" + "字" * (number % 50) for number in range(2_000)]
    chunks = cut(DocumentCutter(True), [("\n".join(lines), "书")] * 2)
    assert "".join(chunk.text for chunk in chunks) == "\n".join(lines) + "\n\n" + "\n".join(lines)
    assert [chunk.starts_document for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.ends_document for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len(chunks) > 10 and max(len(chunk.text) for chunk in chunks) < CHUNK + 70


def test_a_tokenizer_that_marks_the_start_of_texts_gets_whole_documents() -> None:
    letters = {letter: number for number, letter in enumerate("▁\n字你好。</>s")}
    model = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="字"))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
    assert encode("你", tokenizer) == [letters["▁"], letters["你"]]
    assert not chunks_are_exact(tokenizer)
    assert_as_whole([["你好。\n" * CHUNK, "字\n" * CHUNK], ["你"]], tokenizer)


def test_limits_in_the_file_of_a_tokenizer_cut_nothing(base_folder: Path, tmp_path: Path) -> None:
    limited = AutoTokenizer.from_pretrained(base_folder)
    whole = encode("山上有座庙。" * 20, limited)
    limited.backend_tokenizer.enable_truncation(5)
    limited.backend_tokenizer.enable_padding(length=9)
    assert tokens_of([("山上有座庙。" * 20, "")], limited)[0] == [*whole, document_end_id(limited)]


def test_a_digest_stays_through_saving_and_tells_tokenizers_apart(
    any_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    digest = tokenizer_digest(any_tokenizer)
    any_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again.chat_template = "{{ messages }}"
    assert tokenizer_digest(again) == digest
    again.add_tokens(["<|新的|>"])
    assert tokenizer_digest(again) != digest


def test_a_digest_sees_how_pieces_are_merged() -> None:
    vocabulary = {letter: number for number, letter in enumerate(["你", "好", "吗", "你好", "好吗", "</s>", "字"])}
    digests = set()
    for merges in ([("你", "好"), ("好", "吗")], [("好", "吗"), ("你", "好")]):
        model = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="字"))
        model.decoder = decoders.Fuse()
        digests.add(tokenizer_digest(PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")))
    assert len(digests) == 2


def test_slices_of_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    draw = random.Random(2)
    for number in range(30):
        parts = [
            numpy.arange(draw.choice([0, 1, 5, 40]), dtype=numpy.uint16) + 7 * n for n in range(draw.randint(1, 6))
        ]
        whole = numpy.concatenate(parts)
        mapped = []
        for place, part in enumerate(parts):
            part.tofile(tmp_path / f"{number}-{place}")
            if len(part):
                mapped.append(numpy.memmap(tmp_path / f"{number}-{place}", dtype=numpy.uint16, mode="r"))
        for array in (TokenArray(parts), TokenArray(mapped), pickle.loads(pickle.dumps(TokenArray(mapped)))):
            assert array[0 : len(whole) + 1].tolist() == whole.tolist()
            for _ in range(20):
                begin, end = draw.randint(0, len(whole)), draw.randint(0, len(whole) + 3)
                assert array[begin:end].tolist() == whole[begin:end].tolist()


def test_processes_are_handed_file_names_and_not_tokens(tmp_path: Path) -> None:
    numpy.zeros(1_000_000, numpy.uint16).tofile(tmp_path / "tokens")
    array = TokenArray([numpy.memmap(tmp_path / "tokens", dtype=numpy.uint16, mode="r")])
    assert len(pickle.dumps(array)) < 1000


def test_blocks_of_parts_are_those_of_documents() -> None:
    draw = random.Random(3)
    for _ in range(100):
        documents = [numpy.array([draw.randint(1, 900) for _ in range(draw.choice([1, 2, 9, 33]))]) for _ in range(9)]
        borders = sorted(draw.choices(range(10), k=3))
        texts = [
            TokenizedText(
                numpy.concatenate([numpy.zeros(0, numpy.int64), *part]),
                numpy.cumsum([0, *map(len, part)])[:-1].astype(numpy.int64),
            )
            for part in (documents[a:b] for a, b in zip([0, *borders], [*borders, 9], strict=True))
        ]
        for max_length in (2, 5, 40):
            for mixed in (True, False):
                wanted = PackedBlocks([*map(TokenizedText, documents)], max_length, mixed)
                blocks = PackedBlocks(texts, max_length, mixed)
                assert len(blocks) == len(wanted) and blocks.counts() == wanted.counts()
                for index in range(len(blocks)):
                    row, wanted_row = blocks[index], wanted[index]
                    assert row.keys() == wanted_row.keys()
                    assert all(torch.equal(row[name], wanted_row[name]) for name in row)


def test_billions_of_tokens_are_not_read_to_be_counted(tmp_path: Path) -> None:
    tokens = 3_000_000_000
    with (tmp_path / "tokens").open("wb") as file:
        file.truncate(2 * tokens)  # takes no room on the disk
    array = numpy.memmap(tmp_path / "tokens", dtype=numpy.uint16, mode="r")
    starts = numpy.arange(0, tokens, 1_000_000)
    blocks = PackedBlocks([TokenizedText(array, starts)], 2048)
    assert len(blocks) == -(-(tokens - 1) // 2047)
    counts = blocks.counts()
    assert (counts.tokens_in, counts.context) == (tokens, len(starts))
    assert int(blocks[len(blocks) - 1]["position_ids"][-1]) <= 2047


def test_the_smallest_numbers_that_hold_a_vocabulary(any_tokenizer: PreTrainedTokenizerBase) -> None:
    most = max(any_tokenizer.get_vocab().values())
    assert numpy.iinfo(token_type(any_tokenizer)).max >= most
    assert token_type(any_tokenizer).itemsize == (2 if most < 65536 else 4)
