"""Chat templates: which one a tokenizer uses, and the record of it in every checkpoint.

The tokenizer's own template comes first. Without one: Baichuan's format for Baichuan tokenizers, ChatML where its
tokens exist, else a plain one for base models. Name and hash are kept in tokenizer_config.json, so that a model is
prompted exactly as it was trained.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import jinja2.ext
import jinja2.meta
from transformers import AddedToken, PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import read_object
from novelgpt.text.baichuan_tokenizer import BaichuanTokenizer
from novelgpt.text.encoding import document_begin_ids

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '### 回答\\n' + message['content'] + eos_token + '\\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### 问题\\n' + message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### 回答\\n' }}{% endif %}"
)
# Where Baichuan's chat models expect a question and an answer to begin (user_token_id and assistant_token_id of their
# generation_config.json). The two generations name the tokens of these ids differently.
USER_ID, ASSISTANT_ID = 195, 196
RESERVED_TOKEN = re.compile(r"<reserved_\d+>")
BAICHUAN2_VOCABULARY = 125696
BAICHUAN_NAMES = ("baichuan", "baichuan2")
# The key in tokenizer_config.json.
RECORD = "novelgpt_chat_template"
# The variables that ask a template to leave room for a thought, and the line that gives each its default: Qwen3's
# family; DeepSeek V3.1 and Granite, which then follow the first as well.
THINKING_DEFAULTS = {
    "enable_thinking": "{%- set enable_thinking = enable_thinking | default(VALUE) %}\n",
    "thinking": "{%- set thinking = thinking | default(enable_thinking | default(VALUE)) %}\n",
}
DEFAULT_LINES = re.compile(
    "".join(f"(?:{re.escape(line).replace('VALUE', '(?:true|false)')})?" for line in THINKING_DEFAULTS.values())
)
# Blocks that transformers adds to jinja2.
GENERATION_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def settle_template(tokenizer: PreTrainedTokenizerBase, model_folder: str) -> None:
    """Make sure that the tokenizer has a chat template, and record its name and hash for its checkpoints.

    Where a request says nothing about thoughts, the template leaves room for one as `encode_prompt` does: if most
    answers of the training began with one; without a training, not at all. So whatever serves a saved folder makes the
    same prompts as this toolkit.

    Args:
        tokenizer: as loaded from `model_folder`; one without a template gets one.
        model_folder: folder or hub name; the config.json of a folder distinguishes Baichuan's two generations.

    Raises:
        UserError: the folder was trained with another template than the one it holds now, or holds several templates
            of which none is the default.
    """
    stored = tokenizer.init_kwargs.get(RECORD)
    if stored is None and not tokenizer.chat_template:
        use_template(tokenizer, *_default_template(tokenizer, model_folder))
        return
    if stored is None:
        use_template(tokenizer, "own", tokenizer.chat_template)
    elif stored["sha256"] != _digest(tokenizer):
        raise UserError(
            f"{model_folder} was trained with another chat template ({stored['name']}) than it holds now",
            "put chat_template.jinja of the training back; to train on with a new template, "
            f"delete {RECORD!r} from tokenizer_config.json",
        )
    _set_thinking_default(tokenizer, bool((stored or {}).get("thinking", False)))


def use_template(tokenizer: PreTrainedTokenizerBase, name: str, text: str | dict[str, str]) -> None:
    """Make `text` (Jinja, or several by name) the tokenizer's chat template, recorded under `name`."""
    tokenizer.chat_template = text
    tokenizer.init_kwargs[RECORD] = {"name": name, "sha256": _digest(tokenizer)}


