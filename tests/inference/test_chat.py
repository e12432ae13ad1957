"""Chat: the history and its limits, text that streams in complete characters, and caches that are reused."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from novelgpt.inference.chat import Chat, ChatHistory, StreamedText, TextHistory, continues_text
from novelgpt.inference.generation import answer_end_ids, answer_prompts
from novelgpt.inference.loading import load_for_inference
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import GenerationArguments, ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import say_text
from novelgpt.text.conversation import encode_prompt, end_token_ids
from novelgpt.text.encoding import encode, encode_document
from novelgpt.text.templates import record_thinking
from tests.text.test_templates import build_baichuan_folder, load_baichuan

ROOT = Path(__file__).resolve().parents[2]
TEXT = "他说：“你好，𠮷野家！”\n\n　　🙂👨\u200d👩\u200d👧 龘 abc  déjà 12\r\n"


show = functools.partial(say_text, end="")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_the_history_grows_and_is_cleared(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatHistory(tokenizer, 4096, 64, "你是诗人。")
    system = {"role": "system", "content": "你是诗人。"}
    assert chat.ask("一") == (encode_prompt([system, user("一")], tokenizer), 0)
    chat.add_answer("甲")
    assert chat.ask("二") == (encode_prompt([system, user("一"), assistant("甲"), user("二")], tokenizer), 0)
    chat.add_answer("乙")
    assert chat.messages == [system, user("一"), assistant("甲"), user("二"), assistant("乙")]
    chat.clear()
    assert chat.messages == [system]
    assert chat.ask("三") == (encode_prompt([system, user("三")], tokenizer), 0)


def test_the_oldest_turns_are_forgotten_where_the_context_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    context, longest = 160, 40
    chat = ChatHistory(tokenizer, context, longest, "你是诗人。")
    asked: list[dict[str, str]] = []
    total = 0
    for number in range(30):
        prompt, forgotten = chat.ask(f"第{number}个问题")
        asked.append(user(f"第{number}个问题"))
        total += forgotten
        # All that is kept, no less than fits: one turn more would be too long.
        kept = asked[2 * total :]
        system = {"role": "system", "content": "你是诗人。"}
        assert chat.messages == [system, *kept]
        assert prompt == encode_prompt([system, *kept], tokenizer)
        assert len(prompt) <= context - longest and chat.answer_room(prompt) == longest
        if forgotten:
            longer = encode_prompt([system, *asked[2 * (total - 1) :]], tokenizer)
            assert len(longer) > context - longest
        chat.add_answer("答" * 9)
        asked.append(assistant("答" * 9))
    assert total > 10


def test_a_question_that_does_not_fit_is_refused_and_not_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatHistory(tokenizer, 64, 1024)
    prompt, _ = chat.ask("一")
    assert chat.answer_room(prompt) == 64 - len(prompt)
    chat.add_answer("甲")
    with pytest.raises(UserError, match="and 32 fit"):
        chat.ask("长" * 64)
    assert chat.messages == [user("一"), assistant("甲")]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_streamed_text_is_whole_characters_and_nothing_else(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tokenizer if kind == "byte-level" else load_baichuan(build_baichuan_folder(tmp_path / "base", 2))
    ends = end_token_ids(own)
    ids = encode(TEXT, own)
    streamed = StreamedText(own, ends, show)
    streamed.put(torch.tensor([encode("问题", own)]))
    for token in [*ids, ends[0]]:
        streamed.put(torch.tensor([token]))
        assert TEXT.startswith(streamed.text)
    streamed.end()
    assert streamed.text == capsys.readouterr().out == TEXT


def test_an_answer_does_not_steer_the_terminal(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was answered is kept, as the model is asked again with it."""
    hostile = "甲\x1b[2J\x9b31m\u202e乙\r错误\a👨‍👩‍👧"
    streamed = StreamedText(tokenizer, end_token_ids(tokenizer), show)
    streamed.put(torch.tensor([encode("问题", tokenizer)]))
    for token in encode(hostile, tokenizer):
        streamed.put(torch.tensor([token]))
    streamed.end()
    assert streamed.text == hostile
    assert capsys.readouterr().out == "甲<U+001B>[2J<U+009B>31m<U+202E>乙<U+000D>错误<U+0007>👨‍👩‍👧"


