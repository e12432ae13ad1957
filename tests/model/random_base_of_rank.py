"""A rank of a run under ZeRO-3 that makes the random base, or waits for it, and loads its part.

    python random_base_of_rank.py FOLDER WORD …

Writes the hash of the gathered weights of this rank into FOLDER.
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from transformers.integrations import HfDeepSpeedConfig

from novelgpt.checks.arguments import make_random_base
from novelgpt.model.loading import load_model
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings import random_weights
from novelgpt.settings.deepspeed_settings import disable_unused_build
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.runs import PretrainRun
from tests.model.reloaded import weights_hash
from tests.ranks import ZERO_3


def hold_a_part(folder: Path, words: list[str]) -> None:
    """What each rank does."""
    disable_unused_build()
    deepspeed.init_distributed(dist_backend="gloo")
    held = HfDeepSpeedConfig(ZERO_3)  # from_pretrained looks for it
    random_weights.OUTPUT = folder
    run = parse_arguments(PretrainRun, words)
    make_random_base(run)
    model = load_model(run.model, load_tokenizer(run.model))
    assert held is not None and all(weight.numel() == 0 for weight in model.parameters())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        gathered = weights_hash(model)
    (folder / f"{os.environ['RANK']}.txt").write_text(gathered, encoding="utf-8")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of process groups and engines do not always end in peace


if __name__ == "__main__":
    hold_a_part(Path(sys.argv[1]), sys.argv[2:])
