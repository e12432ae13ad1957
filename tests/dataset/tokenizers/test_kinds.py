"""Tokenizers of every kind: what the libraries train, exact where they promise it, the same in every process."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as draw
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from dataset.corpus import read_corpus
from dataset.tokenizers.agreement import cut_greedily, measure_agreement
from dataset.tokenizers.folder import as_pretrained, write_folder
from dataset.tokenizers.report import measure, report_of, show_report
from dataset.tokenizers.subwords import train_sentencepiece
from dataset.tokenizers.words import choose_words, load_segmenter, raise_scores, train_words
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import CorpusArguments, ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import ROOT, SAMPLES
from novelgpt.text.chunks import chunks_are_exact
from novelgpt.text.conversation import IGNORE_INDEX, encode_conversation, end_token_ids
from novelgpt.text.encoding import document_begin_ids, document_end_id, encode
from novelgpt.text.messages import Message
from novelgpt.text.pretokenization import QUOTATION_MARKS, QWEN_PRETOKENIZATION
from novelgpt.text.special_tokens import encode_literally
from tests.dataset.tokenizers.trained import EXACT, SIZES, random_lines, sample_pieces, trained
from tests.text.test_properties import cases

NASTY = [
    "\U0001f469\u200d\U0001f467\U0001f1e8\U0001f1f3", "\uf900\uf9b8\ufa11", "\x00\x01\x1f\x7f\x85", "e\u0301o\u0308",
    "a▁b▅c", "<|im_end|> <unk> [SEP]", "<0x41><0xE4>", "　　全角１２３ＡＢＣ（）", " 两  个   空格 ",
    "\n\n\n", "\r\n\t", "“”‘’「」『』《》〈〉", "龘\U00020000\U0002a6a5", "\u202e\ufeff\u200d",
]  # fmt: skip


@pytest.fixture(scope="module")
def pieces() -> list[str]:
    return sample_pieces()


@pytest.fixture(scope="module")
def folders(pieces: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, as the command writes it."""
    made = {}
    for kind, size in SIZES.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        record = {"kind": kind, "vocab_size": size, "seed": 1, "sample": {"characters": 1},
                  "corpus": {"files": ["a"], "characters": 1}}  # fmt: skip
        own = {"characters_per_token": 1, "bytes_per_token": 1, "unknown_characters": 0, "round_trip": 1}
        report = {"characters": 1, "tokenizers": [own]}
        write_folder(made[kind], as_pretrained(trained(kind, pieces), kind), record, report)
    return made


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, PreTrainedTokenizerBase]:
    return {kind: AutoTokenizer.from_pretrained(folder) for kind, folder in folders.items()}


def test_byte_level_bpe_is_that_of_the_library(pieces: list[str], loaded: dict[str, PreTrainedTokenizerBase]) -> None:
    direct = Tokenizer(models.BPE())
    cuts = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in ("[“”‘’「」『』《》〈〉]", QWEN_PRETOKENIZATION)
    ]
    direct.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=SIZES["byte_bpe"] - 3, min_frequency=2, initial_alphabet=alphabet,
                                  max_token_length=12, show_progress=False)  # fmt: skip
    direct.train_from_iterator(pieces, trainer)
    lines = random_lines(3000)
    assert [encode(line, loaded["byte_bpe"]) for line in lines] == [direct.encode(line).ids for line in lines]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_subwords_are_those_of_sentencepiece(
    kind: str, pieces: list[str], loaded: dict[str, PreTrainedTokenizerBase]
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece(kind, pieces, SIZES[kind], 8))
    for line in random_lines(3000):
        assert encode(line, loaded[kind]) == processor.encode(line), line


