"""Tokenizers that begin each text with a token of its own, as those of Llama and Gemma: it stands there once."""

import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dataset.corpus import read_corpus
from dataset.sources import find_row_sources
from dataset.tokens_command import main as tokens
from novelgpt.inference.chat import TextHistory
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import CorpusArguments, ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.conversation import IGNORE_INDEX, encode_conversation, encode_prompt
from novelgpt.text.encoding import document_begin_ids, document_end_id, encode
from predict.rows import read_prompt_rows

BEGIN = "<begin_of_text>"
TEXTS = ["雨下了一夜。\n天亮时，他推开了门。", "海上没有风。", "灯塔亮了。\n\n船还没有回来。"]
MESSAGES = [{"role": "user", "content": "写一个开头。"}, {"role": "assistant", "content": "雨下了一夜。"}]
MESSAGES += [{"role": "user", "content": "再写一句。"}, {"role": "assistant", "content": "天亮了。"}]
# As Llama's and Gemma's own templates have it.
WITH_BEGIN = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_folder(base: Path, folder: Path, template: str | None, end_too: bool = False) -> Path:
    """The tokenizer of the small base, with a token that begins each text, and one that ends it where asked for."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"bos_token": BEGIN})
    number = tokenizer.convert_tokens_to_ids(BEGIN)
    special, single = [(BEGIN, number)], f"{BEGIN} $A"
    if end_too:
        special, single = [*special, (tokenizer.eos_token, tokenizer.eos_token_id)], f"{single} {tokenizer.eos_token}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=[False, True], ids=["begins", "begins and ends"])
def plain(base_folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """Without a chat template."""
    return load_tokenizer(ModelArguments(str(write_folder(base_folder, tmp_path / "t", None, end_too=request.param))))


def test_documents_of_pretraining_begin_with_it(plain: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    train, _ = read_corpus(CorpusArguments([str(rows)], [str(rows)], max_length=4096), plain)
    (begin,) = document_begin_ids(plain)
    assert begin == plain.bos_token_id
    expected = [[begin, *encode(text, plain), document_end_id(plain)] for text in TEXTS]
    assert len(train) == 1
    row = train[0]
    assert row["input_ids"].tolist() == sum(expected, [])
    # All but the begin tokens is trained, the first token of a document among it.
    assert row["labels"].tolist() == sum([[IGNORE_INDEX, *document[1:]] for document in expected], [])
    counts = train.counts()
    assert (counts.tokens_in, counts.trained, counts.context) == (
        sum(map(len, expected)), sum(map(len, expected)) - len(TEXTS), len(TEXTS)
    )  # fmt: skip


def test_prepared_tokens_begin_with_it_and_belong_to_such_a_tokenizer_alone(
    base_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = write_folder(base_folder, tmp_path / "model", None)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    tokens([str(rows), str(tmp_path / "tokens"), "--model", str(model)])
    with_begin = load_tokenizer(ModelArguments(str(model)))
    folder = CorpusArguments([str(tmp_path / "tokens")], [str(rows)], max_length=4096)
    text = CorpusArguments([str(rows)], [str(rows)], max_length=4096)
    prepared, direct = read_corpus(folder, with_begin)[0][0], read_corpus(text, with_begin)[0][0]
    assert all(prepared[name].tolist() == direct[name].tolist() for name in direct)
    # The same vocabulary, whose texts begin with nothing.
    bare = AutoTokenizer.from_pretrained(model)
    bare.backend_tokenizer.post_processor = tokenizer.backend_tokenizer.post_processor
    assert bare.get_vocab() == with_begin.get_vocab() and document_begin_ids(bare) == []
    with pytest.raises(UserError, match="tokens of the tokenizer of"):
        read_corpus(folder, bare)


@pytest.mark.parametrize("template", [None, WITH_BEGIN], ids=["default template", "own template"])
def test_conversations_begin_with_it_once(template: str | None, base_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelArguments(str(write_folder(base_folder, tmp_path / "model", template))))
    begin = int(tokenizer.bos_token_id)
    (row,) = encode_conversation(MESSAGES, tokenizer)
    assert row.input_ids[0] == begin and row.input_ids.count(begin) == 1 and row.labels[0] == IGNORE_INDEX
    for length in (1, 3):
        prompt = encode_prompt(MESSAGES[:length], tokenizer)
        assert prompt == row.input_ids[: len(prompt)]
        # As programs ask that know the folder alone.
        tokenizer.save_pretrained(tmp_path / "saved")
        other = AutoTokenizer.from_pretrained(tmp_path / "saved")
        asked = other.apply_chat_template(MESSAGES[:length], add_generation_prompt=True, return_dict=False)
        assert prompt == list(asked)


def test_raw_texts_to_continue_begin_with_it(plain: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    record = {"text_prompt": TEXTS[0], "text_completion": TEXTS[1]}
    rows.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (row,) = read_prompt_rows(find_row_sources([str(rows)]), plain, None)
    assert row.prompt_ids == [plain.bos_token_id, *encode(TEXTS[0], plain)]
    encoded = row.encoded_reference(plain)
    assert encoded is not None and encoded.input_ids == [*row.prompt_ids, *encode(TEXTS[1], plain)]


def test_raw_texts_that_no_longer_fit_begin_with_it_all_the_same(plain: PreTrainedTokenizerBase) -> None:
    raw = TextHistory(plain, context=20, max_new_tokens=4)
    prompt, left_out = raw.ask("".join(TEXTS))
    ids = encode("".join(TEXTS), plain)
    assert prompt == [plain.bos_token_id, *ids[-15:]] and left_out == len(ids) - 15
    assert raw.answer_room(prompt) == 4


def test_tokenizers_that_begin_nothing_stay_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    assert document_begin_ids(tokenizer) == []
