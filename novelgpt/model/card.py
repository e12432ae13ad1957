"""README.md beside weights: a model card as the Hugging Face hub reads it, which the toolkit writes and users may edit.

A card ends with a comment that holds the hash of all before it. One whose hash is not right was edited, and one without
the comment is another's: neither is ever written over. Whatever comes from outside stands in code spans, of which
nothing can break out: no name begins a line, a heading, a link or a block of metadata.
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
from novelgpt.settings.paths import EMBEDDED_BASE, TINY
from novelgpt.settings.terminal import one_line

CARD = "README.md"
MOST_CHARACTERS = 300
# A card takes some kilobytes; what is larger is not the toolkit's.
MOST_BYTES = 1_000_000
# Of metadata of other origin, so that reading it takes no time.
MOST_METADATA = 20_000
# Known to transformers by this toolkit alone.
OWN_ARCHITECTURES = ("baichuan", "qwen")
SCORES = "Scores"
_COMMENT = "novelgpt card, sha256 {}: edit what you like, and it stays as you left it"
_MARK = re.compile(rf"\n<!-- {_COMMENT.format('([0-9a-f]{64})')} -->\n")
_METADATA = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")


@dataclass
class Card:
    """A model card.

    Attributes:
        metadata: of its head, plain values.
        title: Markdown in a line.
        sections: Markdown by heading; "" is what stands below the title. No line of them begins with "## ".
    """

    metadata: dict[str, Any]
    title: str
    sections: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The whole file."""
        head = yaml.safe_dump(self.metadata, allow_unicode=True, sort_keys=False, width=1000)
        parts = [f"---\n{head}---\n\n# {self.title}\n"]
        parts += [f"\n## {name}\n\n{body}\n" if name else f"\n{body}\n" for name, body in self.sections.items()]
        text = "".join(parts)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{text}\n<!-- {_COMMENT.format(digest)} -->\n"


def read_card(folder: Path) -> Card | None:
    """The card of a folder, where the toolkit wrote it and nobody has changed it since; else None."""
    path = folder / CARD
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return None
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    mark = _MARK.search(text)
    if mark is None or mark.end() != len(text):
        return None
    text = text[: mark.start()]
    head = _METADATA.match(text)
    if head is None or hashlib.sha256(text.encode()).hexdigest() != mark[1]:
        return None
    title, *parts = text[head.end() :].split("\n## ")
    name, _, lead = title.strip("\n").removeprefix("# ").partition("\n")
    sections = {"": lead.strip("\n")} | {
        heading: body.strip("\n") for heading, _, body in (part.partition("\n") for part in parts)
    }
    return Card(yaml.safe_load(head[1]), name, sections)


def may_write_card(folder: Path) -> bool:
    """Whether a folder has no README.md, or one that the toolkit wrote and nobody has changed; it makes no links."""
    path = folder / CARD
    return not path.is_symlink() and (not path.exists() or read_card(folder) is not None)


def write_card(folder: Path, card: Card) -> bool:
    """Write the card of a folder, whole; False where it has a README.md of someone else's, which stays.

    Raises:
        OSError: it cannot be written.
    """
    if not may_write_card(folder):
        return False
    atomic_write(folder / CARD, card.text())
    return True


def code(text: object) -> str:
    """A code span in a line.

    >>> code("a`b")
    '``a`b``'
    """
    shown = one_line(str(text)).replace("\t", " ").strip() or "(empty)"
    if len(shown) > MOST_CHARACTERS:
        shown = shown[:MOST_CHARACTERS] + " …"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown. Within it, a bar would end a cell, in code spans too."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hub_name(model: str) -> str | None:
    """A model's name as the hub has it; None of folders."""
    try:
        validate_repo_id(model)
    except HFValidationError:
        return None
    return None if Path(model).exists() or not model.isascii() else model


def shown_name(model: str) -> str:
    """How a card names a model: no path of the machine that it lay on."""
    return TINY if model == str(EMBEDDED_BASE) else hub_name(model) or Path(model).name


def base_metadata(base: str, relation: str, hub: str | None = None) -> dict[str, Any]:
    """What the head of a card says of the base, as far as it is known: its name on the hub, and its license.

    Args:
        base: folder or hub name. Of a folder, its own card may name the model that it was made of, which is a base of
            full weights, too, but none that an adapter can be put on.
        relation: finetune or adapter.
        hub: where names are looked up; those of another hub stand for nothing on Hugging Face's.
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
    """A line about the base of the adapter or model in `folder`: its name, and the hash of its weights if known."""
    line = f"Base: {code(shown_name(base))}"
    try:
        print_ = read_object(folder / BASE_RECORD).get("fingerprint") if (folder / BASE_RECORD).is_file() else None
    except UserError:
        print_ = None
    return line + (f", fingerprint of its weights {code(print_)}" if isinstance(print_, str) else "")


def use_section(adapter: bool, base: str, architecture: str, chat: bool) -> str:
    """How to load the weights, in Python and by the toolkit.

    Args:
        adapter: whether the folder holds an adapter.
        base: its base, or what was trained.
        architecture: model_type of its configuration.
        chat: whether it answers, or goes on with a text.
    """
    name = json.dumps(hub_name(base) or "path/to/the/base")
    lines = ["import torch"]
    lines += ["from peft import PeftModel"] if adapter else []
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if architecture in OWN_ARCHITECTURES:
        lines += ["import novelgpt.model  # makes the architecture known; from a checkout of NovelGPT", ""]
    lines += ['folder = "."  # this folder, or its name on the hub']
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    if adapter:
        lines += [f'base = AutoModelForCausalLM.from_pretrained({name}, dtype="auto")']
        lines += ["model = PeftModel.from_pretrained(base, folder)"]
    else:
        lines += ['model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")']
    prompt = '"第一章"'
    if chat:
        prompt = "prompt"
        lines += ['messages = [{"role": "user", "content": "你好"}]']
        lines += ["prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)"]
    lines += [f'inputs = tokenizer({prompt}, add_special_tokens=False, return_tensors="pt")']
    lines += ["with torch.inference_mode():", "    answer = model.generate(**inputs, max_new_tokens=256)"]
    lines += ['print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))']
    python = "\n".join(lines)
    command = "novelgpt predict --model path/to/this/folder --data_files my_test.jsonl"
    return f"```python\n{python}\n```\n\nWith NovelGPT, answers to rows and their scores:\n\n```bash\n{command}\n```"


def write_derived_card(folder: Path, name: str, source: str, made: str, base: str, architecture: str) -> None:
    """Write the card of full weights that were made of other weights: merged or converted.

    What the source's card says of its training holds for them, too; scores are taken anew.

    Args:
        folder: that holds them.
        name: that it will have.
        source: folder or hub name of what they were made of.
        made: what was done, Markdown in a sentence.
        base: what the source was trained on; of what no card tells the training, the source itself.
        architecture: model_type of what was made.

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
    """What the head of a folder's README.md says, whoever wrote it; {} where there is none that can be read."""
    try:
        path = folder / CARD
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return {}
        head = _METADATA.match(path.read_text(encoding="utf-8"))
        found = yaml.safe_load(head[1]) if head and len(head[1]) <= MOST_METADATA else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
