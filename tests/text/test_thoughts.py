"""What is thought and what is answer, wherever the marks stand."""

import pytest

from novelgpt.text.messages import opens_thought, split_thought

CASES = [
    # what was written, whether the prompt opened a thought, thought, answer
    ("雨停了。", False, "", "雨停了。"),
    ("  雨停了。\n", None, "", "  雨停了。\n"),
    ("<think>想</think>答", False, "想", "答"),
    ("\n<think>\n想\n想\n</think>\n\n　　答 ", None, "想\n想", "　　答 "),
    ("<think>\n\n</think>\n\n答", False, "", "答"),
    ("<think>想到一半", False, "想到一半", ""),
    ("<think>", None, "", ""),
    ("想到一半", True, "想到一半", ""),
    ("想\n</think>\n\n答", True, "想", "答"),
    ("想\n</think>\n\n答", None, "想", "答"),
    ("想\n</think>\n\n答", False, "", "想\n</think>\n\n答"),
    ("<think>想</think>答", True, "想", "答"),
    ("<think>甲<think>乙</think>丙</think>答", False, "甲<think>乙</think>丙", "答"),
    ("<think>我该写 <think> 吗</think>答", False, "我该写 <think> 吗", "答"),
    ("甲<think>乙</think>丙</think>答", None, "甲<think>乙</think>丙", "答"),
    ("标签 <think>想</think> 之后是答案。", None, "", "标签 <think>想</think> 之后是答案。"),
    ("标签 <think> 是什么？", None, "", "标签 <think> 是什么？"),
    ("标签 <think> 是什么？", False, "", "标签 <think> 是什么？"),
    ("<think>想</think>用 <think>…</think> 写。", False, "想", "用 <think>…</think> 写。"),
    ("<think>甲</think>\n<think>乙</think>\n答", False, "甲\n乙", "答"),
    ("", None, "", ""),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "opened", "thought", "answer"), CASES)
def test_thought_and_answer_are_told_apart(text: str, opened: bool | None, thought: str, answer: str) -> None:
    assert split_thought(text, opened) == (thought, answer)
    # What is told apart once stays: files of predictions are scored again.
    assert split_thought(answer, False) == ("", answer)


def test_prompts_that_open_a_thought() -> None:
    assert opens_thought("<|im_start|>assistant\n<think>\n") and opens_thought("<think>")
    assert not opens_thought("<think>\n\n</think>\n\n") and not opens_thought("写 <think> 吗？<|im_end|>\n")
