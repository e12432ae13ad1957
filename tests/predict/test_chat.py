"""Chat: the history and its limits, text that streams in whole characters, and the command itself."""

import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from novelgpt.inference.generation import answer_end_ids, answer_prompts
from novelgpt.inference.loading import load_for_inference
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import GenerationArguments, ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.conversation import encode_prompt, end_token_ids
from novelgpt.text.encoding import encode, encode_document
from novelgpt.text.templates import record_thinking
from predict.chat import Chat, StreamedText, main
from predict.raw_text import RawText, continues_text
from tests.launched import PATIENCE
from tests.text.test_templates import build_baichuan_folder, load_baichuan
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
TEXT = "他说：“你好，𠮷野家！”\n\n　　🙂👨\u200d👩\u200d👧 龘 abc  déjà 12\r\n"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_the_history_grows_and_is_cleared(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = Chat(tokenizer, 4096, 64, "你是诗人。")
    system = {"role": "system", "content": "你是诗人。"}
    assert chat.ask("一") == (encode_prompt([system, user("一")], tokenizer), 0)
    chat.answered("甲")
    assert chat.ask("二") == (encode_prompt([system, user("一"), assistant("甲"), user("二")], tokenizer), 0)
    chat.answered("乙")
    assert chat.messages == [system, user("一"), assistant("甲"), user("二"), assistant("乙")]
    chat.clear()
    assert chat.messages == [system]
    assert chat.ask("三") == (encode_prompt([system, user("三")], tokenizer), 0)


def test_the_oldest_turns_are_forgotten_where_the_context_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    context, longest = 160, 40
    chat = Chat(tokenizer, context, longest, "你是诗人。")
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
        chat.answered("答" * 9)
        asked.append(assistant("答" * 9))
    assert total > 10


def test_a_question_that_does_not_fit_is_refused_and_not_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = Chat(tokenizer, 64, 1024)
    prompt, _ = chat.ask("一")
    assert chat.answer_room(prompt) == 64 - len(prompt)
    chat.answered("甲")
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
    streamed = StreamedText(own, ends)
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
    streamed = StreamedText(tokenizer, end_token_ids(tokenizer))
    streamed.put(torch.tensor([encode("问题", tokenizer)]))
    for token in encode(hostile, tokenizer):
        streamed.put(torch.tensor([token]))
    streamed.end()
    assert streamed.text == hostile
    assert capsys.readouterr().out == "甲<U+001B>[2J<U+009B>31m<U+202E>乙<U+000D>错误<U+0007>👨‍👩‍👧"


def test_half_a_character_comes_only_when_nothing_more_follows(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = encode("好龘", tokenizer)
    streamed = StreamedText(tokenizer, end_token_ids(tokenizer))
    streamed.put(torch.tensor([[1]]))
    for token in ids[:-1]:
        streamed.put(torch.tensor([token]))
    assert streamed.text == "好"
    streamed.end()
    assert streamed.text == capsys.readouterr().out == tokenizer.decode(ids[:-1])


def chat_command(folder: Path, *words: str) -> list[str]:
    return [warm_python(), "-m", "predict.chat", "--model", str(folder), *words]


# No token twice, so that an answer shows what stands in its prompt.
GREEDY = ["--do_sample", "false", "--repetition_penalty", "1", "--no_repeat_ngram_size", "1", "--max_new_tokens", "12"]


def test_the_command_answers_as_prediction_does(base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = ["你好", "", "/clear", "你好", "再说一句", "/what", "/exit", "never read"]
    done = subprocess.run(
        chat_command(base_folder, *GREEDY), input="\n".join(lines), capture_output=True, text=True, cwd=ROOT,
        encoding="utf-8", timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = load_for_inference(ModelArguments(model=str(base_folder), attention="sdpa"), tokenizer)
    generation = GenerationArguments(max_new_tokens=12, no_repeat_ngram_size=1)

    def answer(messages: list[dict[str, str]]) -> str:
        prompts = [encode_prompt(messages, tokenizer)]
        return answer_prompts(model, tokenizer, prompts, generation, 1, answer_end_ids(model, tokenizer))[0].text

    first = answer([user("你好")])
    second = answer([user("你好"), assistant(first), user("再说一句")])
    opening, *parts = done.stdout.split("\n> ")
    assert "template own" in opening and "/clear" in opening
    assert first and second not in (first, answer([user("你好"), assistant(""), user("再说一句")]))
    assert parts[:5] == [f"{first}\n", "", "(forgotten)\n", f"{first}\n", f"{second}\n"]
    assert "/exit" in parts[5] and parts[6:] == [""]


def test_interrupt_stops_the_answer_alone_and_the_end_of_input_ends(base_folder: Path) -> None:
    # With a handler set here, the command gets the default one, even where the tests were told to ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        chat_command(base_folder, "--max_new_tokens", "2000"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, cwd=ROOT, env=environment,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    assert process.stdin and process.stdout
    watch = threading.Timer(240, process.kill)
    watch.start()
    try:
        read_until(process, b"> ")
        for _ in range(2):
            process.stdin.write("你好\n".encode())
            process.stdin.flush()
            read_until(process, b"", least=30)  # the answer runs
            process.send_signal(signal.SIGINT)
            output = read_until(process, b"\n> ")
            assert b"(stopped)" in output
        process.stdin.close()
        assert process.wait(timeout=PATIENCE) == 0
    finally:
        watch.cancel()
        process.kill()


def read_until(process: subprocess.Popen[bytes], mark: bytes, least: int = 1) -> bytes:
    """Output up to a mark, of at least so many bytes."""
    assert process.stdout
    output = b""
    while len(output) < least or mark not in output:
        byte = process.stdout.read(1)
        assert byte, process.stderr.read().decode() if process.stderr else ""
        output += byte
    return output


@pytest.mark.parametrize(
    ("words", "cause"), [(["--num_beams", "2"], "beam search"), (["--model", "/nowhere/at/all"], "does not exist")]
)
def test_what_cannot_be_is_said_before_anything_is_loaded(words: list[str], cause: str) -> None:
    from predict.chat import main

    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2


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
    raw = RawText(tokenizer, context=40, max_new_tokens=8)
    prompt, left_out = raw.ask("灯塔下")
    assert (prompt, left_out) == (encode_document("灯塔下", tokenizer), 0)
    raw.answered("有一封信")
    assert raw.ask("")[0] == encode_document("灯塔下有一封信", tokenizer)
    assert raw.ask("海")[0] == encode_document("海", tokenizer)
    prompt, left_out = raw.ask("潮水退下去的时候，灯塔的影子正好落在信上。" * 5)
    whole = encode_document(raw.text, tokenizer)
    assert (prompt, left_out) == (whole[-32:], len(whole) - 32)
    assert raw.answer_room(prompt) == 8


def test_a_base_goes_on_with_what_is_typed(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[int]] = []
    original = RawText.ask

    def ask(self: RawText, text: str) -> tuple[list[int], int]:
        asked.append(original(self, text)[0])
        return asked[-1], 0

    monkeypatch.setattr(RawText, "ask", ask)
    lines = iter(["", "灯塔下", "", "/help"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/exit"))
    main(["--model", str(base_folder), "--mode", "text", "--max_new_tokens", "3", "--do_sample", "False"])
    assert len(asked) == 2  # an empty line before any text is nothing
    assert asked[1][: len(asked[0])] == asked[0]
    assert "raw text" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--model", str(base_folder), "--mode", "text", "--system", "你是"])
