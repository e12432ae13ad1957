"""Chat templates: which one a tokenizer uses, and the record of it that goes with every checkpoint.

The tokenizer's own template comes first. Without one: Baichuan's format for Baichuan tokenizers, ChatML where its
tokens exist, else a plain one for base models. Name and hash are kept in tokenizer_config.json, so that a model is
asked in the very words it was trained on.
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
# generation_config.json). The pieces behind these ids are named differently in the two generations.
USER_ID, ASSISTANT_ID = 195, 196
RESERVED_PIECE = re.compile(r"<reserved_\d+>")
BAICHUAN2_VOCABULARY = 125696
BAICHUAN_NAMES = ("baichuan", "baichuan2")
# The key in tokenizer_config.json.
RECORD = "novelgpt_chat_template"
# The variables by which a template is asked to leave room for a thought, and the line that gives each its default:
# Qwen3 and its kin; DeepSeek V3.1 and Granite, which then go by the first as well.
THINKING_DEFAULTS = {
    "enable_thinking": "{%- set enable_thinking = enable_thinking | default(VALUE) %}\n",
    "thinking": "{%- set thinking = thinking | default(enable_thinking | default(VALUE)) %}\n",
}
DEFAULT_LINES = re.compile(
    "".join(f"(?:{re.escape(line).replace('VALUE', '(?:true|false)')})?" for line in THINKING_DEFAULTS.values())
)
# Blocks of transformers' own, which jinja2 does not know.
GENERATION_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def settle_template(tokenizer: PreTrainedTokenizerBase, model_folder: str) -> None:
    """Give the tokenizer its chat template for certain, and note name and hash for its checkpoints.

    Where nothing is said of thoughts, the template leaves room for one as `encode_prompt` does: as most answers of the
    training began with one, and without a training not at all. So whatever serves a saved folder asks as we do.

    Args:
        tokenizer: as loaded from `model_folder`; one without a template gets one.
        model_folder: folder or hub name; the config.json of a folder tells Baichuan's two generations apart.

    Raises:
        UserError: the folder was trained with another template than the one it holds now, or holds several templates
            of which none is the default.
    """
    stored = tokenizer.init_kwargs.get(RECORD)
    if stored is not None:
        if stored["sha256"] != _digest(tokenizer):
            raise UserError(
                f"{model_folder} was trained with another chat template ({stored['name']}) than it holds now",
                "put chat_template.jinja of the training back; to train on with a new template, "
                f"delete {RECORD!r} from tokenizer_config.json",
            )
        _default_to_thinking(tokenizer, bool(stored.get("thinking", False)))
    elif tokenizer.chat_template:
        _note(tokenizer, "own")
        _default_to_thinking(tokenizer, False)
    else:
        use_template(tokenizer, *_default_template(tokenizer, model_folder))


def use_template(tokenizer: PreTrainedTokenizerBase, name: str, text: str) -> None:
    """Make `text` (Jinja) the tokenizer's chat template, recorded under `name`."""
    tokenizer.chat_template = text
    _note(tokenizer, name)


def template_record(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """{"name", "sha256"} of the chat template and, once training rows were read, "thinking" (`record_thinking`)."""
    return dict(tokenizer.init_kwargs.get(RECORD) or {"name": "own", "sha256": _digest(tokenizer)})


def record_thinking(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> None:
    """Note whether answers begin with a thought of their own, so that prompts leave room for one (Qwen3), here and by
    default wherever the template is used."""
    tokenizer.init_kwargs[RECORD] = template_record(tokenizer) | {"thinking": thinking}
    _default_to_thinking(tokenizer, thinking)


def baichuan_template(user: str, assistant: str, ends_answers: bool) -> str:
    """Baichuan's format: `[system] USER question ASSISTANT answer USER …`, without line feeds.

    Args:
        user: piece of the vocabulary that begins a question.
        assistant: piece that begins an answer.
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
        pieces = tokenizer.convert_ids_to_tokens([USER_ID, ASSISTANT_ID])
        if all(map(RESERVED_PIECE.fullmatch, pieces)):
            if tokenizer("".join(pieces), add_special_tokens=False)["input_ids"] != [USER_ID, ASSISTANT_ID]:
                # Ordinary pieces, which no text is cut into: the first generation's code puts in the bare ids.
                tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
            second = _is_second_generation(tokenizer, Path(model_folder))
            return BAICHUAN_NAMES[second], baichuan_template(pieces[0], pieces[1], ends_answers=not second)
    # Written into the template, so that other programs, which encode what it renders as it is, have it too.
    begin = "".join(tokenizer.convert_ids_to_tokens(document_begin_ids(tokenizer)))
    before = f"{{{{ {begin!r} }}}}" if begin else ""
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        return "chatml", before + CHATML_TEMPLATE
    return "plain", before + PLAIN_TEMPLATE


def _is_second_generation(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Baichuan2 has a NormHead, which small configurations name, and nearly twice the vocabulary of Baichuan."""
    path = folder / "config.json"
    config = read_object(path) if path.is_file() else {}
    norm_head = config.get("norm_head")
    return len(tokenizer) >= BAICHUAN2_VOCABULARY if norm_head is None else bool(norm_head)


def _default_to_thinking(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> None:
    """Have the template, or each of several, leave room for a thought or not where it is not told."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: _with_default(text, thinking) for name, text in templates.items()}
    elif templates:
        tokenizer.chat_template = _with_default(templates, thinking)


def _with_default(text: str, thinking: bool) -> str:
    """A template with a default for each variable of thoughts that it reads."""
    text = _without_default(text)
    environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols])
    try:
        read = jinja2.meta.find_undeclared_variables(environment.parse(GENERATION_TAGS.sub("", text)))
    except jinja2.TemplateSyntaxError:
        return text  # rendering says what is wrong with it
    lines = (line for name, line in THINKING_DEFAULTS.items() if name in read)
    # Each line feed goes with its block, as everywhere in chat templates (trim_blocks).
    return "".join(lines).replace("VALUE", "true" if thinking else "false") + text


def _without_default(text: str) -> str:
    match = DEFAULT_LINES.match(text)
    return text if match is None else text[match.end() :]


def _note(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    tokenizer.init_kwargs[RECORD] = {"name": name, "sha256": _digest(tokenizer)}


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the template's text without our default; kinds of line feeds do not count, as reading the file back makes them
    one."""
    try:
        text = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    except ValueError as error:
        raise UserError(
            "the tokenizer has several chat templates, none of them named 'default'",
            "put the one to train with into chat_template.jinja beside the weights",
        ) from error
    text = _without_default(text.replace("\r\n", "\n").replace("\r", "\n"))
    return hashlib.sha256(text.encode()).hexdigest()
