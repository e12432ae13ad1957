"""Which GPU for which model: peak memory per GPU as the toolkit's own budget estimates it. Nothing is measured.

    python benchmarks/hardware.py [--models NAME …] [--json FILE]

Models of the published sizes of Qwen3 are simulated without weights (novelgpt/budget/simulated_model.py), in bf16, on
one pack of 4,096 tokens per GPU, with activation checkpointing and AdamW. The simulation runs on the CPU; it uses the
chunk sizes of the loss and the constants of a GPU, where the allocator leaves no holes and the process does not count.

There is no target: the table in README.md comes from here. All sizes take about 3 minutes on 2 CPU cores.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import get_peft_model
from results import make_console, make_parser, write_results
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel, Qwen3Config

from novelgpt.budget import memory
from novelgpt.budget.simulated_model import SimulatedModel
from novelgpt.model import loss
from novelgpt.model.lora import lora_config
from novelgpt.settings.arguments import LoraArguments, ModelArguments

TOKENS = 4096
GPUS = 8
# Hidden size, intermediate size, layers, attention heads, tied embeddings: config.json of the models on the Hub.
SIZES = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen3-4B": (2560, 9728, 36, 32, True),
    "Qwen3-8B": (4096, 12288, 36, 32, False),
    "Qwen3-14B": (5120, 17408, 40, 40, False),
}
METHODS = ("LoRA", "QLoRA", "full SFT, 1 GPU", f"full SFT, {GPUS} GPUs, ZeRO=3")
ZERO3 = Path(__file__).resolve().parents[1] / "scripts" / "deepspeed" / "zero3.json"


def write_config(folder: Path, name: str) -> None:
    """Write the config.json of a size into a folder."""
    hidden, intermediate, layers, heads, tied = SIZES[name]
    config = Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied,
        max_position_embeddings=40960, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)


def with_adapter(model: PreTrainedModel) -> nn.Module:
    """The model with a LoRA adapter of the default settings."""
    adapted = get_peft_model(model, lora_config(model, LoraArguments())[0])
    adapted.enable_input_require_grads()
    return adapted


def training_arguments(gpus: int) -> Any:
    """The fields of TrainArguments that the estimate reads."""
    return SimpleNamespace(
        bf16=True, fp16=False, optim="adamw_torch_fused", gradient_accumulation_steps=1, world_size=gpus,
        per_device_train_batch_size=1, per_device_eval_batch_size=4, activation_checkpointing=True,
        activation_checkpointing_kwargs=None, deepspeed=str(ZERO3) if gpus > 1 else None,
        hf_deepspeed_config=SimpleNamespace(config=json.loads(ZERO3.read_text(encoding="utf-8"))),
    )  # fmt: skip


def estimate(folder: Path, method: str) -> float:
    """Peak memory per GPU in GB."""
    adapter, gpus = "LoRA" in method, GPUS if "ZeRO" in method else 1
    model = SimulatedModel(
        ModelArguments(model=str(folder)),
        torch.device("cpu"),
        torch.bfloat16 if adapter else torch.float32,
        with_adapter if adapter else None,
        method == "QLoRA",
        torch.bfloat16 if gpus > 1 else None,
    )
    parts = memory.estimate_memory(model, training_arguments(gpus), TOKENS, True).parts()
    return sum((parts | {"process": 0, "other": memory.LATER_BYTES["cuda"]}).values()) / 1e9


def main() -> None:
    """Estimate every method for each model."""
    parser = make_parser(str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES), help="sizes to estimate")
    arguments = parser.parse_args()
    for sizes in (loss.CHUNK_BYTES, loss.PRODUCT_BYTES):
        sizes["cpu"] = sizes["cuda"]
    memory.Heap = lambda *_, **__: None  # glibc's holes, which only CPUs have
    console = make_console()
    table = Table("model", *METHODS, title=f"GB per GPU, estimated: bf16, packs of {TOKENS:,} tokens")
    results = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            write_config(Path(folder), name)
            estimates = {method: estimate(Path(folder), method) for method in METHODS}
        table.add_row(name, *(f"{value:.1f}" for value in estimates.values()))
        results += [
            {
                "name": f"{name}, {method}",
                "value": value,
                "unit": "GB per GPU, estimated",
                "target": None,
                "holds": None,
            }
            for method, value in estimates.items()
        ]
    console.print(table)
    write_results(results, arguments.json)


if __name__ == "__main__":
    main()
