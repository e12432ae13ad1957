"""Training runs of these tests: what they train on, how they are started, killed and compared."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.faults.training_process import Stop
from tests.launched import PATIENCE
from tests.warm_python import WarmProcess, start_warm

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_token_accuracy")


@dataclass(frozen=True)
class Command:
    """A command line: pipeline, words but for the output folder, ranks and the DeepSpeed file they share."""

    pipeline: str
    words: tuple[str, ...]
    ranks: int = 1
    zero: int = 0
    variables: dict[str, str] = field(default_factory=dict, hash=False)

    def full(self, folder: Path) -> list[str]:
        """All words."""
        zero = ["--deepspeed", str(ROOT / "scripts" / "deepspeed" / f"zero{self.zero}.json")] if self.zero else []
        return [*self.words, "--output_dir", str(folder), *zero]


def write_base(embedded: Path, folder: Path, dropout: float = 0.1) -> Path:
    """A much smaller Qwen3 than the tiny-random base, with its tokenizer."""
    shutil.copytree(embedded, folder)
    (folder / "model.safetensors").unlink()
    config = Qwen3Config(
        vocab_size=1000, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=4096, tie_word_embeddings=True,
        attention_dropout=dropout, eos_token_id=999, pad_token_id=997,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(folder: Path, rows: int) -> tuple[Path, Path]:
    """A text of several documents and rows of questions and answers, both of unlike lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (ROOT / "dataset" / "samples" / "papers" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    abstracts = [json.loads(line)["abstract"] for line in lines]
    text, questions = folder / "text.jsonl", folder / "questions.jsonl"
    documents = [{"text": abstract[: 40 + 7 * index]} for index, abstract in enumerate(abstracts[: rows // 2])]
    pairs = [
        {"prompt": f"第{index}问", "response": abstract[: 4 + index % 9]}
        for index, abstract in enumerate(abstracts[:rows])
    ]
    for path, entries in ((text, documents), (questions, pairs)):
        path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
    return text, questions


class Started:
    """The processes of a command."""

    def __init__(self, command: Command, folder: Path, logs: Path, stop: Stop | None = None) -> None:
        """Logs go to files of `logs`, which is emptied."""
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        self.folder, self.logs = folder, logs
        variables = {"TOKENIZERS_PARALLELISM": "false", **command.variables}
        if command.ranks > 1 or command.zero:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            variables |= {"WORLD_SIZE": str(command.ranks), "LOCAL_WORLD_SIZE": str(command.ranks)}
        self.ranks: list[WarmProcess] = []
        for rank in range(command.ranks):
            named = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if "WORLD_SIZE" in variables else {}
            chosen = asdict(stop) if stop is not None and stop.rank == rank else None
            words = [json.dumps(chosen), str(folder), str(logs / f"{rank}.events"), command.pipeline]
            words = ["-m", "tests.faults.training_process", *words, *command.full(folder)]
            self.ranks.append(start_warm(words, variables | named, logs / f"{rank}.log"))

    def ended(self) -> bool:
        """Whether no process is left."""
        return all(process.poll() is not None for process in self.ranks)

    def wait(self, condition: Callable[[], bool], timeout: float = PATIENCE) -> bool:
        """Until the condition holds, or False once all processes have ended without it."""
        end = time.monotonic() + timeout
        while not condition():
            if self.ended():
                return condition()
            if time.monotonic() > end:
                raise AssertionError(f"nothing for {timeout} s:\n{self.output()}")
            time.sleep(0.001)
        return True

    def statuses(self, timeout: float = PATIENCE) -> list[int | None]:
        """Exit statuses, after the end of all ranks."""
        end = time.monotonic() + timeout
        try:
            for process in self.ranks:
                process.wait(max(0.0, end - time.monotonic()))
        finally:
            self.kill()
        return [process.status for process in self.ranks]

    def kill(self, ranks: list[int] | None = None) -> None:
        """Kill -9, all ranks or some."""
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            self.ranks[rank].signal(signal.SIGKILL)
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            self.ranks[rank].wait()

    def signal(self, number: int) -> None:
        """Send a signal to each rank that lives."""
        for process in self.ranks:
            process.signal(number)

    def events(self, rank: int = 0) -> list[str]:
        """Lines `kind count what`."""
        path = self.logs / f"{rank}.events"
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []

    def stopped(self, rank: int) -> bool:
        """Whether a rank has stopped itself."""
        return self.events(rank)[-1:] == ["stopped"]

    def output(self, rank: int | None = None) -> str:
        """What was printed, by one rank or by all."""
        ranks = range(len(self.ranks)) if rank is None else [rank]
        return "".join((self.logs / f"{one}.log").read_text(encoding="utf-8") for one in ranks)


def assert_refused(started: Started, cause: str) -> None:
    """Every rank ends with exit status 2, a line of cause and one of remedy (of which a launcher shows the first's)."""
    statuses = started.statuses()
    for rank, status in enumerate(statuses):
        output = started.output(rank)
        said = [line for line in output.splitlines() if line.startswith(("error: ", "  fix: "))]
        assert status == 2 and "Traceback" not in output, output[-4000:]
        assert len(said) == 2 and said[1].startswith("  fix: ") and cause in said[0], said


def interrupted(command: Command, folder: Path, checkpoint: str, stop: Stop | None = None) -> Path:
    """The folder of a run that is killed as soon as it has a checkpoint, or where it stops itself later."""
    started = Started(command, folder, folder.parent / "interrupted", stop)
    try:
        reached = started.wait((folder / checkpoint).is_dir if stop is None else lambda: started.stopped(stop.rank))
    finally:
        started.kill()
    assert reached, started.output()[-4000:]
    assert (folder / checkpoint).is_dir()
    return folder


def files_of(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of the last change of each file."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in found.items()}


def complete(command: Command, folder: Path, logs: Path) -> Started:
    """Run a command to its end."""
    started = Started(command, folder, logs)
    statuses = started.statuses()
    assert statuses == [0] * command.ranks, started.output()[-4000:]
    return started


def figures(folder: Path) -> dict[tuple[int, str], set[float]]:
    """All values that metrics.jsonl has for a step and a figure."""
    found: dict[tuple[int, str], set[float]] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name in FIGURES:
            if name in entry:
                found.setdefault((entry["step"], name), set()).add(entry[name])
    return found


def weights(folder: Path) -> dict[str, bytes]:
    """The final weights, file by file."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def assert_same(folder: Path, undisturbed: Path) -> None:
    """The final weights and every logged figure are bit-equal, and nothing is half done."""
    assert figures(folder) == figures(undisturbed)
    assert weights(folder) == weights(undisturbed)
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert not list(folder.glob("*.unfinished"))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == sorted(
        path.name for path in undisturbed.glob("checkpoint-*")
    )
