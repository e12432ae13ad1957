"""Fields of rows and messages that change what is trained: obeyed, or refused by name; never ignored.

Other tools give such fields a meaning: flags that keep answers out of the loss (ms-swift's `loss`, axolotl's `train`),
weights in it (OpenAI's `weight`), tools and their calls, preferences, media. Without this a row would be trained as
something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dataset.records import Record, load_json
from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import as_typed
from novelgpt.text.messages import Message

# Values of fields that say nothing: formats with columns have every field in every row.
ABSENT: tuple[Any, ...] = (None, "", [], {})
# Fields that say whether an answer is trained: true, false, 1 or 0; and by how much it counts in the loss.
FLAGS = ("loss", "train", "training", "trainable")
WEIGHTS = ("weight", "loss_scale", "loss_weight")
# Weights other than 0 lie between these, so that the product of a row's and a turn's is exact enough in fp32.
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
# Fields that hold what was thought before an answer, the standard name first.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Fields of rows that hold two answers to one prompt, of which one is preferred.
PREFERENCE_FIELDS = ("chosen", "rejected", "rejected_response", "rejected_messages", "margin")
_TRUE, _FALSE = ("1", "1.0", "true"), ("0", "0.0", "false")

# Names of fields that are refused -> (cause, remedy); modules of ours in backquotes are shown as the user types them.
_REFUSED: dict[tuple[str, ...], tuple[str, str]] = {
    PREFERENCE_FIELDS: (
        "belongs to a preference row (two answers to one prompt, for DPO and reward models), and no pipeline here "
        "trains on those",
        "`dataset preview FILE` shows them; TRL's DPOTrainer, LLaMA-Factory (stage: dpo) and ms-swift (swift rlhf) "
        "train on them, and `dataset preferences FILE pairs.jsonl` writes them for TRL; to fine-tune on the preferred "
        "answers, write those as messages and leave this field out",
    ),
    ("kto_tag", "label"): (
        "says that an answer is good or bad (KTO), or names a class, and no pipeline here trains on that",
        "train on it with TRL's KTOTrainer, LLaMA-Factory (stage: kto) or ms-swift (swift rlhf --rlhf_type kto); to "
        "fine-tune on the good answers, keep their rows and leave this field out",
    ),
    ("image", "images", "video", "videos", "audio", "audios", "objects"): (
        "names images, sound or regions in them, and the models here read text only",
        "leave these rows out, or the field where the texts say enough without it",
    ),
    (
        "mask", "masks", "loss_mask", "completion_mask", "assistant_masks", "train_detail", "training_detail",
        "input_ids", "attention_mask", "labels",
    ): (
        "says token by token or part by part what is trained, which is not read here",
        'mark whole answers with "loss": false or a "weight" instead, or leave the field out',
    ),
    ("channel",): (
        "sorts the loss into channels, which is not done here",
        "leave it out, or rename it where it is only a note",
    ),
}  # fmt: skip
_REFUSED_IN_ROWS = _REFUSED | {
    ("system_prompt", "system_message"): ("is not a field that is read", "name it system"),
    ("documents",): (
        "holds documents for the chat template, which are not put into prompts here",
        "write what they say into the question",
    ),
    ("chat_template", "chat_template_kwargs"): (
        "changes the chat template for one row, which is not done here",
        "leave it out; a template for all rows is chat_template.jinja beside the weights",
    ),
}
_REFUSED_IN_MESSAGES = _REFUSED | {
    ("tools", "functions"): ("belongs to the row, not to a message", "write it beside the messages"),
    ("refusal",): ("holds a refusal, which is not read", "write it as content"),
}
REFUSED_IN_ROWS = {name: reason for names, reason in _REFUSED_IN_ROWS.items() for name in names}
REFUSED_IN_MESSAGES = {name: reason for names, reason in _REFUSED_IN_MESSAGES.items() for name in names}
# Fields of rows that the ordinary row does not have.
SPECIAL_FIELDS = frozenset(("tools", "functions", "enable_thinking", *FLAGS, *WEIGHTS, *REFUSED_IN_ROWS))


def refuse_fields(fields: Mapping[str, Any], refused: Mapping[str, tuple[str, str]], place: str) -> None:
    """Refuse a row or message with a field that would change its training and is not obeyed.

    Args:
        fields: of the row or message.
        refused: names of fields that are refused there -> (cause, remedy).
        place: file, line and what precedes the field's name, for errors.

    Raises:
        UserError: names the field, says what it is and what to do.
    """
    for name, (cause, remedy) in refused.items():
        if fields.get(name) not in ABSENT:
            raise UserError(f"{place}{name} {cause}", as_typed(remedy))


def read_weight(fields: Mapping[str, Any], where: str, prefix: str = "") -> tuple[str, float] | None:
    """The weight of a row or message in the loss, with the name of its field; None where it has none.

    A flag is a weight of 1 or 0; beside a weight it only has to agree on whether there is anything to train.

    Raises:
        UserError: a value that is no weight or no flag, or two fields that disagree.
    """
    found: tuple[str, float] | None = None
    for name in (*WEIGHTS, *FLAGS):
        value = fields.get(name)
        if value in ABSENT:
            continue
        text = str(value).strip().lower()
        if text in (*_TRUE, *_FALSE):
            weight = float(text in _TRUE)
        elif name in FLAGS:
            raise UserError(
                f"{where}: field {prefix}{name} is {value!r}: it says whether an answer counts in the loss",
                'write true or false (1 or 0); by how much it counts, "weight" says; or rename a field that is a note',
            )
        else:
            weight = _number(text)
            if weight != 0 and not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
                raise UserError(
                    f"{where}: field {prefix}{name} is {value!r}, which is no weight in the loss",
                    f"write 0, 1 or another number from {LEAST_WEIGHT:f} to {MOST_WEIGHT:,.0f}, or rename the field "
                    "where it is only a note",
                )
        if found is not None and weight != (found[1] if name in WEIGHTS else float(found[1] != 0)):
            raise UserError(f"{where}: fields {prefix}{found[0]} and {prefix}{name} disagree", "leave one of them out")
        found = found or (name, weight)
    return found


def _number(text: str) -> float:
    """The number that a text says; NaN where it says none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_thought(fields: Mapping[str, Any], where: str, prefix: str = "") -> str:
    """What was thought before an answer, "" for nothing.

    Raises:
        UserError: it is not a text.
    """
    thoughts = {name: fields[name] for name in THOUGHTS if fields.get(name) not in ABSENT}
    for name, thought in thoughts.items():
        if not isinstance(thought, str):
            raise UserError(f"{where}: field {prefix}{name} is not a text", "give it a text, or leave it out")
    return next((thought for thought in thoughts.values() if thought.strip()), "")