def template_record(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """{"name", "sha256"} of the chat template and, once training rows were read, "thinking" (`record_thinking`)."""
    return dict(tokenizer.init_kwargs.get(RECORD) or {"name": "own", "sha256": _digest(tokenizer)})


def record_thinking(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> None:
    """Record whether most answers begin with a thought of their own, so that prompts leave room for one (Qwen3), here
    and by default wherever the saved template is used."""
    tokenizer.init_kwargs[RECORD] = template_record(tokenizer) | {"thinking": thinking}
    _set_thinking_default(tokenizer, thinking)


def baichuan_template(user: str, assistant: str, ends_answers: bool) -> str:
    """Baichuan's format: `[system] USER question ASSISTANT answer USER …`, without line feeds.

    Args:
        user: token that begins a question.
        assistant: token that begins an answer.
        ends_answers: whether each answer is followed by the end token (Baichuan-13B-Chat), or the next question is all
            that ends it (Baichuan2-Chat).
    """
    end = " + eos_token" if ends_answers else ""
    return (
        "{% for message in messages %}"
        f"{{% if message['role'] == 'assistant' %}}{{{{ {assistant!r} + message['content']{end} }}}}"
        "{% elif message['role'] == 'system' %}{{ message['content'] }}"
        f"{{% else %}}{{{{ {user!r} + message['content'] }}}}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {assistant!r} }}}}{{% endif %}}"
    )


def _default_template(tokenizer: PreTrainedTokenizerBase, model_folder: str) -> tuple[str, str]:
    """Name and text for a tokenizer without a template."""
    if isinstance(tokenizer, BaichuanTokenizer) and len(tokenizer) > ASSISTANT_ID:
        tokens = tokenizer.convert_ids_to_tokens([USER_ID, ASSISTANT_ID])
        if all(map(RESERVED_TOKEN.fullmatch, tokens)):
            if tokenizer("".join(tokens), add_special_tokens=False)["input_ids"] != [USER_ID, ASSISTANT_ID]:
                # Ordinary tokens that no text is split into: the first generation's code inserts the bare ids.
                tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
            # Baichuan2 has a NormHead, which small configurations name, and nearly twice the vocabulary of Baichuan.
            config = Path(model_folder) / "config.json"
            norm_head = read_object(config).get("norm_head") if config.is_file() else None
            second = len(tokenizer) >= BAICHUAN2_VOCABULARY if norm_head is None else bool(norm_head)
            return BAICHUAN_NAMES[second], baichuan_template(tokens[0], tokens[1], ends_answers=not second)
    # Part of the template, so that other programs, which encode the rendered text as it is, have it too.
    begin = "".join(tokenizer.convert_ids_to_tokens(document_begin_ids(tokenizer)))
    before = f"{{{{ {begin!r} }}}}" if begin else ""
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        return "chatml", before + CHATML_TEMPLATE
    return "plain", before + PLAIN_TEMPLATE


def _set_thinking_default(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> None:
    """Have the template, or each of several, leave room for a thought or not where a request says nothing about it."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: _with_default(text, thinking) for name, text in templates.items()}
    elif templates:
        tokenizer.chat_template = _with_default(templates, thinking)


def _with_default(text: str, thinking: bool) -> str:
    """A template with a default for each variable about thoughts that it reads."""
    text = DEFAULT_LINES.sub("", text, count=1)
    environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols])
    try:
        read = jinja2.meta.find_undeclared_variables(environment.parse(GENERATION_TAGS.sub("", text)))
    except jinja2.TemplateSyntaxError:
        return text  # rendering reports what is wrong with it
    lines = (line for name, line in THINKING_DEFAULTS.items() if name in read)
    # Each line feed goes with its block, as everywhere in chat templates (trim_blocks).
    return "".join(lines).replace("VALUE", "true" if thinking else "false") + text


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the template's text without our default; kinds of line feeds do not count, as reading the file back
    unifies them."""
    try:
        text = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    except ValueError as error:
        raise UserError(
            "the tokenizer has several chat templates, none of them named 'default'",
            "put the one to train with into chat_template.jinja beside the weights",
        ) from error
    unified = text.replace("\r\n", "\n").replace("\r", "\n")
    return hashlib.sha256(DEFAULT_LINES.sub("", unified, count=1).encode()).hexdigest()
