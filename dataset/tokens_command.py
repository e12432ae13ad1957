"""Tokenise text once, for any number of training runs.

    python -m dataset tokens IN … OUT --model MODEL

IN: text files in any format that pretraining reads, or a folder made by `python -m dataset novels`. OUT is what
`novelgpt.text.token_files` reads. Each file becomes a shard, named by a digest of everything that determines its
content: an unchanged file is never tokenised again, whether the previous run finished or was killed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from dataset.corpus import find_sources
from dataset.readers import read_text_rows
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.atomic_files import atomic_folder, atomic_write, exclusive_folder, hash_file, hash_json
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.paths import from_home
from novelgpt.settings.remedies import run_pipeline
from novelgpt.settings.terminal import counted, say
from novelgpt.text.chunks import ChunkEncoder, DocumentCutter, Unfinished
from novelgpt.text.origins import write_origin
from novelgpt.text.token_files import KIND, MANIFEST, ORIGINS, SHARDS, STARTS, TOKENS, VERSION, describe_tokenizer

ABOUT = "about.json"


class Tokenization:
    """A run of the command.

    Args:
        out: the folder to bring up to date.
        tokenizer: encodes the text.
        model: the name that the tokenizer was loaded by.
        text_column: field of the text in the rows.
        quiet: show no progress.

    Attributes:
        made: number of shards that this run tokenised.
    """

    def __init__(
        self, out: Path, tokenizer: PreTrainedTokenizerBase, model: str, text_column: str, quiet: bool = False
    ) -> None:
        self.out, self.text_column, self.quiet = out, text_column, quiet
        self.encoder = ChunkEncoder(tokenizer)
        self.tokenizer_entry = describe_tokenizer(self.encoder, model)
        self.made, self.seconds, self.bytes_read, self.bytes_left = 0, 0.0, 0, 0

    def run(self, names: list[str]) -> dict[str, Any]:
        """Make the missing shards, then write and return the manifest; then remove shards that it does not list.

        Raises:
            UserError: nothing to tokenise, or what reading the files raises.
        """
        sources = find_sources(names)
        for source in sources:
            if source.manifest is not None:
                raise UserError(f"{source.folder} already holds tokens", "name the text that they were made from")
        self.bytes_left = sum(path.stat().st_size for source in sources for path in source.files)
        inputs: list[dict[str, Any]] = []
        splits: dict[str, dict[str, Any]] = {}
        for source in sources:
            split = splits.setdefault(source.split, {"tokens": 0, "documents": 0, "shards": []})
            unfinished: Unfinished | None = None
            for path in source.files:
                sha256, size = hash_file(path)
                inputs.append({"path": str(path), "split": source.split, "bytes": size, "sha256": sha256})
                shard, unfinished = self._shard(path, sha256, unfinished)
                split["shards"].append(shard | {"file": str(path)})
            if unfinished is not None:
                split["shards"].append(self._shard(None, "", unfinished)[0] | {"file": str(source.files[-1])})
        for split in splits.values():
            for name in ("tokens", "documents"):
                split[name] = sum(shard[name] for shard in split["shards"])
        options = {"text_column": self.text_column, "in_pieces": self.encoder.in_chunks}
        manifest = {"kind": KIND, "version": VERSION, "tokenizer": self.tokenizer_entry, "options": options,
                    "inputs": inputs, "splits": splits}  # fmt: skip
        text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
        if not (self.out / MANIFEST).is_file() or (self.out / MANIFEST).read_text(encoding="utf-8") != text:
            atomic_write(self.out / MANIFEST, text)
        kept = {shard["name"] for split in splits.values() for shard in split["shards"]}
        for path in (self.out / SHARDS).iterdir():
            if path.name not in kept:
                shutil.rmtree(path)
        return manifest

    def _shard(
        self, path: Path | None, sha256: str, unfinished: Unfinished | None
    ) -> tuple[dict[str, Any], Unfinished | None]:
        """The shard of a file, or of what the last file left unfinished, and what it leaves to the next one."""
        made_from = [VERSION, self.tokenizer_entry["sha256"], self.text_column, self.encoder.in_chunks,
                     path.suffix if path else None, sha256, unfinished]  # fmt: skip
        name = hash_json(made_from)[:32]
        folder = self.out / SHARDS / name
        about = _verified(folder)
        size = path.stat().st_size if path else 0
        if about is None:
            shutil.rmtree(folder, ignore_errors=True)
            start = time.monotonic()
            with atomic_folder(folder, keep_existing=True) as work:
                about = self._write_shard(path, unfinished, work)
            self.seconds += time.monotonic() - start
            self.bytes_read += size
            self.made += 1
        self.bytes_left -= size
        if path is not None and not self.quiet:
            line = f"{path}: {counted(about['tokens'], 'token')}"
            if self.seconds and self.bytes_left:
                line += f", about {self.bytes_left / max(1, self.bytes_read) * self.seconds / 60:,.1f} min left"
            say(line)
        left = about.pop("unfinished")
        return {"name": name, **about}, Unfinished(*left) if left else None

    def _write_shard(self, path: Path | None, unfinished: Unfinished | None, folder: Path) -> dict[str, Any]:
        """Write the files of a shard; returns the content of its ABOUT."""
        cutter = DocumentCutter(self.encoder.in_chunks, unfinished)
        rows = read_text_rows(path, self.text_column) if path else ()
        chunks = cutter.cut(rows, whole_files=path is not None and path.suffix.lower() == ".txt", last=path is None)
        starts: list[numpy.ndarray] = [numpy.zeros(0, numpy.int64)]
        count = 0
        with (folder / TOKENS).open("wb") as file, (folder / ORIGINS).open("w", encoding="utf-8") as origins:
            for tokens, begins in self.encoder.encode(chunks, partial(write_origin, origins, str(path or ""))):
                starts.append(numpy.array(begins, numpy.int64))
                tokens.tofile(file)
                count += len(tokens)
        numpy.save(folder / STARTS, numpy.concatenate(starts), allow_pickle=False)
        about = {
            "tokens": count,
            "documents": sum(map(len, starts)),
            "sha256": {name: hash_file(folder / name)[0] for name in (TOKENS, STARTS)},
            "unfinished": cutter.unfinished,
        }
        atomic_write(folder / ABOUT, json.dumps(about, ensure_ascii=False))
        return about


def _verified(folder: Path) -> dict[str, Any] | None:
    """The about.json of a shard; None if it is missing or does not match the files."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        matches = all(hash_file(folder / name)[0] == sha256 for name, sha256 in about["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return about if matches else None


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(
        prog="python -m dataset tokens", description="Tokenise text into files that training maps into memory."
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="IN", help="text files, or folders made by `dataset novels`", type=from_home
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the tokens")
    parser.add_argument(
        "--model", required=True, help="folder or hub name of the model to train; tiny is the small base"
    )
    parser.add_argument(
        "--text_column",
        default="text",
        help="column or key of the text; several are joined by line ends: title,abstract [default: text]",
    )
    parser.add_argument("--workers", type=int, help="cores to use [default: all]")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code from the tokenizer's folder")
    parser.add_argument("--hub", choices=["huggingface", "modelscope"], help="where names are looked up")
    args = parser.parse_args(argv)
    if args.workers is not None:
        if args.workers < 1:
            raise UserError(f"--workers {args.workers} is too few", "take at least 1")
        os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # read by the tokenizers library at its first batch
    model = ModelArguments(args.model, trust_remote_code=args.trust_remote_code, hub=args.hub)
    if args.out.exists() and not (args.out / SHARDS).is_dir() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"{args.out} holds something else", "name a new folder")
    with exclusive_folder(args.out, args.out / SHARDS):
        tokenization = Tokenization(args.out, load_tokenizer(model), model.model, args.text_column)
        manifest = tokenization.run(args.inputs)
    for name, split in manifest["splits"].items():
        say(f"{name}: {counted(split['tokens'], 'token')} of {counted(split['documents'], 'document')}")
    if not tokenization.made:
        say(f"{args.out} is up to date: nothing to do")
    say(f"train on it: {run_pipeline('pretrain', f'--train_files {shlex.quote(str(args.out))}', args.model)}")


if __name__ == "__main__":
    main()