def read_tools(record: Mapping[str, Any], where: str) -> list[Record]:
    """The tools of a row, [] for none: {"type": "function", "function": {…}} each.

    They are in `tools`, as a list or as JSON text (LLaMA-Factory, ms-swift), or in `functions` (OpenAI's first form).
    A tool without the outer mapping gets it.

    Raises:
        UserError: not a list of tools with names; names the field.
    """
    tools: list[Record] = []
    for field in ("tools", "functions"):
        for number, tool in enumerate(_read_items(record.get(field), f"{where} field {field}")):
            bare = tool.get("function", tool) if isinstance(tool, dict) else tool
            if not isinstance(bare, dict) or not isinstance(bare.get("name"), str):
                raise UserError(
                    f"{where}: field {field}[{number}] is not a tool with a name",
                    'write [{"type": "function", "function": {"name": …, "description": …, "parameters": …}}, …]',
                )
            tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools


def read_calls(message: Mapping[str, Any], where: str, name: str) -> list[Record]:
    """The calls of a message in `tool_calls`, or in `function_call` (OpenAI's first form); [] for none.

    Raises:
        UserError: a call without a name, or arguments that are not a mapping; names the field.
    """
    calls = message.get("tool_calls")
    if isinstance(calls, dict):
        raise UserError(f"{where}: field {name}.tool_calls is not a list of calls", 'write [{"function": {…}}, …]')
    items = enumerate(_read_items(calls, f"{where} field {name}.tool_calls"))
    call = _read_items(message.get("function_call"), f"{where} field {name}.function_call")
    return [
        *(_read_call(item, where, f"{name}.tool_calls[{number}]") for number, item in items),
        *(_read_call(item, where, f"{name}.function_call") for item in call),
    ]


def read_call_text(text: Any, where: str, name: str) -> list[Record]:
    """The calls that the content of a `function_call` or `tool_call` turn holds as JSON: one, or a list.

    Raises:
        UserError: not JSON, or not a call; names the field.
    """
    calls = [_read_call(call, where, name) for call in _read_items(text, f"{where}: field {name}")]
    if not calls:
        raise UserError(f"{where}: field {name} holds no call", 'write {"name": …, "arguments": {…}}')
    return calls


def _read_items(value: Any, place: str) -> list[Any]:
    """The items of a field that is a list, or one item, or either as JSON text."""
    if isinstance(value, str) and value.strip():
        value = load_json(value, place)
    if value in ABSENT or (isinstance(value, str) and not value.strip()):
        return []
    return value if isinstance(value, list) else [value]


def _read_call(call: Any, where: str, place: str) -> Record:
    """{"type", "function": {"name", "arguments": mapping}} and the other fields beside them, such as the id."""
    outer = call if isinstance(call, dict) else {}
    function = outer.get("function")
    inner: Record = function if isinstance(function, dict) else outer
    if not isinstance(inner.get("name"), str) or not inner["name"]:
        raise UserError(f"{where}: field {place} is not a call of a tool", 'write {"name": …, "arguments": {…}}')
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        arguments = load_json(arguments, f"{where}: field {place}.arguments") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: field {place}.arguments is not a mapping", 'write {"argument": value}, or its JSON')
    others = {key: value for key, value in inner.items() if key not in ("arguments", "parameters")}
    made = {**others, "arguments": arguments}
    return {"type": "function", **(outer if inner is function else {}), "function": made}


def merge_calls(messages: list[Message], called: set[int]) -> list[Message]:
    """Messages in which each turn that was written as a call alone is part of the answer right before it.

    Args:
        messages: in order.
        called: numbers of those that stand for calls alone, as ShareGPT's `function_call`.
    """
    merged: list[Message] = []
    for number, message in enumerate(messages):
        before = merged[-1] if merged and number in called else message
        alike = before.get("weight", 1.0) == message.get("weight", 1.0)
        if before is not message and before["role"] == "assistant" and alike:
            merged[-1] = {**before, "tool_calls": [*before.get("tool_calls", []), *message["tool_calls"]]}
        else:
            merged.append(message)
    return merged