def test_half_a_character_is_no_part_of_the_answer(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = encode("好龘", tokenizer)
    streamed = StreamedText(tokenizer, end_token_ids(tokenizer), show)
    streamed.put(torch.tensor([[1]]))
    for token in ids[:-1]:
        streamed.put(torch.tensor([token]))
    assert streamed.text == "好"
    streamed.end()
    assert streamed.text == capsys.readouterr().out == "好"


@pytest.mark.parametrize(
    ("pipeline", "template", "expected"),
    [
        ("pretrain", "own", True),
        ("finetune", "plain", False),
        (None, "own", False),
        (None, "plain", True),
    ],
)
def test_raw_text_is_for_what_has_seen_no_conversation(
    pipeline: str | None, template: str, expected: bool, base_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_folder, folder)
    if template == "plain":
        (folder / "chat_template.jinja").unlink()
    if pipeline is not None:
        (folder / "run.json").write_text(json.dumps({"pipeline": pipeline}), encoding="utf-8")
    tokenizer = load_tokenizer(ModelArguments(str(folder)))
    assert continues_text(folder, tokenizer) == expected
    checkpoint = folder / "checkpoint-3"
    assert continues_text(checkpoint, tokenizer) == expected
    if expected:  # trained on conversations meanwhile, and copied without its run.json
        record_thinking(tokenizer, False)
        assert not continues_text(tmp_path, tokenizer)


def test_raw_text_goes_on_without_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    raw = TextHistory(tokenizer, context=40, max_new_tokens=8)
    prompt, left_out = raw.ask("灯塔下")
    assert (prompt, left_out) == (encode_document("灯塔下", tokenizer), 0)
    raw.add_answer("有一封信")
    assert raw.ask("")[0] == encode_document("灯塔下有一封信", tokenizer)
    assert raw.ask("海")[0] == encode_document("海", tokenizer)
    prompt, left_out = raw.ask("潮水退下去的时候，灯塔的影子正好落在信上。" * 5)
    whole = encode_document(raw.text, tokenizer)
    assert (prompt, left_out) == (whole[-32:], len(whole) - 32)
    assert raw.answer_room(prompt) == 8


@pytest.fixture
def model(base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return load_for_inference(ModelArguments(str(base_folder), "sdpa"), tokenizer)


def test_replies_are_those_of_prediction_with_the_cache_of_the_turns_before(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = GenerationArguments(max_new_tokens=12, no_repeat_ngram_size=1)
    chat = Chat(model, tokenizer, generation, "你是诗人。")
    read: list[int] = []
    forward = type(model).forward

    def counted(self: PreTrainedModel, *args: Any, **options: Any) -> Any:
        read.append(options["input_ids"].shape[1])
        return forward(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", functools.wraps(forward)(counted))
    for question in ("你好", "再说一句", "海"):
        messages = [*chat.history.messages, user(question)]  # type: ignore[union-attr]
        read.clear()
        answer = "".join(chat.reply(question))
        prompt = encode_prompt(messages, tokenizer)
        assert sum(read) < len(prompt) or question == "你好"
        expected = answer_prompts(model, tokenizer, [prompt], generation, 1, answer_end_ids(model, tokenizer))
        assert answer == expected[0].text
        assert chat.history.messages[-1] == assistant(answer)  # type: ignore[union-attr]


def test_a_reply_that_is_closed_stops_and_is_kept_as_far_as_it_got(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    chat = Chat(model, tokenizer, GenerationArguments(max_new_tokens=2000, no_repeat_ngram_size=1), raw_text=True)
    reply = chat.reply("灯塔")
    first = next(reply)
    reply.close()
    text = chat.history.text  # type: ignore[union-attr]
    assert text.startswith("灯塔" + first) and len(encode(text, tokenizer)) < 1000
    "".join(chat.reply(""))
    assert chat.history.text.startswith(text)  # type: ignore[union-attr]


def test_an_error_of_the_model_reaches_the_caller(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = Chat(model, tokenizer, GenerationArguments())
    del chat.model.model.layers[0].mlp  # type: ignore[union-attr]
    with pytest.raises(AttributeError):
        "".join(chat.reply("你好"))
