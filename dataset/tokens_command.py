"""Text to tokens, once, for any number of trainings.

    python -m dataset tokens IN … OUT --model MODEL

IN: text files of any format of pretraining, or a folder made by `python -m dataset novels`. OUT is what
`novelgpt.text.token_files` reads. Each file becomes a shard of its own, named for everything that decides its content:
a file that did not change is never tokenised again, whether a run ended well or was killed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from dataset.corpus import Source, cut_file, find_sources
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.atomic_files import atomic_folder, atomic_write, exclusive_folder, hash_file, hash_json
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.paths import from_home
from novelgpt.settings.remedies import run_pipeline
from novelgpt.settings.terminal import counted, say
from novelgpt.text.origins import TextMarks, save_marks
from novelgpt.text.pieces import DocumentCutter, Piece, PieceEncoder, Unfinished
from novelgpt.text.token_files import KIND, MANIFEST, ORIGINS, SHARDS, STARTS, TOKENS, VERSION, describe_tokenizer

ABOUT = "about.json"


@dataclass
class TokenRun:
    """One call of the command.

    Attributes:
        out: the folder to bring up to date.
        tokenizer: that makes the tokens.
        model: where it came from.
        text_column: of the rows.
        quiet: show no progress.
        made: shards that this run tokenised.
    """

    out: Path
    tokenizer: PreTrainedTokenizerBase
    model: str
    text_column: str
    quiet: bool = False
    made: int = 0

    def __post_init__(self) -> None:
        self.encoder = PieceEncoder(self.tokenizer)
        self.described = describe_tokenizer(self.encoder, self.model)
        self.seconds = 0.0
        self.bytes_read = 0
        self.bytes_left = 0

    def run(self, names: list[str]) -> dict[str, Any]:
        """Make what is missing, then the manifest, which is also returned; then remove what is not in it.

        Raises:
            UserError: nothing to tokenise, or what reading the files raises.
        """
        sources = find_sources(names)
        for source in sources:
            if source.manifest is not None:
                raise UserError(f"{source.folder} holds tokens already", "name the text that they were made from")
        self.bytes_left = sum(path.stat().st_size for source in sources for path in source.files)
        inputs: list[dict[str, Any]] = []
        splits: dict[str, dict[str, Any]] = {}
        for source in sources:
            split = splits.setdefault(source.split, {"tokens": 0, "documents": 0, "shards": []})
            for shard in self._tokenise(source, inputs):
                split["shards"].append(shard)
                split["tokens"] += shard["tokens"]
                split["documents"] += shard["documents"]
        options = {"text_column": self.text_column, "in_pieces": self.encoder.in_pieces}
        manifest = {"kind": KIND, "version": VERSION, "tokenizer": self.described, "options": options,
                    "inputs": inputs, "splits": splits}  # fmt: skip
        text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
        if not (self.out / MANIFEST).is_file() or (self.out / MANIFEST).read_text(encoding="utf-8") != text:
            atomic_write(self.out / MANIFEST, text)
        kept = {shard["name"] for split in splits.values() for shard in split["shards"]}
        for path in (self.out / SHARDS).iterdir():
            if path.name not in kept:
                shutil.rmtree(path)
        return manifest

    def _tokenise(self, source: Source, inputs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Entries of the manifest for the shards of a source; what it was made from goes into `inputs`."""
        unfinished: Unfinished | None = None
        for path in source.files:
            sha256, size = hash_file(path)
            inputs.append({"path": str(path), "split": source.split, "bytes": size, "sha256": sha256})
            shard, unfinished = self._shard(path, sha256, unfinished)
            yield shard | {"file": str(path)}
        if unfinished is not None:
            yield self._shard(None, "", unfinished)[0] | {"file": str(source.files[-1])}

    def _shard(
        self, path: Path | None, sha256: str, unfinished: Unfinished | None
    ) -> tuple[dict[str, Any], Unfinished | None]:
        """The shard of a file, or of what the last file left, and what it leaves to the next one."""
        kind = path.suffix if path else None
        made_from = [
            VERSION,
            self.described["sha256"],
            self.text_column,
            self.encoder.in_pieces,
            kind,
            sha256,
            unfinished,
        ]
        name = hash_json(made_from)[:32]
        folder = self.out / SHARDS / name
        about = _complete(folder)
        size = path.stat().st_size if path else 0
        if about is None:
            shutil.rmtree(folder, ignore_errors=True)
            began = time.monotonic()
            with atomic_folder(folder, keep_existing=True) as work:
                about = self._write_shard(path, unfinished, work)
                atomic_write(work / ABOUT, json.dumps(about, ensure_ascii=False))
            self.seconds += time.monotonic() - began
            self.bytes_read += size
            self.made += 1
        self.bytes_left -= size
        if path is not None and about is not None:
            self._show(path, about["tokens"])
        left = about.pop("unfinished")
        return {"name": name, **about}, Unfinished(*left) if left else None

    def _write_shard(self, path: Path | None, unfinished: Unfinished | None, work: Path) -> dict[str, Any]:
        cutter = DocumentCutter(self.encoder.in_pieces, unfinished)

        def pieces() -> Iterator[Piece]:
            if path is not None:
                yield from cut_file(path, self.text_column, cutter)
            # What has no book cannot go on in the next file.
            if path is None or (cutter.unfinished is not None and not cutter.unfinished.book):
                yield from cutter.end()

        starts = [numpy.zeros(0, numpy.int64)]
        marks = TextMarks()
        count = 0
        with (work / TOKENS).open("wb") as file:
            for tokens, begins in self.encoder.encode(pieces(), marks):
                starts.append(numpy.array(begins, numpy.int64) + count)
                tokens.tofile(file)
                count += len(tokens)
        all_starts = numpy.concatenate(starts)
        numpy.save(work / STARTS, all_starts, allow_pickle=False)
        save_marks(marks, work / ORIGINS, str(path or ""))
        return {
            "tokens": count,
            "documents": len(all_starts),
            "sha256": {name: hash_file(work / name)[0] for name in (TOKENS, STARTS)},
            "unfinished": cutter.unfinished,
        }

    def _show(self, path: Path, tokens: int) -> None:
        line = f"{path}: {counted(tokens, 'token')}"
        if self.seconds and self.bytes_left:
            line += f", about {self.bytes_left / max(1, self.bytes_read) * self.seconds / 60:,.1f} min left"
        if not self.quiet:
            say(line)


