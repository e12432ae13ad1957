"""Model cards: README.md beside weights, as the Hugging Face hub reads it; the toolkit writes it, users may edit it.

A card ends with a comment that holds the hash of everything before it. If the hash does not match, a user has edited
it; without the comment, it is not the toolkit's. Neither is ever overwritten. Text from outside is put into code spans,
so that no name can start a line, a heading, a link or a metadata block.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import CHAT_TEMPLATE_FILE

from novelgpt.model.fingerprint import BASE_RECORD
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import read_object
from novelgpt.settings.small_bases import small_base_name
from novelgpt.settings.terminal import one_line

CARD = "README.md"
MAX_CHARACTERS = 300
# Cards take some kilobytes; larger files are not the toolkit's.
MAX_BYTES = 1_000_000
# Of metadata from elsewhere, which YAML may take long to parse.
MAX_METADATA = 20_000
# Only known to transformers through this toolkit.
OWN_ARCHITECTURES = ("baichuan", "qwen")
SCORES = "Scores"
_COMMENT = "novelgpt card, sha256 {}: edit what you like, and it stays as you left it"
_SIGNATURE = re.compile(rf"\n<!-- {_COMMENT.format('([0-9a-f]{64})')} -->\n")
_METADATA = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")


_REGISTER = "import novelgpt.model  # makes the architecture known; from a checkout of NovelGPT\n\n"
_TEMPLATE = """messages = [{"role": "user", "content": "你好"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
"""
_USE = """```python
import torch
{peft}from transformers import AutoModelForCausalLM, AutoTokenizer

{register}folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
{load}
{template}inputs = tokenizer({prompt}, add_special_tokens=False, return_tensors="pt")
with torch.inference_mode():
    answer = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

With NovelGPT, answers to rows and their scores:

```bash
novelgpt predict --model path/to/this/folder --data_files my_test.jsonl
```"""


@dataclass
class Card:
    """A model card.

    Attributes:
        metadata: front matter, plain values.
        title: one line of Markdown.
        sections: Markdown by heading; "" is the text below the title. No line of them starts with "## ".
    """

    metadata: dict[str, Any]
    title: str
    sections: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The content of the file."""
        head = yaml.safe_dump(self.metadata, allow_unicode=True, sort_keys=False, width=1000)
        parts = [f"---\n{head}---\n\n# {self.title}\n"]
        parts += [f"\n## {name}\n\n{body}\n" if name else f"\n{body}\n" for name, body in self.sections.items()]
        text = "".join(parts)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{text}\n<!-- {_COMMENT.format(digest)} -->\n"


def read_card(folder: Path) -> Card | None:
    """Read the card of a folder; None unless the toolkit wrote it and nobody has changed it since."""
    text = _read(folder)
    signature = _SIGNATURE.search(text)
    if signature is None or signature.end() != len(text):
        return None
    text = text[: signature.start()]
    head = _METADATA.match(text)
    if head is None or hashlib.sha256(text.encode()).hexdigest() != signature[1]:
        return None
    title, *parts = text[head.end() :].split("\n## ")
    name, _, lead = title.strip("\n").removeprefix("# ").partition("\n")
    bodies = {heading: body.strip("\n") for heading, _, body in (part.partition("\n") for part in parts)}
    return Card(yaml.safe_load(head[1]), name, {"": lead.strip("\n")} | bodies)


def _read(folder: Path) -> str:
    """README.md of a folder; "" if it is missing, too large or not text."""
    path = folder / CARD
    try:
        return path.read_bytes().decode() if path.is_file() and path.stat().st_size <= MAX_BYTES else ""
    except (OSError, UnicodeDecodeError):
        return ""


def may_write_card(folder: Path) -> bool:
    """Whether a folder has no README.md, or an unchanged one of the toolkit, which is never a link."""
    path = folder / CARD
    return not path.is_symlink() and (not path.exists() or read_card(folder) is not None)


def write_card(folder: Path, card: Card) -> bool:
    """Write the card of a folder; return False if it has a README.md of someone else, which is kept.

    Raises:
        OSError: it cannot be written.
    """
    if not may_write_card(folder):
        return False
    atomic_write(folder / CARD, card.text())
    return True


def code(text: object) -> str:
    """Format text as an inline code span.

    >>> code("a`b")
    '``a`b``'
    """
    shown = one_line(str(text)).replace("\t", " ").strip() or "(empty)"
    if len(shown) > MAX_CHARACTERS:
        shown = shown[:MAX_CHARACTERS] + " …"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table. A bar ends a cell even within a code span, so it is escaped."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hub_name(model: str) -> str | None:
    """The name of a model on the hub; None for a folder."""
    try:
        validate_repo_id(model)
    except HFValidationError:
        return None
    return None if Path(model).exists() or not model.isascii() else model


def shown_name(model: str) -> str:
    """The name of a model in a card, without paths of this machine."""
    return small_base_name(model) or hub_name(model) or Path(model).name


def base_metadata(base: str, relation: str, hub: str | None = None) -> dict[str, Any]:
    """Front matter about the base: its name on the hub and its license, if they are known.

    Args:
        base: folder or hub name. The card of a folder may name the model it was made from; that is also the base of
            full weights, but not of an adapter.
        relation: finetune or adapter.
        hub: where names are looked up; names of another hub mean nothing on Hugging Face's.
    """
    named = {} if hub_name(base) else _metadata_of(Path(base))
    name = hub_name(base) if hub != "modelscope" else None
    if name is None and relation != "adapter":
        name = named.get("base_model")
    found: dict[str, Any] = {}
    if isinstance(name, str) and hub_name(name):
        found = {"base_model": name, "base_model_relation": relation}
    if isinstance(named.get("license"), str) and _LICENSE.fullmatch(named["license"]):
        found["license"] = named["license"]
    return found


def base_identity(base: str, folder: Path) -> str:
    """One line about the base of the adapter or model in `folder`: its name, and the hash of its weights if known."""
    line = f"Base: {code(shown_name(base))}"
    try:
        fingerprint = read_object(folder / BASE_RECORD).get("fingerprint")
    except UserError:  # missing or damaged
        return line
    return line + (f", fingerprint of its weights {code(fingerprint)}" if isinstance(fingerprint, str) else "")


def use_section(adapter: bool, base: str, architecture: str, chat: bool) -> str:
    """How to load the weights in Python, and how to use them with the toolkit.

    Args:
        adapter: whether the folder holds an adapter.
        base: its base, or the model that was trained.
        architecture: model_type of its configuration.
        chat: whether it answers, or continues a text.
    """
    if adapter:
        name = json.dumps(hub_name(base) or "path/to/the/base")
        load = f'base = AutoModelForCausalLM.from_pretrained({name}, dtype="auto")\n'
        load += "model = PeftModel.from_pretrained(base, folder)"
    else:
        load = 'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")'
    return _USE.format(
        peft="from peft import PeftModel\n" if adapter else "",
        register=_REGISTER if architecture in OWN_ARCHITECTURES else "",
        load=load,
        template=_TEMPLATE if chat else "",
        prompt="prompt" if chat else '"第一章"',
    )


def write_derived_card(folder: Path, name: str, source: str, made: str, base: str, architecture: str) -> None:
    """Write the card of full weights that were merged or converted from other weights.

    The training sections of the source's card are kept; scores are not.

    Args:
        folder: of the new weights.
        name: its final name.
        source: folder or hub name of the weights they were made from.
        made: what was done, one sentence of Markdown.
        base: what the source was trained on; without a card of the training, the source itself.
        architecture: model_type of the new weights.

    Raises:
        OSError: it cannot be written.
    """
    card = read_card(Path(source)) or Card({"tags": ["novelgpt"]}, "", {"": base_identity(base, Path(source))})
    known = {key: value for key, value in card.metadata.items() if key not in ("library_name", "metrics")}
    known = base_metadata(base, "finetune") | known
    if "base_model_relation" in known:
        known["base_model_relation"] = "finetune"
    metadata = {"library_name": "transformers", "pipeline_tag": "text-generation"} | known
    chat = "apply_chat_template" in card.sections.get("Use", "") or (
        "Use" not in card.sections and (folder / CHAT_TEMPLATE_FILE).is_file()
    )
    kept = {heading: body for heading, body in card.sections.items() if heading not in ("", "Use", SCORES)}
    sections = {"": f"{made}\n\n{card.sections['']}", "Use": use_section(False, base, architecture, chat)} | kept
    write_card(folder, Card(metadata, code(name), sections))


def _metadata_of(folder: Path) -> dict[str, Any]:
    """Front matter of a folder's README.md, whoever wrote it; {} if there is none."""
    head = _METADATA.match(_read(folder).replace("\r\n", "\n"))
    if head is None or len(head[1]) > MAX_METADATA:
        return {}
    try:
        found = yaml.safe_load(head[1])
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
