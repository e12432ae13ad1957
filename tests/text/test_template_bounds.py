"""Chat templates come with models of others: none of them keeps the toolkit busy for ever or fills the memory."""

import shutil
import signal
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from novelgpt.doctor import check_run
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.text import template_bounds
from novelgpt.text.conversation import encode_conversation, encode_prompt
from novelgpt.text.rendering import RenderedConversation

LOOPS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
FIBONACCI = "{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
ENDLESS = {
    "nested loops": LOOPS,
    "a macro that calls itself twice": "{% macro f(n) %}" + FIBONACCI + "{% endmacro %}{{ f(60) }}",
    "doubled again and again": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "one long text": "{{ 'x' * 10 ** 11 }}",
    "much text": "{% for i in range(99999) %}好好好好{% endfor %}",
}
MESSAGES = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "TRIAL_SECONDS", 1)
    monkeypatch.setattr(template_bounds, "RENDER_SECONDS", 1)


def with_template(base_folder: Path, folder: Path, template: str) -> Path:
    shutil.copytree(base_folder, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_tokenizer_with_an_endless_template_is_refused(kind: str, base_folder: Path, tmp_path: Path) -> None:
    folder = with_template(base_folder, tmp_path / "base", ENDLESS[kind])
    with pytest.raises(UserError, match="chat template does not come to an end"):
        load_tokenizer(ModelArguments(str(folder)))


def test_the_doctor_tells_of_an_endless_template(base_folder: Path, tmp_path: Path) -> None:
    folder = with_template(base_folder, tmp_path / "base", LOOPS)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "问", "response": "答"}\n', encoding="utf-8")
    findings = list(check_run("finetune", ["--model", str(folder), "--train_files", str(rows)], 1))
    (problem,) = [finding for finding in findings if finding.mark == "problem"]
    assert "does not come to an end" in problem.text
    assert "chat_template.jinja" in problem.remedy


@pytest.mark.parametrize(
    ("trap", "cause"), [(LOOPS, "has not ended after"), ("{% for i in range(99999) %}好好好好{% endfor %}", "writes")]
)
def test_a_template_that_is_endless_for_some_rows_only_is_stopped_there(
    trap: str, cause: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", "{% if 'x' in messages[0].content %}" + trap + "{% endif %}" + own)
    template_bounds.check_template_ends(tokenizer)
    assert encode_conversation(MESSAGES, tokenizer)
    hostile = [{"role": "user", "content": "x"}, *MESSAGES[1:]]
    for encode in (encode_conversation, encode_prompt):
        with pytest.raises(UserError, match=cause):
            encode(hostile, tokenizer)


def test_what_a_template_makes_is_what_transformers_makes_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    chat = RenderedConversation(MESSAGES, tokenizer)
    assert chat.render(chat.messages, add_generation_prompt=True) == expected
    long = [{"role": "user", "content": "字" * 1_000_000}]
    assert len(chat.render(long)) > 1_000_000


def test_endless_templates_are_stopped_on_systems_without_processor_clocks(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_bounds, "HAS_LIMITS", False)
    monkeypatch.delattr(signal, "SIGVTALRM")
    own = tokenizer.chat_template
    template_bounds.check_template_ends(tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{% if 'x' in messages[0].content %}" + LOOPS + "{% endif %}" + own)
    template_bounds.check_template_ends(tokenizer)
    assert encode_conversation(MESSAGES, tokenizer)
    with pytest.raises(UserError, match="has not ended after"):
        encode_conversation([{"role": "user", "content": "x"}, *MESSAGES[1:]], tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", LOOPS)
    with pytest.raises(UserError, match="does not come to an end"):
        template_bounds.check_template_ends(tokenizer)
