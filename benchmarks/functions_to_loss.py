"""How many functions of ours a reader opens to follow a row from the disk to its loss.

    python benchmarks/functions_to_loss.py [--list] [--json FILE]

Needs Python 3.11 or newer.

Runs two pipelines for one step on the small base, each in its own process, and traces them: `finetune` on Alpaca rows
and `pretrain` on a novel in a .txt file. Both contain a rare character. A function counts if a part of the row passes
through it, as text, tokens or tensors computed from them, in an argument or a return value, while rows are read,
collated or turned into the loss; helpers count as well. What does not count:

* libraries, and functions that never see a part of the row: they read settings or prepare the tokenizer;
* the layers of the model (LAYERS), which count as one function;
* modules that only observe the row and change nothing in it (WATCHERS).
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
import torch
from results import make_console, make_parser, result, show_results, write_results

ROOT = Path(__file__).resolve().parents[1]
OURS = str(ROOT)

ROOMS = ("novelgpt", "dataset", "predict", "pretrain", "finetune", "finetune_lora", "cli")
LAYERS = ("novelgpt/model/attention.py",)
# Rooms and files whose functions watch: terminal and errors, estimates and probes, the table of tokens, speed, faults.
WATCHERS = (
    "novelgpt/settings/", "novelgpt/budget/", "novelgpt/checks/", "novelgpt/text/statistics.py",
    "novelgpt/training/throughput.py", "novelgpt/training/numbers.py",
)  # fmt: skip
RARE = "龘"
TARGETS = {"functions": 25, "files": 10}
SENTENCES = [f"第{number}天，{RARE}{RARE}在江边的老屋里读完了那封信。" for number in range(1, 60)]
PIPELINES = ("finetune", "pretrain")


def write_files(folder: Path, pipeline: str) -> list[str]:
    """Write the rows of a pipeline into the folder; returns its arguments."""
    if pipeline == "finetune":
        rows = folder / "rows.jsonl"
        texts = [{"instruction": f"续写：{text}", "output": text} for text in SENTENCES[:4]]
        rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts), encoding="utf-8")
        special = ["--packing", "false"]
    else:
        rows = folder / "novel.txt"
        rows.write_text("第一章 江边\n" + "\n".join(SENTENCES), encoding="utf-8")
        special = ["--max_length", "128"]
    files = ["--train_files", str(rows), "--valid_files", str(rows)]
    return ["--model", "tiny-random", *files, *special, "--max_steps", "1", "--output_dir", str(folder / "run")]


@dataclass
class Tracer:
    """Records the functions through which a row passes, in the order in which they first see it.

    Attributes:
        tokens: ids of the rare character in the vocabulary of the small base.
        entries: calls within which a row is on its way; so are those that take rows out of datasets.
        loss: the function that returns the loss.
        tokenizer: the function that identifies the tokenizer, by all of its vocabulary.
        asides: number of its calls on the call stack, within which nothing counts.
        depth: number of entries on the call stack.
        seen: (file, qualified name) of each function, in order.
        finished: whether the loss has been returned.
    """

    tokens: list[int]
    entries: set[CodeType]
    loss: CodeType
    tokenizer: CodeType
    asides: int = 0
    depth: int = 0
    seen: dict[tuple[str, str], None] = field(default_factory=dict)
    finished: bool = False

    def __call__(self, frame: FrameType, event: str, value: Any) -> None:
        """A profile function (see sys.setprofile)."""
        code = frame.f_code
        if self.finished or event not in ("call", "return") or not code.co_filename.startswith(OURS):
            return
        entry = code in self.entries or code.co_name == "__getitem__"
        if event == "call" and entry:
            self.depth += 1
        if code is self.tokenizer:
            self.asides += 1 if event == "call" else -1
        if self.depth and not self.asides:
            self._note(code, frame, event, value)
        if event == "return":
            self.depth -= entry
            self.finished = code is self.loss and self.depth > 0
            if self.finished:
                sys.setprofile(None)  # the run ends at its own speed

    def _note(self, code: CodeType, frame: FrameType, event: str, value: Any) -> None:
        file = Path(code.co_filename).relative_to(ROOT).as_posix()
        if file.split("/")[0] not in ROOMS or file.startswith(WATCHERS):
            return
        name = code.co_qualname.removesuffix(".<locals>").split(".<locals>.<")[0]
        key = (file, "the layers of the model" if file in LAYERS else name)
        if key in self.seen or name.startswith("<"):
            return
        values = [value] if event == "return" else list(frame.f_locals.values())
        if any(self._holds(held, 4) for held in values):
            self.seen[key] = None

    def _holds(self, value: Any, depth: int) -> bool:
        """Whether a value holds a part of the row: the rare character, its tokens, or a tensor of a step."""
        if isinstance(value, str):
            return RARE in value
        if isinstance(value, bytes):
            return any(RARE.encode(encoding) in value for encoding in ("utf-8", "gb18030"))
        if isinstance(value, (torch.Tensor, numpy.ndarray)):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value.ndim > 0  # hidden states, logits, losses
            return value.ndim > 0 and self._holds(value.tolist(), depth)
        if depth == 0:
            return False
        if isinstance(value, dict):
            return any(self._holds(held, depth - 1) for held in value.values())
        if isinstance(value, (list, tuple)):
            if value and all(isinstance(number, int) for number in value):
                count = len(self.tokens)
                return any(list(value[place : place + count]) == self.tokens for place in range(len(value) - count + 1))
            return any(self._holds(held, depth - 1) for held in value[:40])
        if is_dataclass(value) and type(value).__module__.split(".")[0] in ROOMS:
            return any(self._holds(getattr(value, part.name), depth - 1) for part in fields(value))
        if type(value).__module__.split(".")[0] in ROOMS and depth == 4:
            return any(self._holds(held, depth - 1) for held in vars(value).values() if not callable(held))
        return False


def trace(pipeline: str, folder: Path) -> list[list[str]]:
    """Run a pipeline for a step in this process; returns [file, function] of each function on the way."""
    from dataset.conversations import read_conversations
    from dataset.corpus import read_corpus
    from novelgpt.model.tokenizer import load_tokenizer
    from novelgpt.settings.arguments import ModelArguments
    from novelgpt.text.collator import Collator
    from novelgpt.text.token_files import tokenizer_digest
    from novelgpt.training.trainer import NovelTrainer

    main = importlib.import_module(f"{pipeline}.__main__").main
    arguments = write_files(folder, pipeline)
    tokens = load_tokenizer(ModelArguments(model="tiny-random"))(RARE, add_special_tokens=False)["input_ids"]
    read = read_conversations if pipeline == "finetune" else read_corpus
    entries = {read.__code__, Collator.__call__.__code__, NovelTrainer.training_step.__code__}
    tracer = Tracer(tokens, entries, NovelTrainer.compute_loss.__code__, tokenizer_digest.__code__)
    sys.setprofile(tracer)
    try:
        main(arguments)
    finally:
        sys.setprofile(None)
    if not tracer.finished:
        raise RuntimeError(f"no loss came out of {pipeline}")
    return [list(key) for key in tracer.seen]


def trace_apart(pipeline: str) -> list[list[str]]:
    """`trace` in a process of its own, whose output is shown if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--trace", pipeline, folder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        found = Path(folder) / "functions.json"
        if done.returncode or not found.is_file():
            raise RuntimeError(f"{pipeline} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(found.read_text(encoding="utf-8"))


def main() -> None:
    """Trace, show the counts and, if asked, the lists."""
    if sys.argv[1:2] == ["--trace"]:
        pipeline, folder = sys.argv[2], Path(sys.argv[3])
        found = trace(pipeline, folder)
        (folder / "functions.json").write_text(json.dumps(found), encoding="utf-8")
        return
    parser = make_parser(str(__doc__).splitlines()[0])
    parser.add_argument(
        "--list", action="store_true", help="print each function, in the order in which the row reaches it"
    )
    arguments = parser.parse_args()
    console = make_console()
    results, ways = [], {}
    for pipeline in PIPELINES:
        ways[pipeline] = trace_apart(pipeline)
        counts = {"functions": len(ways[pipeline]), "files": len({file for file, _ in ways[pipeline]})}
        for unit, count in counts.items():
            results.append(result(f"{unit} from a row of {pipeline} to its loss", count, unit, TARGETS[unit]))
        if arguments.list:
            console.print(f"{pipeline}:")
            for file, name in ways[pipeline]:
                console.print(f"  {file:<40}{name}", markup=False)
    show_results(results, console)
    write_results(results, arguments.json, ways=ways)


if __name__ == "__main__":
    main()
