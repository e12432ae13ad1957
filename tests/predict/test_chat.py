"""The chat command: it answers as prediction does, and stops when told to."""

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from novelgpt.inference.chat import TextHistory
from novelgpt.inference.generation import answer_end_ids, answer_prompts
from novelgpt.inference.loading import load_for_inference
from novelgpt.settings.arguments import GenerationArguments, ModelArguments
from novelgpt.text.conversation import encode_prompt
from predict.chat import main
from tests.launched import PATIENCE
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
TEXT = "他说：“你好，𠮷野家！”\n\n　　🙂👨\u200d👩\u200d👧 龘 abc  déjà 12\r\n"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


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


def test_a_base_goes_on_with_what_is_typed(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[int]] = []
    original = TextHistory.ask

    def ask(self: TextHistory, text: str) -> tuple[list[int], int]:
        asked.append(original(self, text)[0])
        return asked[-1], 0

    monkeypatch.setattr(TextHistory, "ask", ask)
    lines = iter(["", "灯塔下", "", "/help"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/exit"))
    main(["--model", str(base_folder), "--mode", "text", "--max_new_tokens", "3", "--do_sample", "False"])
    assert len(asked) == 2  # an empty line before any text is nothing
    assert asked[1][: len(asked[0])] == asked[0]
    assert "raw text" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--model", str(base_folder), "--mode", "text", "--system", "你是"])