def _complete(folder: Path) -> dict[str, Any] | None:
    """What about.json says of a shard; None where that, or what it says, is not so."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        whole = all(hash_file(folder / name)[0] == sha256 for name, sha256 in about["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return about if whole else None


def _check_folder(out: Path) -> None:
    """Raise a UserError unless `out` is new, empty, or a folder of tokens."""
    if out.exists() and not (out / SHARDS).is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something else", "name a new folder")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Tokenise what the command line names."""
    parser = CommandParser(
        prog="python -m dataset tokens", description="Text to tokens that training maps into memory."
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="IN", help="text files, or folders that `dataset novels` made", type=from_home
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the tokens")
    parser.add_argument(
        "--model", required=True, help="folder or hub name of the model that will be trained; tiny is the small base"
    )
    parser.add_argument("--text_column", default="text", help="column or key that holds the text [default: text]")
    parser.add_argument("--workers", type=int, help="cores to use [default: all]")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code of the tokenizer's folder")
    parser.add_argument("--hub", choices=["huggingface", "modelscope"], help="where names are looked up")
    words = parser.parse_args(argv)
    if words.workers is not None:
        if words.workers < 1:
            raise UserError(f"--workers {words.workers} is too few", "take at least 1")
        os.environ["RAYON_NUM_THREADS"] = str(words.workers)  # read by the tokenizers library at its first batch
    model = ModelArguments(words.model, trust_remote_code=words.trust_remote_code, hub=words.hub)
    _check_folder(words.out)
    with exclusive_folder(words.out, words.out / SHARDS):
        run = TokenRun(words.out, load_tokenizer(model), model.model, words.text_column)
        manifest = run.run(words.inputs)
    for name, split in manifest["splits"].items():
        say(f"{name}: {counted(split['tokens'], 'token')} of {counted(split['documents'], 'document')}")
    if not run.made:
        say(f"{words.out} was up to date: nothing to do")
    command = run_pipeline("pretrain", f"--train_files {shlex.quote(str(words.out))}", words.model)
    say(f"train on it: {command}")


if __name__ == "__main__":
    main()
