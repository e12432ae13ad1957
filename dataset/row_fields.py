"""Fields of rows and of messages that change what is trained: obeyed, or refused by their name; never passed over.

Other tools give such fields a meaning: flags that keep answers out of the loss (ms-swift's `loss`, OpenAI's `weight`,
axolotl's `train`), preferences, media. A row that carries one would otherwise be trained as what it is not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from novelgpt.settings.errors import UserError

# Fields that say whether an answer is trained: true, false, 1 or 0.
FLAGS = ("loss", "weight", "train", "training", "trainable", "loss_scale", "loss_weight")
# Fields that hold what was thought before an answer, the standard name first.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_TRUE, _FALSE = ("1", "1.0", "true"), ("0", "0.0", "false")


class _Refused(NamedTuple):
    """Why fields are refused, and what to do about them."""

    names: tuple[str, ...]
    cause: str
    remedy: str


_PREFERENCES = _Refused(
    ("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag", "label", "margin"),
    "belongs to rows of preferences or classes (DPO, KTO, reward models), which no pipeline here trains on",
    "train on them with TRL, LLaMA-Factory (--stage dpo) or ms-swift (swift rlhf); to fine-tune on the good answers, "
    "write those as messages and leave this field out",
)
_MEDIA = _Refused(
    ("image", "images", "video", "videos", "audio", "audios", "objects"),
    "names pictures, sound or places in them, and models here read text alone",
    "leave these rows out, or the field where the texts say enough without it",
)
_MASKS = _Refused(
    (
        "mask", "masks", "loss_mask", "completion_mask", "assistant_masks", "train_detail", "training_detail",
        "input_ids", "attention_mask", "labels",
    ),
    "says token by token or part by part what is trained, which is not read here",
    'mark whole answers with "loss": false instead, or leave the field out',
)  # fmt: skip
_CHANNEL = _Refused(
    ("channel",),
    "sorts the loss into channels, which is not done here",
    "leave it out, or name it otherwise where it is only a note",
)
_OF_BOTH = (_PREFERENCES, _MEDIA, _MASKS, _CHANNEL)
_OF_ROWS = (
    *_OF_BOTH,
    _Refused(("system_prompt", "system_message"), "is no field that is read", "name it system"),
    _Refused(
        ("documents",), "holds documents for the chat template, which are not put into prompts here",
        "write what they say into the question",
    ),
    _Refused(
        ("chat_template", "chat_template_kwargs"), "changes the chat template for one row, which is not done here",
        "leave it out; a template for all rows is chat_template.jinja beside the weights",
    ),
)  # fmt: skip
_OF_MESSAGES = (
    *_OF_BOTH,
    _Refused(("tools", "functions"), "belongs to the row, not to a message", "write it beside the messages"),
    _Refused(("refusal",), "holds a refusal, which is not read", "write it as content"),
)


def check_row_fields(record: Mapping[str, Any], where: str, read: Collection[str]) -> None:
    """Refuse a row with a field that would change its training and is not obeyed.

    Args:
        record: the row.
        where: file and line, for errors.
        read: fields that this row's shape or task reads; they are texts like any other.

    Raises:
        UserError: names the field, says what it is and what to do.
    """
    _check(record, f"{where}: field ", _OF_ROWS, read)


def check_message_fields(message: Mapping[str, Any], where: str, name: str) -> None:
    """As `check_row_fields`, for the message called `name`."""
    _check(message, f"{where}: field {name}.", _OF_MESSAGES, ())


def is_absent(value: Any) -> bool:
    """Whether a field says nothing: formats with columns have all fields in each row."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def read_flag(fields: Mapping[str, Any], where: str, prefix: str = "") -> tuple[str, bool] | None:
    """The flag of a row or message, with its name; None where it has none.

    Raises:
        UserError: a weight between 0 and 1 or above, another kind of value, or two flags that disagree.
    """
    found: tuple[str, bool] | None = None
    for name in FLAGS:
        value = fields.get(name)
        if is_absent(value):
            continue
        text = str(value).strip().lower()
        if isinstance(value, (list, dict)) or text not in (*_TRUE, *_FALSE):
            raise UserError(
                f"{where}: field {prefix}{name} is {value!r}: an answer counts in the loss or not, not in part",
                "write true or false (1 or 0), leave the field out, or name it otherwise where it is only a note",
            )
        flag = text in _TRUE
        if found is not None and found[1] != flag:
            raise UserError(f"{where}: fields {prefix}{found[0]} and {prefix}{name} disagree", "leave one of them out")
        found = found or (name, flag)
    return found


def read_thought(fields: Mapping[str, Any], where: str, prefix: str = "") -> str:
    """What was thought before an answer, "" for nothing.

    Raises:
        UserError: it is no text.
    """
    for name in THOUGHTS:
        value = fields.get(name)
        if is_absent(value):
            continue
        if not isinstance(value, str):
            raise UserError(f"{where}: field {prefix}{name} is no text", "give it a text, or leave it out")
        if value.strip():
            return value
    return ""


def _check(fields: Mapping[str, Any], begin: str, kinds: Collection[_Refused], read: Collection[str]) -> None:
    for kind in kinds:
        for name in kind.names:
            if name not in read and not is_absent(fields.get(name)):
                raise UserError(f"{begin}{name} {kind.cause}", kind.remedy)