@pytest.mark.parametrize("kind", SIZES)
def test_vocabularies_have_the_size_asked_for(kind: str, loaded: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = loaded[kind]
    assert len(tokenizer) == len(set(tokenizer.get_vocab().values())) == SIZES[kind]
    assert max(tokenizer.get_vocab().values()) == SIZES[kind] - 1
    if kind != "words":
        assert [tokenizer.eos_token, tokenizer.pad_token] == ["<|endoftext|>", "<|endoftext|>"]
        asked = tokenizer.apply_chat_template([{"role": "user", "content": "问"}], tokenize=False)
        assert asked == "<|im_start|>user\n问<|im_end|>\n"


@pytest.mark.parametrize("kind", EXACT)
def test_every_text_decodes_to_itself(kind: str, loaded: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = loaded[kind]

    @cases(150)
    @given(draw.text(draw.characters(exclude_categories=("Cs",)), max_size=40))
    def decodes(text: str) -> None:
        assert tokenizer.decode(encode(text, tokenizer)) == text
        assert tokenizer.decode(encode_literally(text, tokenizer)) == text

    decodes()
    for text in NASTY:
        assert tokenizer.decode(encode(text, tokenizer)) == text
        literal = encode_literally(text, tokenizer)
        assert tokenizer.decode(literal) == text and not set(literal) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("kind", SIZES)
def test_marks_digits_and_full_width_forms_stand_alone(kind: str, loaded: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = loaded[kind]
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    merged = [
        text for text in texts if len(text) > 1 and set(text) & {*QUOTATION_MARKS, *"0123456789０１２３４５６７８９"}
    ]
    assert [text for text in merged if not (text.startswith("<0x") or "�" in text)] == []
    for text in ("他说：“好。”她笑", "共2026年", "《书》，『名』"):
        parts = re.split(f"([{QUOTATION_MARKS}0-9])", text)
        assert encode(text, tokenizer) == [token for part in parts if part for token in encode(part, tokenizer)]
    # Not the tokens of half-width forms.
    unknown = {tokenizer.unk_token_id}
    assert set(encode("，！（Ａ", tokenizer)).isdisjoint({*encode(",!(A", tokenizer)} - unknown)


def test_words_are_one_token_each_and_come_back(loaded: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = loaded["words"]
    words = {word: token for word, token in tokenizer.get_vocab().items() if token >= 5}
    assert len(words) == SIZES["words"] - 5
    for word, token in words.items():
        assert encode(word, tokenizer) == [token] and tokenizer.decode([token]) == word


def test_a_rare_word_of_common_characters_is_one_token() -> None:
    scores = raise_scores({"中": 1000, "国": 1000, "中国": 1, "中国人": 1, "人": 1000})
    assert scores["中国"] > scores["中"] + scores["国"] > math.log(1 / 3002)
    assert scores["中国人"] > scores["中国"] + scores["人"]
    assert scores["中"] == math.log(1000 / 3002)


def test_a_text_of_words_begins_with_mask_and_ends_with_cls(loaded: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = loaded["words"]
    mask, cls, line_end = tokenizer.convert_tokens_to_ids(["[MASK]", "[CLS]", "[SEP]"])
    text = "他们在山里。\n\n夜里下雨。"
    ids = encode(text, tokenizer)
    assert tokenizer(text)["input_ids"] == [mask, *ids, cls]
    assert ids.count(line_end) == 2 and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (document_begin_ids(tokenizer), document_end_id(tokenizer)) == ([mask], cls)


def test_words_and_characters_compete_for_room() -> None:
    counts = Counter({"山里": 9, "山": 1, "雨夜": 4, "雨天": 3, "天": 1})
    # 雨 is needed seven times, once 雨夜 and 雨天 have no room: more often than either of them.
    assert choose_words(counts, 2) == {"山里": 9, "雨": 7}


def test_words_segment_more_as_jieba_does_than_the_longest_match(pieces: list[str]) -> None:
    segmenter = load_segmenter("jieba")
    tokenizer = train_words(pieces[::2], 4000, 16, segmenter)
    agreement = measure_agreement(tokenizer, pieces[1::2], segmenter)
    assert 1 > agreement["likeliest"] > agreement["longest_match"] > 0.8
    cut = measure_agreement(tokenizer, ["他走了。"], lambda text: ["他走", "了", "。"])
    assert cut["likeliest"] == 2 * 3 / (4 + 3)  # 他 走 了 。
    assert cut_greedily("研究生命的起源", {"研究生", "研究", "生命", "起源"}, 3) == ["研究生", "命", "的", "起源"]


@pytest.mark.parametrize("kind", SIZES)
def test_pretraining_frames_documents(
    kind: str, folders: dict[str, Path], loaded: dict[str, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    text = (SAMPLES / "novels" / "shan_zhong_yao_pu.txt").read_text(encoding="utf-8").strip("\n")
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(ModelArguments(str(folders[kind])))
    assert chunks_are_exact(tokenizer)
    names = [str(tmp_path / "a.txt")]
    blocks, _ = read_corpus(CorpusArguments(train_files=names, valid_files=names, max_length=50_000), tokenizer)
    wanted = [*document_begin_ids(tokenizer), *encode(text, loaded[kind]), document_end_id(tokenizer)]
    assert blocks[0]["input_ids"].tolist() == wanted and len(blocks) == 1


@pytest.mark.parametrize("kind", SIZES)
def test_answers_are_trained_with_their_end(kind: str, folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(ModelArguments(str(folders[kind])))
    asked: list[Message] = [{"role": "user", "content": "雨夜"}, {"role": "assistant", "content": "他们在山里。"}]
    row = encode_conversation(asked, tokenizer)[0]
    trained_ids = [label for label in row.labels if label != IGNORE_INDEX]
    end = tokenizer.convert_tokens_to_ids("[CLS]" if kind == "words" else "<|im_end|>")  # that of documents is the eos
    assert trained_ids == [*encode("他们在山里。", tokenizer), end]
    assert {end, tokenizer.eos_token_id} <= set(end_token_ids(tokenizer))


@pytest.mark.parametrize("model", ["gpt2", "llama", "glm", "qwen3"])
def test_beside_any_model_it_is_the_same(
    model: str, folders: dict[str, Path], loaded: dict[str, PreTrainedTokenizerBase]
) -> None:
    lines = random_lines(20)
    for kind, folder in folders.items():
        AutoConfig.for_model(model).save_pretrained(folder)
        beside = AutoTokenizer.from_pretrained(folder)
        (folder / "config.json").unlink()
        assert [beside(line)["input_ids"] for line in lines] == [loaded[kind](line)["input_ids"] for line in lines]
        assert [beside.eos_token, beside.pad_token] == [loaded[kind].eos_token, loaded[kind].pad_token]


def test_the_share_of_unknown_counts_characters(loaded: dict[str, PreTrainedTokenizerBase]) -> None:
    for kind in ("char", "words"):
        known = next(word for word, token in loaded[kind].get_vocab().items() if token > 50)
        figures = measure(loaded[kind], [f"{known}龘𪚥", known])
        assert figures["unknown_characters"] == 2 / (2 + 2 * len(known)) and figures["round_trip"] == 1 / 2
    rare = "龘𪚥"  # 2 characters, 3 + 4 bytes
    figures, tokens = measure(loaded["byte_bpe"], [rare]), len(encode(rare, loaded["byte_bpe"]))
    assert figures["unknown_characters"] == 0
    assert (figures["characters_per_token"], figures["bytes_per_token"]) == (2 / tokens, 7 / tokens)


def test_shares_of_tokens_and_of_the_vocabulary(loaded: dict[str, PreTrainedTokenizerBase]) -> None:
    figures = measure(loaded["char"], ["山山山雨"])
    assert figures["most_frequent"] == [["山", 0.75], ["雨", 0.25]]
    assert figures["used"] == 2 / len(loaded["char"])
    begin = time.perf_counter()
    figures = measure(loaded["char"], ["山山山雨"] * 5000)
    assert figures["characters_per_second"] >= 20_000 / (time.perf_counter() - begin)  # encoding is a part of it


def test_the_longest_tokens_are_those_of_the_vocabulary(loaded: dict[str, PreTrainedTokenizerBase]) -> None:
    marks = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    words = sorted(set(loaded["words"].get_vocab()) - marks, key=lambda word: (-len(word), word))
    assert measure(loaded["words"], ["山"])["longest"] == words[:10]


def test_the_report_shows_figures_and_tokens_of_every_tokenizer(
    loaded: dict[str, PreTrainedTokenizerBase], capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of([("mine", loaded["words"]), ("other", loaded["bpe"])], ["山山山雨，龘"])
    show_report(report)
    shown = "".join(capsys.readouterr().out.split())  # lines are wrapped
    own, other = report["tokenizers"]
    assert "┃mine┃other┃" in shown and own["unknown_characters"] == 1 / 6
    for form in ("{vocabulary:,}", "{characters_per_token:.3f}", "{bytes_per_token:.3f}", "{unknown_characters:.3%}",
                 "{round_trip:.2%}", "{used:.1%}", "{characters_per_second:,}"):  # fmt: skip
        assert f"│{form.format(**own)}│{form.format(**other)}│" in shown
    for entry in (own, other):
        for label, tokens in (
            ("longest tokens 最长", entry["longest"]),
            ("most frequent 最常见", [token for token, _ in entry["most_frequent"]]),
        ):
            assert "".join(f"{entry['name']}, {label}: {' '.join(tokens)}".split()) in shown


def test_other_processes_and_cores_give_the_same() -> None:
    digests = []
    for seed, cores in (("1", "1"), ("2", "3")):
        variables = {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": cores, "TOKENIZERS_PARALLELISM": "true"}
        digests.append(
            subprocess.check_output(
                [sys.executable, "-m", "tests.dataset.tokenizers.digests"], cwd=ROOT, env=os.environ | variables
            )
        )
    assert digests[0] == digests[1] and digests[0].count(b"\n") == len(SIZES)


@pytest.mark.parametrize("kind", SIZES)
def test_a_corpus_that_is_too_small_says_what_it_gives(kind: str, pieces: list[str]) -> None:
    few = pieces[:200]
    with pytest.raises(UserError, match="the corpus is too small for --vocab_size 30000") as refusal:
        trained(kind, few, 30_000)
    found = int(refusal.value.remedy.split()[2])
    assert found == int(refusal.value.cause.split(" finds ")[1].split()[0])
    assert trained(kind, few, found).get_vocab_size() == found
    with pytest.raises(UserError, match="leaves no token to learn"):
        trained(kind, few, 3)


@pytest.mark.parametrize("size", [284, 300, 512])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_small_vocabulary_has_room_for_its_characters(kind: str, size: int, pieces: list[str]) -> None:
    tokenizer = as_pretrained(trained(kind, pieces, size), kind)
    assert len(tokenizer) == size and "，" in tokenizer.get_vocab()
    for text in NASTY:
        assert tokenizer.decode(encode(text, tokenizer)) == text


@pytest.mark.parametrize("kind", SIZES)
def test_a_corpus_without_a_character_to_learn_asks_for_text(kind: str) -> None:
    with pytest.raises(UserError, match="the corpus is too small for --vocab_size 600") as refusal:
        trained(kind, ["“1”\n\n"] if kind != "byte_bpe" else [], 600)
    assert refusal.value.remedy == "bring more text"


def test_the_record_of_a_folder_is_json(folders: dict[str, Path]) -> None:
    for kind, folder in folders.items():
        assert json.loads((folder / "tokenizer_training.json").read_text(encoding="utf-8"))["kind"] == kind
        assert f"Kind `{kind}`" in (folder / "README.md").read_text(encoding="utf-8")


def test_added_tokens_stay_where_they_are(loaded: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = loaded["byte_bpe"]
    assert isinstance(tokenizer.added_tokens_decoder[tokenizer.eos_token_id], AddedToken)
    assert [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])] == [
        SIZES["byte_bpe"] - number for number in (3, 2, 1)
    ]
