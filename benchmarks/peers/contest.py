"""The contenders of train_throughput.py: what each is told to do, and how its process is started and measured."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parent
ROOT = PEERS.parents[1]
OURS = "this toolkit"
SCRIPTS = {
    OURS: "novelgpt_finetune.py",
    "Trainer": "transformers_trainer.py",
    "TRL": "trl_sft.py",
    "LLaMA-Factory": "llamafactory_sft.py",
}
PACKAGES = {OURS: "transformers", "Trainer": "transformers", "TRL": "trl", "LLaMA-Factory": "llamafactory"}
PIP_LINES = {"TRL": "pip install trl==1.16.0", "LLaMA-Factory": "pip install llamafactory==0.9.5"}
# What glibc reads: blocks below 4 GiB come from the heap, of which 8 GiB are not given back.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**30), "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30)}
ALLOCATORS: dict[str, dict[str, str]] = {"shipped": {}, "kept": KEPT}
SEED, LEARNING_RATE, PADDED_ROWS = 42, 1e-4, 8

# Large ones, made for a GPU, hold few activations: all contenders recompute them.
SMALL = "small"
QWEN = {"vocab_size": 151936, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    SMALL: {"model_type": "qwen3", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
            "num_attention_heads": 4, "head_dim": 64},
    "1.5b": {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12},
    "3b": {"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
           "num_attention_heads": 16},
}  # fmt: skip


@dataclasses.dataclass
class Setting:
    """What all runs have in common.

    Attributes:
        folder: where everything is written; big, as checkpoints go there.
        model_size: a key of SHAPES.
        tokenizer: its folder; None for that of the small base.
        rows: conversations to train on, in any format of the toolkit.
        max_length: rows with more tokens are left out.
        pack_length: tokens of a pack.
        trl_python: interpreter that has trl.
        llamafactory_python: interpreter that has llamafactory.
    """

    folder: Path
    model_size: str
    tokenizer: str | None
    rows: Path
    max_length: int
    pack_length: int
    trl_python: str
    llamafactory_python: str


@dataclasses.dataclass
class Run:
    """One process: who trains how, and what came of it.

    Attributes:
        figures: what the process's recorder wrote (step_recorder.py), and "memory" in bytes; None where it failed.
        failure: why there are no figures.
    """

    tool: str
    packing: bool
    precision: str
    allocator: str
    figures: dict[str, Any] | None = None
    failure: str = ""

    @property
    def name(self) -> str:
        """For example `TRL packed bf16 kept`."""
        return f"{self.tool} {'packed' if self.packing else 'padded'} {self.precision} {self.allocator}"


class Contest:
    """The prepared model and rows, the machine's ceilings, and the tools that are there.

    Attributes:
        facts: what prepare.py says of model, rows and device.
        ceilings: FLOP/s of the fastest matrix products, by precision; none of bf16 where the CPU is slow in it.
        tools: versions of what each tool runs on; None where it is not installed.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.folder = setting.folder
        self.shape = QWEN | SHAPES[setting.model_size]
        self.pythons = dict.fromkeys(SCRIPTS, sys.executable)
        self.pythons |= {"TRL": setting.trl_python, "LLaMA-Factory": setting.llamafactory_python}
        request = {
            "folder": str(self.folder),
            "tokenizer": setting.tokenizer and str(Path(setting.tokenizer).absolute()),
            "rows": str(setting.rows.absolute()),
            "max_length": setting.max_length,
            "config": self.shape,
        }
        # In processes of their own: a process starts with the peak size of the one that starts it as its own peak.
        self.facts = self._call("prepare.py", request)
        self.ceilings = self._call("matrix_ceilings.py", {})
        self.tools = {tool: self._versions(tool) for tool in SCRIPTS}

    @property
    def ceiling(self) -> float:
        """The highest of the ceilings."""
        return float(max(self.ceilings.values()))

    def planned_runs(self, allocators: list[str]) -> list[Run]:
        """All runs, those of one allocator together. The plain Trainer has no packing; on a GPU it is bf16 alone."""
        cuda = self.facts["device"] is not None
        return [
            Run(tool, packing, precision, allocator)
            for allocator in (["shipped"] if cuda else allocators)
            for tool in SCRIPTS
            for packing in ((False,) if tool == "Trainer" else (False, True))
            for precision in (["bf16"] if cuda else self.ceilings)
        ]

    def train(self, run: Run, warmup_steps: int, steps: int) -> None:
        """Train in a process of its own; note figures or failure in `run`."""
        if self.tools[run.tool] is None:
            run.failure = f"not installed: {PIP_LINES.get(run.tool, PACKAGES[run.tool])}"
            return
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        result, log = folder / "result.json", folder / "log.txt"
        (folder / "task.json").write_text(json.dumps(self._task(run, folder, warmup_steps, steps)), encoding="utf-8")
        words = [self.pythons[run.tool], str(PEERS / SCRIPTS[run.tool]), str(folder / "task.json")]
        with log.open("w") as output:
            environment = self._environment(run.tool, run.allocator)
            process = subprocess.Popen(words, env=environment, cwd=folder, stdout=output, stderr=output)
            try:
                # Not Popen.wait: this tells the peak size of just this process.
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()  # stopped from outside: leave nothing running
                raise
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not result.is_file():
            run.failure = f"exit status {process.returncode}: {last_line(log.read_text(errors='replace'))}"
        else:
            run.figures = json.loads(result.read_text(encoding="utf-8"))
            run.figures["memory"] = run.figures["device_bytes"] or usage.ru_maxrss * 1024
        shutil.rmtree(folder)

    def rows_per_second(self, run: Run) -> float:
        """Tokens per second over the mean tokens of a row; 0 without figures."""
        if run.figures is None:
            return 0.0
        return float(run.figures["tokens"] / self.facts["tokens_per_row"] / run.figures["seconds"])

    def useful_flops(self, run: Run) -> float:
        """FLOP/s of the products that training cannot do without: layers, head at trained tokens, attention in rows."""
        figures, facts, shape = run.figures, self.facts, self.shape
        if figures is None:
            return 0.0
        heads = shape["num_attention_heads"]
        head_width = shape.get("head_dim", shape["hidden_size"] // heads)
        products = facts["layer_weights"] * figures["tokens"] + facts["head_weights"] * figures["trained_tokens"]
        attention = shape["num_hidden_layers"] * figures["squared_lengths"] / 2 * heads * head_width
        return float((6 * products + 12 * attention) / figures["seconds"])

    def _environment(self, tool: str = OURS, allocator: str = "shipped") -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "PYTHONPATH"))}
        kept |= {
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder / "hugging_face"),
            "TOKENIZERS_PARALLELISM": "false",
            # With several GPUs in sight, the plain Trainer would split each batch among them.
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        }
        if tool == OURS:
            kept["PYTHONPATH"] = str(ROOT)
        return kept | ALLOCATORS[allocator]

    def _call(self, script: str, request: dict[str, Any]) -> dict[str, Any]:
        """Run a script of ours; what it writes as its result."""
        files = [self.folder / "request.json", self.folder / "result.json"]
        files[0].write_text(json.dumps(request), encoding="utf-8")
        words = [sys.executable, str(PEERS / script), *map(str, files)]
        done = subprocess.run(words, env=self._environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{script} failed: {last_line(done.stderr)}")
        result: dict[str, Any] = json.loads(files[1].read_text(encoding="utf-8"))
        return result

    def _versions(self, tool: str) -> dict[str, str] | None:
        """Versions of the tool's package, transformers, torch and, where it is there, flash_attn."""
        code = (
            "import json, sys; from importlib import metadata, util; names = [sys.argv[1], 'transformers', 'torch'];"
            "names += ['flash_attn'] * (util.find_spec('flash_attn') is not None);"
            "print(json.dumps({name: metadata.version(name) for name in names}))"
        )
        words = [self.pythons[tool], "-c", code, PACKAGES[tool]]
        try:
            done = subprocess.run(words, env=self._environment(tool), capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        versions: dict[str, str] = json.loads(done.stdout)
        return versions

    def _task(self, run: Run, folder: Path, warmup_steps: int, steps: int) -> dict[str, Any]:
        """What the process of a run reads."""
        flash = self.facts["device"] is not None and "flash_attn" in (self.tools[run.tool] or {})
        task = {
            "model": str(self.folder / "model"),
            "rows_file": str(self.folder / "rows.jsonl"),
            "pairs_file": str(self.folder / "pairs.jsonl"),
            "dataset_dir": str(self.folder),
            "dataset": "rows",
            "output_dir": str(folder / "output"),
            "result_file": str(folder / "result.json"),
            "precision": run.precision,
            "packing": run.packing,
            "max_length": self.setting.pack_length if run.packing else self.setting.max_length,
            "batch_size": 1 if run.packing else PADDED_ROWS,
            "warmup_steps": warmup_steps,
            "max_steps": warmup_steps + steps,
            "learning_rate": LEARNING_RATE,
            "seed": SEED,
            "attention": "flash_attention_2" if flash else "sdpa",
            "activation_checkpointing": self.setting.model_size != SMALL,
        }
        shared = ("model", "output_dir", "precision", "packing", "max_length", "max_steps", "learning_rate", "seed",
                  "activation_checkpointing")  # fmt: skip
        options = {key: task[key] for key in shared} | {
            "train_files": task["rows_file"], "valid_files": str(self.folder / "valid.jsonl"),
            "per_device_train_batch_size": task["batch_size"], "lr_scheduler_type": "constant", "warmup_steps": 0,
            "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "weight_decay": 0.0, "eval_strategy": "no",
            "eval_on_start": False, "per_device_eval_batch_size": 1, "save_strategy": "no", "logging_steps": 1,
            "stop_check": 0,
        }  # fmt: skip
        return task | {"words": [word for key, value in options.items() for word in (f"--{key}", str(value))]}


def last_line(text: str) -> str:
    """The last line with anything in it."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
